"""Stored words (kernels/gpu/shuffle.py) to 16-bit floats in registers, in the order of a tensor core's left operand.

A code q of up to 7 bits (10 for float16) joins the bits of a float whose last mantissa bit is worth one: 0x4300 | q is 128 + q in bfloat16,
0x6400 | q is 1024 + q in float16. So two weights take a shift, a mask with `or`, and a subtraction of offset + zero point, which is exact.
Eight bits do not fit bfloat16's mantissa: those go through float32 (0x4B000000 | q is 2^23 + q).

Shapes: A, B, C are the kernel's own tile dimensions, C the one that lies across warps. Joins make register dimensions; a broadcast of a new
dimension would be laid over threads and moved between them.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# (Triton's own types know no values at compile time)

import triton
import triton.language as tl


@triton.jit
def through_float32(BITS: tl.constexpr, TYPE: tl.constexpr):
    """Whether codes are made in float32."""
    return BITS == 8 and tl.bfloat16 == TYPE


@triton.jit
def offset(BITS: tl.constexpr, TYPE: tl.constexpr):
    """What `values` adds to each code."""
    return 8388608.0 if through_float32(BITS, TYPE) else 1024.0 if tl.float16 == TYPE else 128.0


@triton.jit
def low(word, TYPE: tl.constexpr):
    """The float in the low half of a word."""
    return word.to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def high(word, TYPE: tl.constexpr):
    """The float in the high half of a word."""
    return (word >> 16).to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def values(q, mask, BITS: tl.constexpr, TYPE: tl.constexpr):
    """The codes, each plus `offset`: (A, B, C, 8 g, 4 c, squares, 2 h, 2 r, 2 e) of words q (A, B, C, 8, 4, 4 words); in TYPE, or in float32.

    `mask` has BITS ones at the foot of both halves. It is an argument because ptxas loads a constant anew before every use.
    """
    A: tl.constexpr = q.shape[0]
    B: tl.constexpr = q.shape[1]
    C: tl.constexpr = q.shape[2]
    FIRST: tl.constexpr = (1 << BITS) * 65537 - 65537  # as a constant, LLVM sees through the cut into halves
    ONES: tl.constexpr = 0x64006400 if tl.float16 == TYPE else 0x43004300
    if through_float32(BITS, TYPE):
        pair = tl.join(_byte(q, 0), _byte(q, 8))  # r
        other = tl.join(_byte(q, 16), _byte(q, 24))
        v = tl.join(pair, other)  # A B C g c (square h) r e
    else:
        p0 = (q & FIRST) | ONES
        p1 = ((q >> BITS) & mask) | ONES
        if BITS == 8:
            v = tl.join(p0, p1)  # ... r
        else:
            p2 = ((q >> 2 * BITS) & mask) | ONES
            p3 = ((q >> 3 * BITS) & mask) | ONES
            v = tl.join(tl.join(p0, p1), tl.join(p2, p3))  # ... r h
            if BITS == 2:
                p4 = ((q >> 8) & mask) | ONES
                p5 = ((q >> 10) & mask) | ONES
                p6 = ((q >> 12) & mask) | ONES
                p7 = ((q >> 14) & mask) | ONES
                v = tl.join(v, tl.join(tl.join(p4, p5), tl.join(p6, p7)))  # ... r h square
        v = tl.join(low(v, TYPE), high(v, TYPE))
    if BITS == 4:
        v = tl.permute(v, (0, 1, 2, 3, 4, 5, 7, 6, 8))
    elif BITS == 2:
        v = tl.permute(v, (0, 1, 2, 3, 4, 5, 8, 7, 6, 9))
    return tl.reshape(v, (A, B, C, 8, 4, 16 // BITS, 2, 2, 2))


@triton.jit
def _byte(q, SHIFT: tl.constexpr):
    """2^23 + a byte of each word, float32."""
    return (((q >> SHIFT) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def again(v, TIMES: tl.constexpr):
    """Repeat v (...) along a new last dimension of registers: (..., TIMES)."""
    if TIMES == 1:
        return tl.reshape(v, [*v.shape, 1])
    elif TIMES == 2:
        return tl.join(v, v)
    else:
        HALF: tl.constexpr = TIMES // 2
        half = again(v, HALF)
        return tl.reshape(tl.join(half, half), [*v.shape, TIMES])


@triton.jit
def by_group(words, SQUARES: tl.constexpr):
    """float32 (A, B, C, 8, 4, SQUARES, 2, 2, 2) of words (A, B, P, C, 32), which hold rows g and g + 8 of P groups of a tile.

    The 32 threads g, c of a warp read one word for each of their g.
    """
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    P: tl.constexpr = words.shape[2]
    C: tl.constexpr = words.shape[3]
    w = tl.reshape(tl.permute(words, (0, 1, 3, 4, 2)), (A, B, C, 8, 4, P))
    v = tl.join(low(w, tl.float16), high(w, tl.float16)).to(tl.float32)  # A B C g c P r
    v = again(again(again(v, SQUARES // P), 2), 2)  # A B C g c P r q h e
    v = tl.permute(v, (0, 1, 2, 3, 4, 5, 7, 8, 6, 9))
    return tl.reshape(v, (A, B, C, 8, 4, SQUARES, 2, 2, 2))


@triton.jit
def by_row(words, BLOCK_M: tl.constexpr):
    """float32 (A, B, 8 g, 4 c, 2 r, BLOCK_M / 8, 2) of words (A, B, 32): repeated over the tokens that a thread has sums of."""
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    v = tl.join(low(words, tl.float16), high(words, tl.float16)).to(tl.float32)
    return tl.reshape(again(v, BLOCK_M // 4), (A, B, 8, 4, 2, BLOCK_M // 8, 2))


@triton.jit
def weights(q, mask, scale, zero, FRACTION: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """(code - zero) * scale in TYPE, shaped as `values`. scale and zero as `by_group` gives them; None: 1, and the middle code.

    FRACTION says whether zero points lie between codes: the whole part is subtracted exactly, then the rest with one rounding.
    """
    OFFSET: tl.constexpr = offset(BITS, TYPE)
    v = values(q, mask, BITS, TYPE)
    if zero is None:
        v = v - tl.full((1,), OFFSET + 2 ** (BITS - 1), v.dtype)
    elif FRACTION:
        whole = tl.floor(zero + 0.5)
        v = (v - (whole + OFFSET).to(v.dtype)) - (zero - whole).to(v.dtype)
    else:
        v = v - (zero + OFFSET).to(v.dtype)
    if scale is not None:
        v = v * scale.to(v.dtype)
    return v.to(TYPE)
