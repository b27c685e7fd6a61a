"""The codes of a key/value cache (kernels/kv_cache.py) in a kernel: how they are made, and what they are as float16.

No conversion instruction is used, so that every core from sm_80 on has them: 8-bit floats come and go by their bits, integers by the sum
with a number whose last place is one.
"""

import triton
import triton.language as tl

ONES = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 near it has whole steps, so that adding it rounds half to even
FROM_INT8 = tl.constexpr(
    "{ .reg .b32 c, m; xor.b32 c, $2, 0x80808080; mov.b32 m, 0x64806480;"
    " prmt.b32 $0, c, 0x64646464, 0x4140; prmt.b32 $1, c, 0x64646464, 0x4342;"
    " sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; }"
)
FROM_E4M3 = tl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
    " and.b32 $0, a, 0x80008000; and.b32 $1, b, 0x80008000; shr.u32 a, a, 1; shr.u32 b, b, 1;"
    " lop3.b32 $0, a, 0x3F803F80, $0, 0xEA; lop3.b32 $1, b, 0x3F803F80, $1, 0xEA; }"
)
LEAST = tl.constexpr(1.1754943508222875e-38)  # 2^-126


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """Codes (BT, P), int8 or the bits of E4M3 as uint8, and scales (BT,) float32 of rows x (BT, P) float32."""
    top = 127.0 if FORMAT == "int8" else 448.0
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), top), LEAST)
    ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    codes = (tl.clamp(ratio, -127.0, 127.0) + ONES - ONES).to(tl.int8) if FORMAT == "int8" else _e4m3(ratio)
    return codes, scale


@triton.jit
def _e4m3(x):
    """The bits of the nearest E4M3 float, ties to even, at most 448."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    small = tl.minimum(tl.abs(x), 448.0)
    whole = small.to(tl.uint32, bitcast=True)
    # from 2^-6 on: 3 of 23 bits of the mantissa stay, rounded; the exponent's bias goes from 127 to 7
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - (120 << 3)
    # below, multiples of 2^-9: as many as the code says, and 8 of them are the first normal number
    tiny = (small * 512.0 + ONES - ONES).to(tl.uint32)
    return (sign | tl.where(small < 0.015625, tiny, normal)).to(tl.uint8)


@triton.jit
def decode(codes, FORMAT: tl.constexpr, GPU: tl.constexpr, PURE: tl.constexpr):
    """The codes' values as float16, exact; those of E4M3 smaller by 2^8, which `factor` puts right.

    int8: 1024 to 2047 have whole steps in float16, so that the byte, moved by 128, is the mantissa of one of them. E4M3: sign, exponent
    and mantissa go where float16 has them. With PTX, for a GPU, four codes at a time, which the compiler does not see by itself; Triton's
    interpreter takes the other form. Where it is not PURE the compiler keeps it before the change to the layout of a product's operand,
    not behind: 8-bit values cannot be transposed on their way out of shared memory, and would be read one by one.
    """
    if GPU:
        return tl.inline_asm_elementwise(
            FROM_INT8 if FORMAT == "int8" else FROM_E4M3,  # pyright: ignore[reportArgumentType]
            "=&r,=&r,r",
            [codes],
            tl.float16,
            PURE,  # pyright: ignore[reportArgumentType]
            4,
        )
    if FORMAT == "int8":
        byte = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16)
        return (byte | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    byte = codes.to(tl.uint16)
    return (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def factor(FORMAT: tl.constexpr):
    """What the result of `decode` must be multiplied by."""
    return 256.0 if FORMAT == "e4m3" else 1.0
