"""Add on Armv6-M: two integer factors that give the float formula's code for all pairs of codes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import numpy as np

from ... import add, elementwise, integer
from ...op import Call, Node
from ..version import Version
from . import linear

TRIALS = sorted(range(-6, 7), key=abs)
"""changes to the factors that are tried"""
MOST_SHIFT = 22


class Add(Version):
    """Every operand that the portable version takes, where factors are found."""

    op: ClassVar[str] = "add"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if any(t.bits != 8 for t in (*node.inputs, node.output)):
            return None
        fields = search(node)
        if fields is None:
            return None
        made = elementwise.call(node, "armv6m_add", fields)
        return replace(made, sources=("armv6m/add.c",), headers=("armv6m/elementwise.h",))


def search(node: Node) -> dict[str, int] | None:
    """Members of planish_armv6m_add_layer: factor_a, factor_b, start, shift, even."""
    ratio_a, ratio_b, fixed = add.factors(node)
    low, high = node.attributes["low"], node.attributes["high"]
    code = np.arange(-128, 128)
    counted = (code + integer.UNSIGNED).astype(np.float32)
    inner = integer.fma(counted, ratio_b, fixed)[None, :]
    y = integer.fma(np.broadcast_to(counted[:, None], (256, 256)), ratio_a, inner)
    codes = integer.from_unsigned(y, low, high).astype(np.int64)  # (256, 256) by a and b
    largest = 256 * (float(ratio_a) + float(ratio_b)) + 512
    shift = min(MOST_SHIFT, int(np.floor(np.log2(linear.LIMIT / largest))))
    if shift < 8:
        return None
    for change_a, change_b in itertools.product(TRIALS, TRIALS):
        a, b = round(float(ratio_a) * 2**shift) + change_a, round(float(ratio_b) * 2**shift) + change_b
        found = linear.start(a * code[:, None] + b * code[None, :], codes, shift, low, high)
        if found is not None:
            return {"factor_a": a, "factor_b": b, "start": found[0], "shift": shift, "even": found[1]}
    return None
