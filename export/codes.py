"""Between a model's own values and int8 codes, at its inputs and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def to_codes(x: Array, dtype: str, scale: np.float32, zero_point: int) -> Array:
    """int8 codes, same shape. uint8 and int8 are codes already; real values are quantized as ONNX QuantizeLinear does:
    float32 division, round half to even, add the zero point, saturate.
    """
    if dtype == "uint8":
        return (x.astype(np.int16) - 128).astype(np.int8)
    if dtype == "int8":
        return x.astype(np.int8)
    codes = np.rint(x.astype(np.float32) / np.float32(scale)) + np.float32(zero_point)
    return np.clip(codes, -128, 127).astype(np.int8)


def from_codes(codes: Array, dtype: str, scale: np.float32, zero_point: int) -> Array:
    """Values of the model's dtype for int8 codes, same shape: the inverse of `to_codes`."""
    if dtype == "uint8":
        return (codes.astype(np.int16) + 128).astype(np.uint8)
    if dtype == "int8":
        return codes
    return (codes.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)
