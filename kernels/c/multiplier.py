"""Integer multipliers that give the codes of the float contract (kernels/integer.py), for every sum that can occur.

    code = clamp(floor((sum * M + (2 * zero_point + 1) * 2^31) / 2^32))            one 32 x 32 + 64 bit multiply-add

is, like the contract, a non-decreasing function of the sum, so both are equal when they step from code k - 1 to k at the
same sum for every k. M is looked for near rescale * 2^32 and tried on all steps. Most outputs have one: the roundings of the
float formula move a step only where it lies within 2^-24 of a whole number. The others keep their float factor.
"""

from __future__ import annotations

import numpy as np

from .. import integer
from ..op import Array

FLOAT = np.uint32(1 << 31)
"""set in a word that holds the bits of a float factor"""
NEAR = np.array(sorted(range(-48, 49), key=abs), np.int64)
"""distances from rescale * 2^32 that are tried"""
EXACT = 1 << 24
"""sums below it are exact as float32"""


def words(rescale: Array, least: Array, most: Array, zero_point: int, low: int, high: int) -> Array:
    """uint32 (outputs,): M, below 2^31, or the bits of the float32 factor with the top bit set.

    `rescale` float32 (outputs,), positive or 0; sums lie in [least, most], int64 (outputs,).
    """
    found = rescale.astype(np.float32).view(np.uint32) | FLOAT
    for i, factor in enumerate(rescale):
        if max(-int(least[i]), int(most[i])) < EXACT:
            m = _search(np.float32(factor), int(least[i]), int(most[i]), zero_point, low, high)
            if m is not None:
                found[i] = m
    return found


def _search(factor: np.float32, least: int, most: int, zero_point: int, low: int, high: int) -> int | None:
    """A multiplier that has every step of the contract within [least, most], or None."""
    ends = integer.requantize(np.array([least, most]), factor, zero_point, low, high).astype(np.int64)
    k = np.arange(ends[0] + 1, ends[1] + 1, dtype=np.int64)  # codes that are stepped to
    first = _steps(factor, k, zero_point, low, high)  # the least sum of each
    if first is None:
        return None
    trial = round(float(factor) * 2**32) + NEAR  # (trials,)
    trial = trial[(trial >= 0) & (trial < 2**31)]
    start = (2 * zero_point + 1) << 31
    # the code is at least k from `first` on, at most k - 1 before; and the ends are in their place
    reached = trial[:, None] * first + start >= k << 32
    not_yet = trial[:, None] * (first - 1) + start < k << 32
    lowest, highest = trial * least + start, trial * most + start
    inside = (lowest < ends[0] + 1 << 32) | (ends[0] == high)
    inside &= (highest >= ends[1] << 32) | (ends[1] == low)
    inside &= (lowest >= ends[0] << 32) | (ends[0] == low)
    inside &= (highest < ends[1] + 1 << 32) | (ends[1] == high)
    good = trial[reached.all(axis=1) & not_yet.all(axis=1) & inside]
    return int(good[0]) if good.size else None


def _steps(factor: np.float32, k: Array, zero_point: int, low: int, high: int) -> Array | None:
    """int64, for every code k the least sum whose code is k or more; None where it is not found near (k - 0.5) / factor."""
    if k.size == 0:
        return k
    near = np.ceil((k - zero_point - 0.5) / np.float64(factor)).astype(np.int64)
    window = near[:, None] + np.arange(-3, 4)  # (codes, 7)
    passed = integer.requantize(window, factor, zero_point, low, high) >= k[:, None]
    if passed[:, 0].any() or not passed[:, -1].all():
        return None
    return window[np.arange(len(k)), passed.argmax(axis=1)]
