"""HQQ (Badri & Shaji 2023): half-quadratic quantization, grids fitted to the weights alone with a norm that lets outliers go.

It minimises sum |w - s (q - z)|^p, p < 1, by splitting the error off as e: the sum over e of |e|^p + beta/2 (w - s (q - z) - e)^2, and in turn

    q = round(w / s + z)                            the codes
    e = shrink(w / s - (q - z))                     the proximal step, shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
    s, z = least squares of w / s - e on q          the line through codes and corrected weights
    beta = kappa beta

Two things differ from the authors' code: errors are in units of the step, so that weights of any size are treated alike, and the scale is
fitted together with the zero point. Zero points lie between codes, so that no code stands for 0: columns of tiny weights, which answer to channels
of large activations, lose more than to a grid that has one, with the authors' code as with this. Such channels want `symmetric`, or to be scaled
before. With the errors in steps, a smaller beta that grows faster gets in 10 rounds
where the authors' 10 and 1.01 get in 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import pydantic
import torch

from ...kernels.packing import CHUNK
from ..blocks import Linear
from ..moments import Moments
from . import grids
from .grids import Grid
from .integer import IntegerLinears
from .linears import Replacement


class Hqq(IntegerLinears):
    """Weight-only rounding with fitted scales and zero points; needs no data."""

    zero_bytes: ClassVar[int] = 4

    symmetric: bool = False
    """without zero points; only the scale is fitted then"""
    norm: float = pydantic.Field(default=0.7, gt=0, le=1)
    """p"""
    beta: float = pydantic.Field(default=3.0, gt=0)
    kappa: float = pydantic.Field(default=1.1, ge=1)
    iterations: int = pydantic.Field(default=10, ge=1)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Each layer on its own."""
        made = []
        for item in members:
            grid = self.solve(item.weight, self.columns(item))
            made.append(self.write(item, grid, None, "hqq"))
        return made

    def solve(self, weight: torch.Tensor, group: int) -> Grid:
        """The grid of a weight (out, in)."""
        start = grids.fit(weight, self.bits, group, self.symmetric, clip=False)
        rows = weight.reshape(-1, group)
        scale, zero = start.scale.reshape(-1), start.zero.reshape(-1)  # (out * groups,)
        step = max(1, CHUNK // group)
        parts = zip(rows.split(step), scale.split(step), zero.split(step), strict=True)
        found = [self._descend(*part) for part in parts]
        shape = start.scale.shape
        return Grid(self.bits, *(torch.cat([f[i] for f in found]).reshape(shape) for i in (0, 1)))

    def _descend(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero (n,) with the least sum |error|^p on the way, for x (n, group)."""
        top, beta = 2**self.bits - 1, self.beta
        tiny, exponent = torch.finfo(x.dtype).tiny, (self.norm - 1) / math.log(2)
        best, least = (scale, zero), torch.full_like(scale, float("inf"))
        for _ in range(self.iterations):
            real = x / scale[:, None]  # (n, group) in steps
            codes = (real + zero[:, None]).round_().clamp_(0, top)
            off = real - codes + zero[:, None]
            size = off.abs()
            power = size.clamp_min(tiny).log_().mul_(exponent).exp2_()  # |error|^(p - 1), in half the time of pow
            error = torch.linalg.vecdot(size, power) * scale.abs() ** self.norm
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
            real -= off.sgn_().mul_((size - power / beta).clamp_min_(0))
            scale, zero = self._line(real, codes, scale, zero)
            beta *= self.kappa
        return best

    def _line(
        self, real: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Least squares of real (n, group), in steps of `scale`, on the codes; where all codes are equal the scale stays."""
        centre = zero if self.symmetric else codes.mean(1)  # (n,)
        mean = torch.zeros_like(centre) if self.symmetric else real.mean(1)
        away = codes - centre[:, None]
        square = torch.linalg.vecdot(away, away)
        product = torch.linalg.vecdot(away, real - mean[:, None])
        ratio = torch.where((square > 0) & (product > 0), product / square.clamp_min(1e-9), 1.0)
        return scale * ratio, zero if self.symmetric else centre - mean / ratio
