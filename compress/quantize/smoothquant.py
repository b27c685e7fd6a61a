"""SmoothQuant (Xiao et al. 2023): outliers of activations moved into the weights, so that both fit 8 bits.

s_j = max |x_j|^alpha / max |W_j|^(1 - alpha)        equation 4; x_j an input channel, W_j its columns in all layers that read it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pydantic
import torch

from ..blocks import Linear
from ..foldings import Folding
from ..moments import Moments
from .scaling import Scaling


class SmoothQuant(Scaling):
    """Input channels divided by what their activations are larger than their weights; a quantizing pass has to follow."""

    keep: ClassVar[int] = 0

    alpha: float = pydantic.Field(default=0.5, ge=0, le=1)
    """how much of the difference moves: 0 makes the weights' channels equal, 1 the activations'"""

    def factors(self, members: Sequence[Linear], moments: Moments, folding: Folding) -> tuple[torch.Tensor, str]:
        """Equation 4; 1 for a channel without activations or without weights."""
        peak = folding.joined(moments.peak)  # (count,)
        weight = folding.joined(torch.stack([m.weight.abs().amax(0) for m in members]).amax(0))
        factors = peak**self.alpha / weight ** (1 - self.alpha)
        dead = (peak == 0) | (weight == 0) | ~torch.isfinite(factors) | (factors == 0)
        return torch.where(dead, 1.0, factors), f"alpha {self.alpha:g}"
