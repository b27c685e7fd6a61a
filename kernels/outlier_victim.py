"""Outlier-victim pairs (Guo et al. 2023, OliVe, arXiv 2304.07493): codes of a fixed width for tensors with a few large values.

Elements 2i and 2i + 1 of the last dimension form a pair. Where a pair holds an outlier, its neighbour, the victim, becomes zero and
gives its code away as a mark, the identifier; the outlier's code then means a float of wide range (abfloat). With step s and
q = x / s a pair (left, right) is stored as

    left is an outlier           (abfloat(left), identifier)       also when both are: the left one wins, the right one is lost
    only right is an outlier     (identifier, abfloat(right))
    neither                      (normal(left), normal(right))

and a pair of codes means

    both are the identifier      0, 0
    one is the identifier        0 there, and the value of the other as an abfloat
    neither                      their normal values

format   normal values                      code of a normal value         identifier  abfloat: sign, exponent e, mantissa m
int4     -7 .. 7                            two's complement               1000        2 + 1 bits: (2 + m) << (e + 2), 12 to 96
flint4   +-0, 1, 2, 3, 4, 6, 8, 16          sign, place in this list       1000        2 + 1 bits: (2 + m) << (e + 3), 24 to 192
int8     -127 .. 127                        two's complement               10000000    4 + 3 bits: (8 + m) << (e + 4), 144 to 32768

The code with e = m = 0 is never written, because with one sign it is the identifier, and means 0. The 8-bit abfloat is the paper's E4M3
(the authors' simulator uses 2 + 5 bits); its exponent bias is fixed so that it starts above the normal values, and it ends at 2^15, so that a
product of two fits 32 bits; codes beyond mean 2^15. A value goes to the nearest of all values, normal and outlier, a tie to the larger
magnitude; magnitudes beyond the last saturate, and so does NaN. Every value of int4 fits int8.

Storage: int4 and flint4 two codes a byte, the left one in the low half; int8 one code a byte.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from ..common.errors import PlanishError

Kind = Literal["int", "flint"]
FLINT = (0, 1, 2, 3, 4, 6, 8, 16)
CEILING = 2**15
"""largest 8-bit abfloat"""
PERCENT = (*(75 / 1.05**k for k in range(55, 0, -1)), *range(75, 250, 2))
"""what the search tries: percent of three standard deviations beyond the mean. The authors try 75 to 250, which suits single outliers; a few
channels that are large throughout raise sigma so far that the best step lies below"""
PEAK = (0.7, 0.8, 0.9, 1.0)
"""and parts of the largest magnitude, with which few values or none are outliers"""
CHUNK = 1 << 16
"""elements that the search looks at together, so that its intermediate values stay in a core's cache"""


@dataclass(frozen=True)
class Codec:
    """The tables of one format. A magnitude |q| is looked up by floor(2 |q|): every boundary between values is a multiple of 1/2."""

    bits: int
    kind: str
    identifier: int
    limit: int
    """largest normal value"""
    normals: torch.Tensor
    """(n,) float32, ascending magnitudes"""
    outliers: torch.Tensor
    """(m,) float32, ascending magnitudes"""
    magnitude: torch.Tensor
    """(halves,) float32: value of each floor(2 |q|)"""
    level: torch.Tensor
    """(halves,) int16: its place among normals and then outliers"""
    threshold: float
    """|q| from which on it is an outlier"""
    code: torch.Tensor
    """(2, n + m) uint8: code of each level, for a positive and for a negative value"""
    normal_value: torch.Tensor
    """(2^bits,) float32: meaning of each code in a pair without outlier; the identifier means 0"""
    outlier_value: torch.Tensor
    """(2^bits,) float32: meaning of each code beside the identifier"""

    def halves(self, q: torch.Tensor) -> torch.Tensor:
        """floor(2 |q|) int32, at most the last entry of the tables; NaN becomes that entry."""
        last = float(len(self.magnitude) - 1)
        doubled = q.abs().mul_(2)
        return torch.where(doubled < last, doubled, last).to(torch.int32)

    def is_outlier(self, q: torch.Tensor) -> torch.Tensor:
        """Which elements of q lie beyond the normal values."""
        return ~(q.abs() < self.threshold)

    def round_trip(self, q: torch.Tensor) -> torch.Tensor:
        """What q (..., even) becomes by encoding and decoding: integers as float32."""
        value = torch.where(q < 0, -1.0, 1.0) * self.magnitude[self.halves(q)]
        return torch.where(victims(self.is_outlier(q)), 0.0, value)

    def encode(self, q: torch.Tensor) -> torch.Tensor:
        """Codes (..., even) uint8, one an element, of q = x / step."""
        code = self.code[(q < 0).long(), self.level[self.halves(q)].long()]
        return torch.where(victims(self.is_outlier(q)), self.identifier, code).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Values (..., even) float32 of codes (..., even) uint8."""
        beside = swapped(codes) == self.identifier
        return torch.where(beside, self.outlier_value[codes.long()], self.normal_value[codes.long()])

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (..., n) as bytes: (..., n / 2) for 4 bits, else as they are."""
        return codes if self.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """The inverse of `store`."""
        return stored if self.bits == 8 else torch.stack([stored & 15, stored >> 4], -1).flatten(-2)

    def pairs(self) -> torch.Tensor:
        """(256, 2) float32: what each byte of a 4-bit format means."""
        assert self.bits == 4
        return self.decode(self.read(torch.arange(256, dtype=torch.uint8)[:, None]))


def swapped(x: torch.Tensor) -> torch.Tensor:
    """The two elements of each pair of x (..., even) exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def victims(outlier: torch.Tensor) -> torch.Tensor:
    """Which elements (..., even) give way to the outlier beside them: not an outlier on the left."""
    left = torch.arange(outlier.shape[-1]) % 2 == 0
    return swapped(outlier) & ~(outlier & left)


@functools.cache
def codec(bits: int, kind: str) -> Codec:
    """The format: (4, 'int'), (4, 'flint') or (8, 'int')."""
    if (bits, kind) not in ((4, "int"), (4, "flint"), (8, "int")):
        raise PlanishError(
            f"outlier-victim pairs of {bits} bits, grid '{kind}'; 4 with int or flint, 8 with int are accepted"
        )
    mark, mantissa = 1 << (bits - 1), 1 if bits == 4 else 3
    bias = {"int": 2 if bits == 4 else 4, "flint": 3}[kind]
    normal = torch.zeros(2 * mark)
    magnitudes = list(FLINT) if kind == "flint" else list(range(mark))
    for place, value in enumerate(magnitudes):
        normal[place] = value
        if value:
            normal[mark + place if kind == "flint" else 2 * mark - place] = -value
    wide = torch.zeros(2 * mark)
    for low in range(1, mark):  # e = m = 0 means 0
        e, m = low >> mantissa, low & ((1 << mantissa) - 1)
        wide[low] = min(((1 << mantissa) + m) << (e + bias), CEILING)
        wide[mark + low] = -wide[low]
    normals, outliers = torch.tensor(magnitudes, dtype=torch.float32), wide[1:mark].unique()
    levels = torch.cat([normals, outliers])
    middles = (levels[:-1] + levels[1:]) / 2
    level = torch.bucketize(torch.arange(2 * int(levels[-1]) + 1) / 2, middles, right=True)
    code = torch.zeros(2, len(levels), dtype=torch.uint8)
    for place, value in enumerate(levels.tolist()):
        table = normal if place < len(normals) else wide
        for row, sign in enumerate((1, -1)):
            code[row, place] = int((table == sign * value).nonzero()[0])
    return Codec(
        bits, kind, mark, int(normals[-1]), normals, outliers, levels[level], level.to(torch.int16),
        float(middles[len(normals) - 1]), code, normal, wide,
    )  # fmt: skip


def outlier_pairs(q: torch.Tensor, format: Codec) -> torch.Tensor:
    """(..., pairs) bool: which pairs of q = x / step hold an outlier. Each has one victim."""
    return format.is_outlier(q).unflatten(-1, (-1, 2)).any(-1)


def search(
    x: torch.Tensor,
    format: Codec,
    by_row: bool,
    importance: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step with the least squared error of the round trip, and that error: (rows,) each, or () for one step in all.

    `importance` (even,) weighs the columns' squared errors, `counts` (rows,) those of the rows; None for all alike.

    x (rows, even). Tried are the steps that put the largest normal value at PERCENT of a = max(|mean + 3 sigma|, |mean - 3 sigma|), taken over the
    row or the whole tensor, or at PEAK of its largest magnitude. All-zero rows get the step 1.
    """
    wide = x.double() if by_row else x.double().reshape(1, -1)
    mean, spread = wide.mean(1), wide.std(1, correction=0)
    reach = torch.maximum((mean + 3 * spread).abs(), (mean - 3 * spread).abs()).float()  # (rows,) or (1,)
    peak = wide.abs().amax(1).float()
    tried = [reach[:, None] * (torch.tensor(PERCENT) / 100), peak[:, None] * torch.tensor(PEAK)]
    steps = torch.cat(tried, 1) / format.limit  # (rows or 1, tries)
    steps = steps.clamp_min(torch.finfo(torch.float32).tiny)
    errors = torch.zeros(steps.shape, dtype=torch.float64)
    count = max(1, CHUNK // x.shape[1])
    for start in range(0, len(x), count):
        rows = slice(start, start + count) if by_row else slice(0, 1)
        part = x[start : start + count].abs()
        for index in range(steps.shape[1]):
            step = steps[rows, index, None]  # (rows, 1)
            off = _error(part / step, format).mul_(step).square_()
            off = (off if importance is None else off.mul_(importance)).sum(1, dtype=torch.float64)  # (rows,)
            off = off if counts is None else off.mul_(counts[start : start + count])
            errors[rows, index] += off if by_row else off.sum(0, keepdim=True)
    best = errors.argmin(1, keepdim=True)
    found, error = steps.gather(1, best)[:, 0], errors.gather(1, best)[:, 0]
    found = torch.where(peak > 0, found, 1.0)
    return (found, error) if by_row else (found[0], error[0])


def _error(q: torch.Tensor, format: Codec) -> torch.Tensor:
    """What the round trip takes off magnitudes q (rows, even)."""
    halves = format.halves(q)
    value = format.magnitude[halves]
    outlier = (halves >= 2 * format.threshold).unflatten(-1, (-1, 2))
    left, right = value.unflatten(-1, (-1, 2)).unbind(-1)
    right.masked_fill_(outlier[..., 0], 0)
    left.masked_fill_(outlier[..., 1] & ~outlier[..., 0], 0)
    return q - value
