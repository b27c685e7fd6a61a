"""`planish::gpu_linear_sparse_int8`: the product of linear_sparse.py for tokens that another node has quantized."""

from __future__ import annotations

import torch

from .linear_sparse import multiply


def run(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor,
    dtype: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., out) in `dtype` of codes (..., units * 256) int8 with their scales (..., 1)."""
    kind: torch.dtype = getattr(torch, dtype)
    return multiply(codes, token_scale, values, positions, scale, 8, kind, bias, factor, residual, activation)
