"""Product of two tensors with MVE, four codes at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ... import mul
from ...op import Call, Node
from ..version import Version


class Mul(Version):
    """Operands of 8 bits that are more than one value."""

    op: ClassVar[str] = "mul"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if any(t.bits != 8 for t in (*node.inputs, node.output)):
            return None
        made = mul.Mul().call(node)
        if made.fields["operand_size"] == 1:
            return None
        return replace(made, kernel=f"mve_{made.kernel}", sources=("mve/mul.c",), headers=("mve/pools.h",))
