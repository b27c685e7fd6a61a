"""Weight-only quantization: `planish::linear_wna16`, codes of 8, 4, 3 or 2 bits with a scale and a zero point for every group.

    W[o, i] = (code[o, i] - zero_point[o, i // group]) * scale[o, i // group]
    y       = x W^T + bias

x (..., in) stays in float. `codes` (out, groups, bytes) is packed as in packing.py. `zero_point` (out, groups) is uint8 codes, or
float32 where the method places it between codes (HQQ); when it is absent it is 2^(bits - 1).
"""

from __future__ import annotations

import torch

from . import packing
from .fused import linear_output, register


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, group: int
) -> torch.Tensor:
    """W (out, in) float32 of packed codes (out, groups, bytes), scale (out, groups), zero point (out, groups) or None."""
    split = packing.unpack(codes, bits, group).unflatten(1, (-1, group)).float()  # (out, groups, group)
    zero = float(1 << (bits - 1)) if zero_point is None else zero_point.float()[..., None]
    return ((split - zero) * scale[..., None]).flatten(1)


def linear_wna16(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
) -> torch.Tensor:
    """Output y (..., out) float32: the definition."""
    return torch.nn.functional.linear(x, dequantize(codes, scale, zero_point, bits, group), bias)


register(
    "linear_wna16(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, int group) -> Tensor",
    linear_wna16,
    lambda x, codes, scale, zero_point, bias, bits, group: linear_output(x, codes.shape[0]),
)
