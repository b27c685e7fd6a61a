"""Add with integer factors and SMLAW: two multiplications and one saturation an element, no float.

The formula of kernels/add.py depends on one pair of codes, of which there are 65536. Factors and a start value are looked
for at export until all of them give the formula's code. Where none do, the float formula runs: with scales of few digits many
sums lie right between two codes, and rounding those to the even one is no linear function.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from ... import add, elementwise, integer
from ...op import Array, Call, Node
from ..version import Version

SHIFT = 20
"""PLANISH_DSP_ADD_SHIFT: sums have this many bits below the code's"""
TRIALS = sorted(range(-256, 257, 32), key=abs)
"""changes to the factors, in units of 2^-(SHIFT + 8)"""


@dataclass(frozen=True)
class Factors:
    """What planish_dsp_add multiplies by."""

    a: int
    b: int
    start: int


class Add(Version):
    """Every operand that the portable version takes."""

    op = "add"
    features = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if any(t.bits != 8 for t in (*node.inputs, node.output)):
            return None
        factors = search(node)
        if factors is None:
            ratio_a, ratio_b, fixed = (float(v) for v in add.factors(node))
            made = elementwise.call(node, "dsp_add_float", {"ratio_a": ratio_a, "ratio_b": ratio_b, "fixed": fixed})
            source = "dsp/add_float.c"
        else:
            numbers = {"factor_a": factors.a, "factor_b": factors.b, "start": factors.start}
            made = elementwise.call(node, "dsp_add", numbers)
            source = "dsp/add.c"
        return replace(made, sources=(source,), headers=("dsp/add.h",))


def search(node: Node) -> Factors | None:
    """Factors with which every pair of codes gives the formula's code."""
    ratio_a, ratio_b, fixed = add.factors(node)
    counted = (np.arange(-128, 128) + integer.UNSIGNED).astype(np.float32)
    inner = integer.fma(counted, ratio_b, fixed)  # (256,) by b
    low, high = node.attributes["low"], node.attributes["high"]
    a = np.broadcast_to(counted[:, None], (256, 256))
    y = integer.from_unsigned(integer.fma(a, ratio_a, inner[None, :]), low, high).astype(np.int64)
    # (start + sum) >> SHIFT must be at least the code where that is not the lowest, at most where not the highest
    least = np.where(y > low, y << SHIFT, -(2**62))
    most = np.where(y < high, (y + 1 << SHIFT) - 1, 2**62)
    first = [round(float(r) * 2 ** (SHIFT + 8)) for r in (ratio_a, ratio_b)]
    for change_a, change_b in itertools.product(TRIALS, TRIALS):
        factor_a, factor_b = first[0] + change_a, first[1] + change_b
        if max(abs(factor_a), abs(factor_b)) >= 2**31:
            return None
        inner = _terms(factor_b)
        total = _terms(factor_a)[:, None] + inner[None, :]
        lowest, highest = int((least - total).max()), int((most - total).min())
        start = (lowest + highest) // 2
        sums = [start + int(f(v)) for f in (np.min, np.max) for v in (inner, total)] + [start]
        if lowest <= highest and min(sums) >= -(2**31) and max(sums) < 2**31:
            return Factors(factor_a, factor_b, start)
    return None


def _terms(factor: int) -> Array:
    """int64 (256,) what code -128 and up add to a sum."""
    return (factor * 256 * np.arange(-128, 128, dtype=np.int64)) >> 16
