"""Kernels for Cortex-M with MVE (M55, M85): sixteen products an instruction."""
