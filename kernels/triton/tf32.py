"""Rounding to TF32 as kernels/gpu/tf32.py has it: two integer instructions a value."""

import triton
import triton.language as tl


@triton.jit
def rounded(x):
    """Values x float32 rounded to TF32, ties away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
