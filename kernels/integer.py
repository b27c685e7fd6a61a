"""The integer contract: what every int8 op computes, defined once as numpy.

For `dequantize -> op -> quantize` with real = scale * (code - zero_point), a sum of products is

    accumulator = sum((x - x_zp) * (w - w_zp)) + bias                      int32, exact
    code        = saturate(round_half_even(float32(accumulator) * rescale) + y_zp)
    rescale     = float32(float32(x_scale * w_scale) / y_scale)            one float32 multiply

Ops without an accumulator (add, average pool, tables) have their own float32 formula, written in the op's file. Each is
the one of ONNX Runtime's x86 kernels, found in its source and confirmed bit for bit by tests/kernels/test_integer_ort.py. Where
that formula adds the zero point before it rounds, the result depends on whether codes are counted as int8 or uint8;
ONNX Runtime fuses uint8, so those formulas count in uint8 (`UNSIGNED` added to code and zero point).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .op import Array, Tensor

LOW, HIGH = -128, 127
UNSIGNED = 128
"""what turns an int8 code or zero point into the uint8 one of the same real value"""

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]


def rescale(
    x_scale: np.float32 | Float32, w_scale: np.float32 | Float32, y_scale: np.float32 | Float32
) -> np.float32 | Float32:
    """float32(float32(x_scale * w_scale) / y_scale), each operation rounded to float32."""
    product = np.float32(x_scale) * np.asarray(w_scale, np.float32)
    return (product / np.float32(y_scale)).astype(np.float32)


def requantize(accumulator: Array, factor: Array | np.float32, zero_point: int, low: int, high: int) -> Int8:
    """int8 codes in [low, high] of int32 accumulators: round_half_even(float32(accumulator) * factor) + zero_point.

    `factor` (float32) broadcasts against `accumulator`.
    """
    scaled = accumulator.astype(np.float32) * np.asarray(factor, np.float32)
    return (np.rint(np.clip(scaled, low - zero_point, high - zero_point)) + zero_point).astype(np.int8)


def from_unsigned(value: Float32, low: int, high: int) -> Int8:
    """int8 codes in [low, high] of float32 values that count in uint8 codes, zero point already added."""
    return (np.rint(np.clip(value, low + UNSIGNED, high + UNSIGNED)) - UNSIGNED).astype(np.int8)


def fma(a: Float32, b: Float32 | np.float32, c: Float32 | np.float32) -> Float32:
    """float32(a * b + c) rounded once, for float32 arguments.

    The product is exact in float64. The sum is rounded to odd there (its last bit is set when digits were lost), so
    that rounding it again to float32 gives what one rounding would (Boldo and Melquiond 2008, theorem 2).
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    back = total - product
    lost = (product - (total - back)) + (addend - back)  # exact error of the sum (Knuth's TwoSum)
    if not lost.any():
        return total.astype(np.float32)
    bits = total.view(np.int64)
    even = (lost != 0) & (bits & 1 == 0)
    step = np.where((lost > 0) == (total > 0), 1, -1)
    return np.where(even, bits + step, bits).view(np.float64).astype(np.float32)


def quantize(real: Array, tensor: Tensor) -> npt.NDArray[np.float32]:
    """Codes, not yet saturated, of float32 values: round_half_even(real / scale) + zero_point."""
    return np.rint(np.asarray(real, np.float32) / tensor.scale) + np.float32(tensor.zero_point)


def dequantize(codes: Array, tensor: Tensor) -> Float32:
    """float32 real values of int8 codes: scale * (code - zero_point)."""
    return tensor.scale * (codes.astype(np.int32) - tensor.zero_point).astype(np.float32)


def clamp_codes(tensor: Tensor, low: float, high: float) -> tuple[int, int]:
    """The codes that `clip(real, low, high)` followed by quantize can give: a clamp after rounding is the same clip.

    Quantizing is monotone, so quantize(clip(v, low, high)) = clip(quantize(v), quantize(low), quantize(high)).
    """

    def code(bound: float, infinite: int) -> int:
        if np.isinf(bound):
            return infinite
        with np.errstate(over="ignore"):
            return int(np.clip(quantize(np.asarray(bound, np.float32), tensor), LOW, HIGH))

    return code(low, LOW if low < 0 else HIGH), code(high, HIGH if high > 0 else LOW)


def codes() -> Int8:
    """All int8 codes in ascending order, (256,)."""
    return np.arange(LOW, HIGH + 1, dtype=np.int8)


def table(real: Array, y: Tensor, low: int = LOW, high: int = HIGH) -> Int8:
    """int8 table (256,) from the float32 results of an elementwise function for `codes()` in this order."""
    return np.clip(quantize(real, y), low, high).astype(np.int8)


def rescale_table(x: Tensor, y: Tensor, low: int = LOW, high: int = HIGH) -> Int8 | None:
    """The table (256,) that moves codes of `x` to codes of `y`; None when that changes no code."""
    same = x.scale == y.scale and x.zero_point == y.zero_point
    found = np.clip(codes(), low, high).astype(np.int8) if same else table(dequantize(codes(), x), y, low, high)
    return None if np.array_equal(found, codes()) else found


def look_up(x: Int8, entries: Int8 | None) -> Int8:
    """`entries[x]` for int8 codes x; x itself when `entries` is None."""
    return x if entries is None else entries[x.astype(np.int16) - LOW]


def matmul(x: Array, w: Array) -> npt.NDArray[np.int64]:
    """Exact x (..., k) times w (n, k) transposed -> int64 (..., n), for centred codes of up to 9 bits.

    Runs in float32 where no partial sum can leave the 24 bits that float32 holds exactly, else in float64.
    """
    reach = int(np.abs(x).max(initial=0)) * int(np.abs(w.astype(np.int64)).sum(axis=-1).max(initial=0))
    kind = np.float32 if reach < 2**24 else np.float64
    return (x.astype(kind) @ w.astype(kind).T).astype(np.int64)
