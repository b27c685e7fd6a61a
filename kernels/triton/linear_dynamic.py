"""`planish::gpu_linear_dynamic` (kernels/gpu/linear_dynamic.py): quantize_tokens.py, then linear_int8.py, which have the variants."""

from __future__ import annotations

import torch

from ..gpu.linear_dynamic import NAMES, PER_TENSOR, columns_of
from . import linear_int8, quantize_tokens


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    total: torch.Tensor | None,
    bits: int,
    group: int,
    format: str,
    activation_group: int,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Output y (..., out) of x's type for x (..., in) in floats."""
    codes, token_scale, zero, _, _ = quantize_tokens.run(
        x, None, None, None, None, None, "", 0.0, 0, False, format, activation_group, columns_of(weight, bits)
    )
    token_zero = zero if activation_group == PER_TENSOR else None
    return linear_int8.run(
        codes, token_scale, token_zero, weight, scale, total, bits, group, NAMES[x.dtype], bias, factor, residual, activation
    )  # fmt: skip
