"""Two 4-bit values of a byte as int8, both times 16, so that four bytes take one or two instructions.

Written byte by byte the compiler takes each byte out of its word and puts it back, a dozen instructions for four. GPU is whether the code
runs on one: Triton's interpreter knows no machine instructions, and takes the other form, which gives the same values.
"""

import triton
import triton.language as tl


@triton.jit
def low(byte, GPU: tl.constexpr):
    """16 times the two's complement value in the low halves of bytes int8, as int8."""
    if GPU:
        return tl.inline_asm_elementwise(
            "{ shl.b32 $0, $1, 4; and.b32 $0, $0, 0xF0F0F0F0; }", "=r,r", [byte], tl.int8, True, 4
        )
    return byte << 4


@triton.jit
def high(byte, GPU: tl.constexpr):
    """16 times the two's complement value in the high halves of bytes int8, as int8."""
    if GPU:
        return tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [byte], tl.int8, True, 4)
    return byte & -16
