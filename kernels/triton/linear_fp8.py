"""`planish::gpu_linear_fp8` (kernels/gpu/linear_fp8.py): quantize_tokens.py where activations are in 8 bits, then linear_float8.py, which have the variants."""

from __future__ import annotations

import torch

from . import linear_float8, quantize_tokens


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    activations: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Output y (..., out) of x's type for x (..., in) in floats."""
    dtype, token_scale = x.dtype, None
    if activations != "none":
        x, token_scale, _, _, _ = quantize_tokens.run(
            x, None, None, None, None, None, "", 0.0, 0, False, activations, 0, weight.shape[1]
        )
    return linear_float8.product(
        x, token_scale, weight, scale, format, activations, dtype, bias, factor, residual, activation
    )
