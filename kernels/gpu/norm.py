"""RMSNorm (Zhang and Sennrich 2019, eq. 4) and LayerNorm (Ba et al. 2016, eq. 4) of tokens, with the residual addition before it: `planish::gpu_norm`.

    h   = x + residual, rounded to the type of x          (..., n); returned as `sum`, as the next residual
    rms     y = h / sqrt(mean(h^2) + eps) weight + bias
    layer   y = (h - mean(h)) / sqrt(mean((h - mean(h))^2) + eps) weight + bias

Weight and bias (n,) may be absent. All of it is float32 inside, y has the type of x. Sums of n terms may be added in any order, so y is within
(n + 8) 2^-24 (|y| + |bias|) and half a unit of its type of the real value (LayerNorm: with |h| in place of |h - mean|).
"""

from __future__ import annotations

import torch

from ...common.errors import PlanishError
from .op import register

NORMS = ("", "rms", "layer")
WIDEST = 1 << 16
"""channels of a token that one program holds"""


def check(x: torch.Tensor, norm: str) -> None:
    """Raises PlanishError for what no kernel takes."""
    if norm not in NORMS[1:]:
        raise PlanishError(f"norm '{norm}'; accepted: {', '.join(NORMS[1:])}")
    if x.shape[-1] > WIDEST:
        raise PlanishError(f"tokens of {x.shape[-1]} channels are normalized; at most {WIDEST} are accepted")


def summed(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, what is returned of it): x (..., n) with its residual, and that again, or an empty tensor where there is none."""
    if residual is None:
        return x, x.new_empty(0)
    h = (x.float() + residual.float()).to(x.dtype)
    return h, h


def normed(
    h: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, norm: str, eps: float
) -> torch.Tensor:
    """The normalized h (..., n), float32; h itself for norm ""."""
    h = h.float()
    if not norm:
        return h
    if norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    h = h * (1 / torch.sqrt(h.square().mean(-1, keepdim=True) + eps))
    h = h if weight is None else h * weight.float()
    return h if bias is None else h + bias.float()


def gpu_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, sum), both (..., n) in the type of x; sum is empty, (0,), without a residual."""
    check(x, norm)
    h, total = summed(x, residual)
    return normed(h, weight, bias, norm, eps).to(x.dtype), total


def _fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)


register(
    "gpu_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str norm, float eps) -> (Tensor y, Tensor sum)",
    gpu_norm,
    _fake,
)
