"""AWQ (Lin et al. 2023): input channels with large activations are scaled up in the weights, so that rounding hurts them less.

    s = mean |x|^alpha, alpha in 0, 0.05, ..., 0.95: the one with the least output error |x W^T - (x / s) Q(W s)^T|^2

s is divided by sqrt(max s min s), which keeps the weights' sizes. Q is the rounding that the quantizing pass behind will do, its
search for ranges included: give both the same fields. (The paper searches scales first with ranges that cover, then ranges.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pydantic
import torch

from ..blocks import Linear
from ..foldings import Folding
from ..moments import Moments
from . import grids
from .scaling import Scaling

ROWS = 512
"""activations, and outputs of a layer, that the error is computed on; both are spread evenly"""


class Awq(Scaling):
    """Activation-aware scales for weight-only quantization; a quantizing pass has to follow."""

    bits: Literal[8, 4, 3, 2] = 4
    """of the weights after the pass that follows"""
    group: int | Literal["auto"] | None = pydantic.Field(default="auto")
    """as in the pass that follows"""
    symmetric: bool = True
    """as in the pass that follows"""
    clip: bool = True
    """as in the pass that follows"""
    calibrated: bool = True
    """as in the pass that follows"""
    grid: int = pydantic.Field(default=20, ge=1)
    """values of alpha that are tried"""

    def factors(self, members: Sequence[Linear], moments: Moments, folding: Folding) -> tuple[torch.Tensor, str]:
        """The best of the grid; alpha 0 (no scaling) is in it."""
        size = folding.joined(moments.mean_magnitude, "mean")  # (count,)
        size = torch.where(size > 0, size, size[size > 0].mean() if bool((size > 0).any()) else 1.0)
        x = _spread(moments.kept)  # (rows, in)
        square = x.T @ x if len(x) >= x.shape[1] else None
        importance = moments.mean_square if self.calibrated else None
        best, chosen, least = torch.ones_like(size), 0.0, float("inf")
        for step in range(self.grid):
            factors = size ** (step / self.grid)
            factors = factors / (factors.max() * factors.min()).sqrt()
            spread = factors[folding.channels]  # (in,)
            error = sum(self._error(m, x, square, importance, spread) for m in members)
            if error < least:
                best, chosen, least = factors, step / self.grid, error
        return best, f"alpha {chosen:g}"

    def _error(
        self,
        item: Linear,
        x: torch.Tensor,
        square: torch.Tensor | None,
        importance: torch.Tensor | None,
        factors: torch.Tensor,
    ) -> float:
        """Squared error of a layer's output for x (rows, in); `square` is x^T x where that is smaller."""
        scaled = _spread(item.weight) * factors
        group = grids.group_size(item.name, x.shape[1], self.group)
        cost = None if importance is None else importance / factors**2
        grid = grids.fit(scaled, self.bits, group, self.symmetric, self.clip, cost)
        off = (grid.decode(grid.encode(scaled)) - scaled).div_(factors)  # (out, in)
        if square is not None:
            return float(torch.sum((off @ square) * off, dtype=torch.float64))
        return float((x @ off.T).square_().sum(dtype=torch.float64))


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """At most ROWS of them."""
    return rows[:: max(1, -(-len(rows) // ROWS))]
