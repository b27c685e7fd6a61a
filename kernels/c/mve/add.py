"""Add with MVE: two multiplications by integer factors and two narrowing shifts for four elements.

The formula of kernels/add.py depends on one pair of codes, of which there are 65536. Factors and a start value are looked for at
export until all pairs give the formula's code; where none do, another version takes the node.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ... import add, elementwise, integer
from ...op import Call, Node
from ..version import Version

SHIFTS = (24, 23, 22, 21)
"""bits of a sum below the code's, most first: the finer, the more surely every pair is right, if no sum leaves 32 bits"""
TRIALS = sorted(range(-4, 5), key=abs)
"""changes to the factors"""


@dataclass(frozen=True)
class Factors:
    """code = (start + a * a's factor + b * b's factor) >> shift."""

    shift: int
    a: int
    b: int
    start: int


class Add(Version):
    """Operands of 8 bits with a factor."""

    op: ClassVar[str] = "add"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if any(t.bits != 8 for t in (*node.inputs, node.output)):
            return None
        factors = search(node)
        if factors is None:
            return None
        numbers = {"factor_a": factors.a, "factor_b": factors.b, "start": factors.start}
        made = elementwise.call(node, "mve_add", numbers)
        if made.fields["operand_size"] == 1:
            return None
        limits = (node.attributes["low"], node.attributes["high"])
        wanted = {"PLANISH_CONSTANT": "operand" in node.constants, "PLANISH_CLAMP": limits != (-128, 127)}
        defines = {"PLANISH_SHIFT": factors.shift, **{k: 1 for k, v in wanted.items() if v}}
        return replace(made, sources=(), template="mve/add.c", defines=defines, headers=("mve/add.h",))


def search(node: Node) -> Factors | None:
    """Factors with which every pair of codes gives the formula's code, and no sum leaves 32 bits."""
    ratio_a, ratio_b, fixed = add.factors(node)
    codes = np.arange(-128, 128, dtype=np.int64)
    counted = (codes + integer.UNSIGNED).astype(np.float32)
    inner = integer.fma(counted, ratio_b, fixed)  # (256,) by b
    low, high = node.attributes["low"], node.attributes["high"]
    first = np.broadcast_to(counted[:, None], (256, 256))
    y = integer.from_unsigned(integer.fma(first, ratio_a, inner[None, :]), low, high).astype(np.int64)
    for shift in SHIFTS:
        # start + products must be at least the code where that is not the lowest, at most where not the highest
        least = np.where(y > low, y << shift, -(2**62))
        most = np.where(y < high, (y + 1 << shift) - 1, 2**62)
        factor_a, factor_b = (round(float(r) * 2**shift) for r in (ratio_a, ratio_b))
        if 128 * (abs(factor_a) + abs(factor_b)) >= 2**31:
            continue
        for change_a, change_b in itertools.product(TRIALS, TRIALS):
            a, b = factor_a + change_a, factor_b + change_b
            total = a * codes[:, None] + b * codes[None, :]
            lowest, highest = int((least - total).max()), int((most - total).min())
            start = (lowest + highest) // 2
            if lowest <= highest and 128 * (abs(a) + abs(b)) + abs(start) < 2**31:
                return Factors(shift, a, b, start)
    return None
