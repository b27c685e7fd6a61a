"""Outlier-victim pairs in registers: values of codes, and the round trip of activations (kernels/outlier_victim.py has the formats).

FORM names a format: "int4", "flint4" or "int8". `INT4` decodes four bytes of int4 pairs at once: a table look-up by `prmt`, whose selector is
made of the four codes, gives the outliers; a byte of the mask is all ones where the code beside is not the identifier.
"""

import triton
import triton.language as tl

INT4 = """{
.reg .b32 l, r, a, b, nl, nr, s, m, p, t;
and.b32 l, $2, 0x0F0F0F0F;
shr.b32 r, $2, 4;
and.b32 r, r, 0x0F0F0F0F;
xor.b32 nl, l, 0x88888888;
sub.u32 nl, nl, 0x08080808;
xor.b32 nl, nl, 0x80808080;
xor.b32 nr, r, 0x88888888;
sub.u32 nr, nr, 0x08080808;
xor.b32 nr, nr, 0x80808080;
xor.b32 a, l, 0x08080808;
add.u32 a, a, 0x7F7F7F7F;
prmt.b32 a, a, 0, 0xBA98;
xor.b32 b, r, 0x08080808;
add.u32 b, b, 0x7F7F7F7F;
prmt.b32 b, b, 0, 0xBA98;
shr.b32 s, l, 4;
or.b32 s, s, l;
prmt.b32 s, s, 0, 0x4420;
and.b32 s, s, 0x7777;
prmt.b32 m, nl, 0, 0xBA98;
prmt.b32 p, 0x18100C00, 0x60403020, s;
prmt.b32 t, 0xE8F0F400, 0xA0C0D0E0, s;
xor.b32 t, t, p;
and.b32 t, t, m;
xor.b32 p, p, t;
and.b32 t, nl, a;
xor.b32 t, t, p;
and.b32 t, t, b;
xor.b32 $0, p, t;
shr.b32 s, r, 4;
or.b32 s, s, r;
prmt.b32 s, s, 0, 0x4420;
and.b32 s, s, 0x7777;
prmt.b32 m, nr, 0, 0xBA98;
prmt.b32 p, 0x18100C00, 0x60403020, s;
prmt.b32 t, 0xE8F0F400, 0xA0C0D0E0, s;
xor.b32 t, t, p;
and.b32 t, t, m;
xor.b32 p, p, t;
and.b32 t, nr, b;
xor.b32 t, t, p;
and.b32 t, t, a;
xor.b32 $1, p, t;
}"""
"""$2: four bytes, each a left code in its low half and a right one; $0, $1: the left and the right values as int8. l, r codes; nl, nr their
normal values (sign extended); a, b all ones where l, r are not the identifier; s selector; m sign; p, t outliers of either sign"""
_INT4 = tl.constexpr(INT4)


@triton.jit
def meaning(code, beside, FORM: tl.constexpr):
    """The values int32 of codes int32 (0 .. 2^bits - 1), given the other codes of their pairs."""
    MARK = tl.constexpr(128 if FORM == "int8" else 8)  # the identifier, and the sign
    FRACTION = tl.constexpr(3 if FORM == "int8" else 1)
    LEAD = tl.constexpr(8 if FORM == "int8" else 2)  # 1 before the fraction
    BIAS = tl.constexpr(2 if FORM == "int4" else 3 if FORM == "flint4" else 4)
    low = code & (MARK - 1)
    negative = code >= MARK
    if FORM == "flint4":
        size = tl.where(low < 5, low, tl.where(low == 5, 6, tl.where(low == 6, 8, 16)))
        normal = tl.where(negative, -size, size)
    else:
        normal = tl.where(code == MARK, 0, tl.where(negative, code - 2 * MARK, code))
    size = (LEAD + (low & (LEAD - 1))) << ((low >> FRACTION) + BIAS)
    size = tl.where(low == 0, 0, tl.minimum(size, 32768))
    return tl.where(beside == MARK, tl.where(negative, -size, size), normal)


@triton.jit
def values(byte, FORM: tl.constexpr, GPU: tl.constexpr):
    """(left, right) values of bytes of 4-bit pairs: int8 for int4, int32 for flint4."""
    if FORM == "int4" and GPU:
        return tl.inline_asm_elementwise(_INT4, "=r,=r,r", [byte], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)  # pyright: ignore[reportArgumentType]
    left, right = (byte & 15).to(tl.int32), ((byte >> 4) & 15).to(tl.int32)
    a, b = meaning(left, right, FORM), meaning(right, left, FORM)
    if FORM == "int4":
        a, b = a.to(tl.int8), b.to(tl.int8)
    return a, b


@triton.jit
def two_bits(x):
    """Values x >= 0 float32 rounded to two significant bits, ties up."""
    return ((x.to(tl.int32, bitcast=True) + 0x200000) & -0x400000).to(tl.float32, bitcast=True)


@triton.jit
def four_bits(x):
    """Values x >= 0 float32 rounded to four significant bits, ties up."""
    return ((x.to(tl.int32, bitcast=True) + 0x80000) & -0x100000).to(tl.float32, bitcast=True)


@triton.jit
def nearest(q, FORM: tl.constexpr):
    """(value, is it an outlier) of q float32, as if its pair were free: the nearest of all values, ties to the larger magnitude."""
    THRESHOLD = tl.constexpr(9.5 if FORM == "int4" else 20.0 if FORM == "flint4" else 135.5)
    FIRST = tl.constexpr(12.0 if FORM == "int4" else 24.0 if FORM == "flint4" else 144.0)
    LAST = tl.constexpr(96.0 if FORM == "int4" else 192.0 if FORM == "flint4" else 32768.0)
    size = tl.abs(q)
    if FORM == "flint4":
        normal = tl.where(size < 3.5, tl.floor(size + 0.5), two_bits(size))
        normal = tl.where(normal == 12.0, tl.where(size < 12.0, 8.0, 16.0), normal)
    else:
        normal = tl.minimum(tl.floor(size + 0.5), 7.0 if FORM == "int4" else 127.0)
    bounded = tl.where(size < LAST, size, LAST)  # NaN: the last
    wide = tl.maximum(four_bits(bounded) if FORM == "int8" else two_bits(bounded), FIRST)
    outlier = (size < THRESHOLD) == 0
    value = tl.where(outlier, wide, normal)
    return tl.where(q < 0, -value, value), outlier


@triton.jit
def round_trip(left, right, FORM: tl.constexpr):
    """What pairs q become by encoding and decoding: (left, right) float32 integers. The left of two outliers wins."""
    a, a_outlier = nearest(left, FORM)
    b, b_outlier = nearest(right, FORM)
    return tl.where(b_outlier & (a_outlier == 0), 0.0, a), tl.where(a_outlier, 0.0, b)
