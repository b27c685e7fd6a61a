"""Mul on Armv6-M: an integer factor that gives the float formula's code for all products of codes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from ... import elementwise, integer, mul
from ...op import Call, Node
from ..version import Version
from . import linear

LOWER_BITS = 14
"""of the factor, which come in a product of their own"""
UPPER_BITS = 14
TRIALS = sorted(range(-40, 41), key=abs)


class Mul(Version):
    """Every operand that the portable version takes, where a factor is found."""

    op: ClassVar[str] = "mul"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if any(t.bits != 8 for t in (*node.inputs, node.output)):
            return None
        fields = search(node)
        if fields is None:
            return None
        a_zp, b_zp = node.attributes["zero_points"]
        made = elementwise.call(node, "armv6m_mul", {"a_zero_point": a_zp, "b_zero_point": b_zp, **fields})
        return replace(made, sources=("armv6m/mul.c",), headers=("armv6m/elementwise.h",))


def search(node: Node) -> dict[str, int] | None:
    """Members of planish_armv6m_mul_layer: upper, lower, start, shift, even."""
    low, high = node.attributes["low"], node.attributes["high"]
    code = np.arange(-128, 128)
    a_zp, b_zp = node.attributes["zero_points"]
    product = np.unique((code[:, None] - a_zp) * (code[None, :] - b_zp))
    factor = mul.factor(node)
    zero = np.float32(node.output.zero_point + integer.UNSIGNED)
    codes = integer.from_unsigned(product.astype(np.float32) * factor + zero, low, high).astype(np.int64)
    # the greatest shift for which the factor has its bits and sums stay within 32
    by_factor = UPPER_BITS - int(np.floor(np.log2(float(factor)))) - 1
    by_sums = int(np.floor(np.log2(linear.LIMIT / (float(factor) * np.abs(product).max() + 512))))
    shift = min(by_factor, by_sums, 30)
    if shift < 8:
        return None
    for change in TRIALS:
        whole = round(float(factor) * 2 ** (shift + LOWER_BITS)) + change
        upper, lower = whole >> LOWER_BITS, whole & ((1 << LOWER_BITS) - 1)
        found = linear.start(product * upper + (product * lower >> LOWER_BITS), codes, shift, low, high)
        if found is not None:
            return {"upper": upper, "lower": lower, "start": found[0], "shift": shift, "even": found[1]}
    return None
