"""Mul, four codes a word."""

from __future__ import annotations

from dataclasses import replace

from ... import mul
from ...op import Call, Node
from ..version import Version

REACH = 2**30
"""codes before saturation must stay below it"""


class Mul(Version):
    """Every operand that the portable version takes."""

    op = "mul"
    features = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        reach = 2**16 * float(mul.factor(node))
        if any(t.bits != 8 for t in (*node.inputs, node.output)) or reach >= REACH:
            return None
        made = mul.Mul().call(node)
        return replace(made, kernel=f"dsp_{made.kernel}", sources=("dsp/mul.c",), headers=("dsp/mul.h",))
