"""Integer grids of weights: a row's groups of columns share a scale and a zero point, w = scale (code - zero).

Weights are (out, in), `group` columns of a row form one group, so scale and zero are (out, in // group). Codes are 0..2^bits - 1; a
symmetric grid has the zero 2^(bits - 1). A scale may be negative: the code furthest from zero has no partner on the other side,
and the sign chooses which end of the weights it serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...kernels.packing import CHUNK, check_group

COARSE, FINE = 12, 6
"""steps of the clip search: over all ranges, then around the best"""
NARROWEST = {8: 0.8, 4: 0.35, 3: 0.3, 2: 0.2}
"""smallest share of a group's range that the clip search tries, by bits"""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight (out, in)."""

    bits: int
    scale: torch.Tensor
    """(out, groups) float32, not 0"""
    zero: torch.Tensor
    """(out, groups) float32; `fit` gives integers from 0 to 2^bits - 1"""

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes (out, in) uint8 of a weight (out, in), rounded half to even."""
        return self._stored(self._real(weight).round_()).reshape(weight.shape)

    def rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        """`encode`, and the sum of squares of what the codes miss the weight by."""
        real = self._real(weight)
        codes = real.round()
        stored = self._stored(codes)
        off = torch.linalg.vector_norm(real.sub_(codes), dim=2)  # (out, groups) in steps
        return stored.reshape(weight.shape), float(off.mul_(self.scale).square_().sum())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) float32 that codes (out, in) stand for."""
        real = (self._split(codes).float() - self.zero[..., None]).mul_(self.scale[..., None])
        return real.reshape(codes.shape)

    def columns(self, start: int, stop: int) -> Grid:
        """The grid of the groups from `start` to `stop`."""
        return Grid(self.bits, self.scale[:, start:stop], self.zero[:, start:stop])

    def rows(self, part: slice) -> Grid:
        """The grid of some rows."""
        return Grid(self.bits, self.scale[part], self.zero[part])

    def _real(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, groups, group) places of weights (out, in) on the grid, in steps."""
        return (self._split(weight) / self.scale[..., None]).add_(self.zero[..., None])

    def _stored(self, whole: torch.Tensor) -> torch.Tensor:
        """uint8 codes of whole numbers, which are clamped in place."""
        codes = whole.clamp_(0, 2**self.bits - 1).to(torch.int16)  # by way of 16 bits it takes a third of the time
        return codes.to(torch.uint8)

    def _split(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(len(weight), self.scale.shape[1], -1)  # (out, groups, group)


def group_size(name: str, inputs: int, group: int | Literal["auto"] | None) -> int:
    """Columns of a group for a layer with `inputs` columns. Raises PlanishError when `group` does not divide them.

    None is the whole row; 'auto' the largest of 64, 32 and 16 that divides it, the whole row when none does.
    """
    if group is None:
        return inputs
    if group == "auto":
        return next((g for g in (64, 32, 16) if inputs % g == 0), inputs)
    check_group(name, inputs, group)
    return group


def fit(
    weight: torch.Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    clip: bool = True,
    importance: torch.Tensor | None = None,
) -> Grid:
    """The grid of a weight (out, in): each group's own range, or with `clip` the part of it that errs least.

    On a symmetric grid the range puts the largest magnitude on the code furthest from zero; values on the other side that have
    nearly that magnitude saturate one code before, at most a step away. A finer grid for all is worth that.

    The error is sum importance (w - restored)^2 over the group; `importance` (in,), None for all alike. For the codes of each range tried, the
    best scale is known in closed form, so the error of a trial is that of its codes. All-zero groups get the scale 1.
    """
    out, inputs = weight.shape
    rows = weight.reshape(-1, group)  # (out * groups, group)
    weights = None if importance is None else importance.float().reshape(-1, group).clamp_min(0)  # (groups, group)
    scale, zero = torch.empty(len(rows)), torch.empty(len(rows))
    groups = inputs // group
    step = max(1, CHUNK // inputs) * groups if clip else len(rows)  # whole rows of the weight
    for start in range(0, len(rows), step):
        x = rows[start : start + step]
        h = None if weights is None else weights.repeat(len(x) // groups, 1)
        found = _covering(x, bits, symmetric) if not clip else _search(x, h, bits, symmetric)
        scale[start : start + step], zero[start : start + step] = found
    return Grid(bits, scale.reshape(out, groups), zero.reshape(out, groups))


def _covering(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero (n,) of the range of x (n, group)."""
    low, high = x.amin(1).clamp_max_(0), x.amax(1).clamp_min_(0)
    if symmetric:
        half = 2 ** (bits - 1)
        furthest = torch.where(high > -low, high, low)
        return _usable(furthest / -half), torch.full_like(low, half)
    scale = _usable((high - low) / (2**bits - 1))
    return scale, torch.round(-low / scale).clamp_(0, 2**bits - 1)


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """1 for a scale of 0, which all-zero groups would get."""
    return torch.where(scale == 0, 1.0, scale)


class _Best:
    """The best of the trials so far, for each group."""

    def __init__(self, x: torch.Tensor, h: torch.Tensor | None, bits: int) -> None:
        self.x, self.h = x, h
        self.weighted = x if h is None else x * h  # (n, group)
        self.top = 2**bits - 1
        self.score = torch.full((len(x),), -1.0)
        self.scale, self.zero, self.factor = torch.ones(len(x)), torch.zeros(len(x)), torch.ones(len(x))
        self.work = torch.empty_like(x)

    def attempt(self, scale: torch.Tensor, zero: torch.Tensor, factor: torch.Tensor) -> None:
        """Round with scale and zero (n,), and take the codes with their best scale where they err less than those before."""
        codes = torch.mul(self.x, scale.reciprocal()[:, None], out=self.work).round_()
        codes = torch.minimum(torch.maximum(codes, -zero[:, None]), self.top - zero[:, None])  # code - zero
        product = torch.linalg.vecdot(self.weighted, codes)  # (n,)
        square = torch.linalg.vecdot(codes, codes) if self.h is None else (codes * codes).mul_(self.h).sum(1)
        fitted = product / square.clamp_min(torch.finfo(square.dtype).tiny)
        score = product * fitted  # sum h x^2 less the error
        better = (score > self.score) & (fitted != 0)
        self.score = torch.where(better, score, self.score)
        self.scale = torch.where(better, fitted, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.factor = torch.where(better, factor, self.factor)


def _search(x: torch.Tensor, h: torch.Tensor | None, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero (n,) of least error for x (n, group) with importance h (n, group)."""
    low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)  # (n,)
    half, top = 2 ** (bits - 1), 2**bits - 1
    middle = torch.full_like(low, half)
    best = _Best(x, h, bits)
    if symmetric:
        best.zero = middle  # of all-zero groups too, for which no trial is better than none

    def attempt(factor: torch.Tensor, sign: torch.Tensor) -> None:
        if symmetric:
            above, below = torch.where(sign > 0, high, -low), torch.where(sign > 0, -low, high)
            covering = _usable(torch.maximum(above / (half - 1), below / half))
            best.attempt(factor * covering * sign, middle, factor * sign)
        else:
            scale = _usable(factor * (high - low) / top)
            best.attempt(scale, torch.round(-factor * low / scale).clamp_(0, top), factor)

    one = torch.ones_like(low)
    if symmetric:
        best.attempt(*_covering(x, bits, symmetric), torch.where(high > -low, -one, one))
    span = 1 - NARROWEST[bits]
    for factor in torch.linspace(1, NARROWEST[bits], COARSE).tolist():
        attempt(one * factor, one)
        if symmetric:
            attempt(one * factor, -one)
    centre, sign = best.factor.abs(), best.factor.sign()
    for offset in torch.linspace(-1, 1, 2 * (FINE // 2) + 1).tolist():
        if offset:
            attempt(centre + offset * span / COARSE, sign)
    if not symmetric:
        scale, zero = best.scale, best.zero
        for shift in (-1, 1):
            best.attempt(scale, (zero + shift).clamp(0, top), best.factor)
    best.attempt(best.scale, best.zero, best.factor)  # rounding with the fitted scale errs no more than before
    return best.scale, best.zero
