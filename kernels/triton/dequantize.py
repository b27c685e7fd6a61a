"""Stored words (kernels/gpu/shuffle.py) to 16-bit floats in registers, in the order of a tensor core's left operand.

A code q of up to 7 bits (10 for float16) joins the bits of a float whose last mantissa bit is worth one: 0x4300 | q is 128 + q in bfloat16,
0x6400 | q is 1024 + q in float16. So two weights take a shift, a mask with `or`, and a subtraction of offset + zero point, which is exact.
Eight bits do not fit bfloat16's mantissa: those go through float32 (0x4B000000 | q is 2^23 + q).

Pairs of floats stay in words until the end, and their arithmetic is spelled as one instruction for two: left to LLVM, halves are taken apart
and put together again, most of all for sm_80, whose bfloat16 knows only fused multiply-add.

Shapes: A, B, C are the kernel's own tile dimensions, C the one that lies across warps. Joins make register dimensions; a broadcast of a new
dimension would be laid over threads and moved between them.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# (Triton's own types know no values at compile time)

import triton
import triton.language as tl

from .codebook import pairs


@triton.jit
def low(word, TYPE: tl.constexpr):
    """The float in the low half of a word."""
    return word.to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def high(word, TYPE: tl.constexpr):
    """The float in the high half of a word."""
    return (word >> 16).to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def both(v, TYPE: tl.constexpr, GPU: tl.constexpr):
    """A word with v float32, rounded to TYPE, in both halves."""
    if GPU:
        if tl.float16 == TYPE:
            return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [v], tl.int32, True, 1)
        else:
            return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [v], tl.int32, True, 1)
    else:
        half = v.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32)
        return (half & 0xFFFF) | (half << 16)


@triton.jit
def fma(a, b, c, TYPE: tl.constexpr, GPU: tl.constexpr):
    """Multiply and add, a * b + c, both floats of each word."""
    if GPU:
        if tl.float16 == TYPE:
            return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
        else:
            return tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1)
    else:  # the same where the product or the sum is exact
        first = (low(a, TYPE) * low(b, TYPE) + low(c, TYPE)).to(tl.int16, bitcast=True).to(tl.int32)
        second = (high(a, TYPE) * high(b, TYPE) + high(c, TYPE)).to(tl.int16, bitcast=True).to(tl.int32)
        return (first & 0xFFFF) | (second << 16)


@triton.jit
def numbers(q, mask, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Words (..., positions as joined) of two floats offset + code, of words q (...).

    `mask` has BITS ones at the foot of both halves. It is an argument because ptxas loads a constant anew before every use.
    """
    ONES: tl.constexpr = 0x64006400 if tl.float16 == TYPE else 0x43004300
    p0 = (q & mask) | ONES
    p1 = ((q >> BITS) & mask) | ONES
    if BITS == 8:
        return tl.join(p0, p1)  # r
    else:
        p2 = ((q >> 2 * BITS) & mask) | ONES
        p3 = ((q >> 3 * BITS) & mask) | ONES
        first = tl.join(tl.join(p0, p1), tl.join(p2, p3))  # r h
        if BITS == 4:
            return first
        else:
            p4 = ((q >> 8) & mask) | ONES
            p5 = ((q >> 10) & mask) | ONES
            p6 = ((q >> 12) & mask) | ONES
            p7 = ((q >> 14) & mask) | ONES
            return tl.join(first, tl.join(tl.join(p4, p5), tl.join(p6, p7)))  # r h square


@triton.jit
def in_order(v, BITS: tl.constexpr):
    """(A, B, C, 8, 4, squares, 2 h, 2 r) of v (A, B, C, 8, 4, 4 words, positions as joined)."""
    if BITS == 4:  # r h
        v = tl.permute(v, (0, 1, 2, 3, 4, 5, 7, 6))
    elif BITS == 2:  # r h square
        v = tl.permute(v, (0, 1, 2, 3, 4, 5, 8, 7, 6))
    return tl.reshape(v, (v.shape[0], v.shape[1], v.shape[2], 8, 4, 16 // BITS, 2, 2))


@triton.jit
def _byte(q, SHIFT: tl.constexpr):
    """A byte of each word, float32 and exact."""
    return (((q >> SHIFT) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def again(v, TIMES: tl.constexpr):
    """Repeat v (...) along a new last dimension of registers: (..., TIMES)."""
    if TIMES == 1:
        return tl.reshape(v, v.shape + [1])  # noqa: RUF005 (Triton knows no stars)
    elif TIMES == 2:
        return tl.join(v, v)
    else:
        HALF: tl.constexpr = TIMES // 2
        half = again(v, HALF)
        return tl.reshape(tl.join(half, half), v.shape + [TIMES])  # noqa: RUF005


@triton.jit
def by_group(words, SQUARES: tl.constexpr):
    """float32 (A, B, C, 8, 4, SQUARES, 2 h, 2 r) of words (A, B, P, C, 32), which hold rows g and g + 8 of P groups of a tile.

    The 32 threads g, c of a warp read one word for each of their g.
    """
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    P: tl.constexpr = words.shape[2]
    C: tl.constexpr = words.shape[3]
    w = tl.reshape(tl.permute(words, (0, 1, 3, 4, 2)), (A, B, C, 8, 4, P))
    v = tl.join(low(w, tl.float16), high(w, tl.float16)).to(tl.float32)  # A B C g c P r
    v = again(again(v, SQUARES // P), 2)  # A B C g c P r q h
    return tl.reshape(tl.permute(v, (0, 1, 2, 3, 4, 5, 7, 8, 6)), (A, B, C, 8, 4, SQUARES, 2, 2))


@triton.jit
def by_row(words, BLOCK_M: tl.constexpr):
    """float32 (A, B, 8 g, 4 c, 2 r, BLOCK_M / 8, 2) of words (A, B, 32): repeated over the tokens that a thread has sums of."""
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    v = tl.join(low(words, tl.float16), high(words, tl.float16)).to(tl.float32)
    return tl.reshape(again(v, BLOCK_M // 4), (A, B, 8, 4, 2, BLOCK_M // 8, 2))


@triton.jit
def weights(
    q,
    mask,
    scale,
    zero,
    table,
    FORMAT: tl.constexpr,
    FRACTION: tl.constexpr,
    BITS: tl.constexpr,
    TYPE: tl.constexpr,
    GPU: tl.constexpr,
):
    """Weights (A, B, C, 8 g, 4 c, squares, 2 h, 2 r, 2 e) in TYPE of words q (A, B, C, 8, 4, 4).

    FORMAT "": (code - zero) * scale; scale and zero as `by_group` gives them, where None is 1, and the middle code. FRACTION
    says whether zero points lie between codes: the whole part is subtracted exactly, then the rest with one rounding.
    Else value of the table * scale; `table` as codebook.py's `loaded` gives it.
    """
    # bfloat16 cannot hold 8 bits behind its hidden one: codes are made in float32
    WIDE: tl.constexpr = FORMAT == "" and BITS == 8 and tl.bfloat16 == TYPE
    if WIDE:
        v = tl.join(tl.join(_byte(q, 0), _byte(q, 8)), tl.join(_byte(q, 16), _byte(q, 24)))  # ... word, r, e
        v = tl.reshape(v, (q.shape[0], q.shape[1], q.shape[2], 8, 4, 2, 2, 2, 2))
        if zero is None:
            v -= 8388736.0
        else:
            v = (v - 8388608.0) - again(zero, 2)
        if scale is not None:
            v *= again(scale, 2)
        return v.to(TYPE)
    else:
        if FORMAT == "":
            OFFSET: tl.constexpr = 1024.0 if tl.float16 == TYPE else 128.0
            ONE: tl.constexpr = 0x3C003C00 if tl.float16 == TYPE else 0x3F803F80
            w = in_order(numbers(q, mask, BITS, TYPE), BITS)
            one = tl.full(w.shape, ONE, tl.int32)
            if zero is None:
                w = fma(w, one, both(tl.full(w.shape, -OFFSET - 2 ** (BITS - 1), tl.float32), TYPE, GPU), TYPE, GPU)
            elif FRACTION:
                whole = tl.floor(zero + 0.5)
                w = fma(w, one, both(-OFFSET - whole, TYPE, GPU), TYPE, GPU)
                w = fma(w, one, both(whole - zero, TYPE, GPU), TYPE, GPU)
            else:
                w = fma(w, one, both(-OFFSET - zero, TYPE, GPU), TYPE, GPU)
        else:
            w = in_order(pairs(q, table, FORMAT != "nf4", GPU), BITS)
        if scale is not None:
            w = fma(w, both(scale, TYPE, GPU), tl.full(w.shape, -0x7FFF8000, tl.int32), TYPE, GPU)  # less zero
        return tl.join(low(w, TYPE), high(w, TYPE))
