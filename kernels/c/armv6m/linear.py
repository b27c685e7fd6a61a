"""Integer formulas that give a float formula's code for every input there can be, tried out at export.

    code = clamp(sum >> shift, low, high)       sum = start + terms

For given terms the codes wanted bound `start` from both sides; any start between the bounds will do. Where many results lie
right between two codes (scales that are powers of two) rounding to the even one is not linear: then ties are rounded up, and
odd codes whose sum has no bits below the shift are lowered by one.
"""

from __future__ import annotations

import numpy as np

from ...op import Array

LIMIT = 2**31


def start(terms: Array, codes: Array, shift: int, low: int, high: int) -> tuple[int, int] | None:
    """(start, even) for int64 terms and the codes wanted of them (same shape); None where no start gives them all."""
    least = np.where(codes > low, (codes << shift) - terms, -(2**62)).max()
    most = np.where(codes < high, (codes + 1 << shift) - 1 - terms, 2**62).min()
    if least <= most:
        found = (int(least) + int(most)) // 2
        return (found, 0) if _fits(terms, found) else None
    for found in {int(least), int(most), int(most) + 1}:  # ties meet even codes both from below and from above
        total = terms + found
        code = total >> shift
        tie = total & ((1 << shift) - 1) == 0
        code = np.where(tie, code & ~1, code)
        if np.array_equal(np.clip(code, low, high), codes) and _fits(terms, found):
            return found, 1
    return None


def _fits(terms: Array, first: int) -> bool:
    """Whether sums stay within 32 bits."""
    return bool(abs(first) + np.abs(terms).max() < LIMIT)
