"""Kernels for Cortex-M with the DSP extension and an FPU (M4, M7, M33): two products an instruction."""
