"""Kernels for Cortex-M0 and M0+ (Armv6-M): no multiply-accumulate, no FPU."""
