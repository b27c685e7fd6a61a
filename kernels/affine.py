"""Affine quantization as two torch ops, `planish::quantize` and `planish::dequantize`.

A pair of them around an ordinary ATen op is how integer quantization shows in a compressed program (see
docs/architecture.md). Definition, elementwise, as ONNX QuantizeLinear and DequantizeLinear (opset 21) give it:

    quantize(x)   = saturate(round_half_even(x / scale) + zero_point)      float32 -> integer code
    dequantize(q) = (q - zero_point) * scale                               integer code -> float32

`axis` is the dimension that scale and zero_point run along when they have one element per channel; it is ignored when
they are scalars (0-d tensors).
"""

from __future__ import annotations

import torch
from torch.library import Library

LIBRARY = Library("planish", "FRAGMENT")
LIBRARY.define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max, ScalarType dtype)"
    " -> Tensor"
)
LIBRARY.define("dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor")


def along(parameter: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """`parameter` reshaped to broadcast along `axis` of a tensor with `rank` dimensions; scalars stay scalars."""
    if parameter.ndim == 0:
        return parameter
    shape = [1] * rank
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Integer codes of `x` (any shape, float32), in [quant_min, quant_max], stored as `dtype`."""
    codes = torch.round(x / along(scale, x.ndim, axis)) + along(zero_point, x.ndim, axis)
    return torch.clamp(codes, quant_min, quant_max).to(dtype)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    """Real values of the codes `q`, float32. The difference to the zero point is taken in int32, so it is exact."""
    centred = q.to(torch.int32) - along(zero_point, q.ndim, axis).to(torch.int32)
    return centred.to(torch.float32) * along(scale, q.ndim, axis)


LIBRARY.impl("quantize", quantize, "CompositeExplicitAutograd")
LIBRARY.impl("dequantize", dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("planish::quantize", lib=LIBRARY)
def _(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.register_fake("planish::dequantize", lib=LIBRARY)
def _(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.float32)
