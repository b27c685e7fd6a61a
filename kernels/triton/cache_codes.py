"""The codes of a key/value cache (kernels/kv_cache.py) in a kernel: how they are made, and what they are as float16.

No conversion instruction is used, so that every core from sm_80 on has them: 8-bit floats come and go by their bits, integers by the sum
with a number whose last place is one.
"""

import triton
import triton.language as tl

ONES = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 near it has whole steps, so that adding it rounds half to even
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
def decode(codes, FORMAT: tl.constexpr):
    """The codes' values as float16, exact; those of E4M3 smaller by 2^8, which `factor` puts right."""
    if FORMAT == "int8":
        # 1024 to 2047 have whole steps in float16: the byte, moved by 128, is the mantissa of one of them
        byte = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16)
        return (byte | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    byte = codes.to(tl.uint16)
    return (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def factor(FORMAT: tl.constexpr):
    """What the result of `decode` must be multiplied by."""
    return 256.0 if FORMAT == "e4m3" else 1.0
