"""Max pool with MVE, sixteen channels at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ... import max_pool
from ...op import Call, Node
from ..version import Version


class MaxPool(Version):
    """Every window that the portable version takes."""

    op: ClassVar[str] = "max_pool"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if min(node.inputs[0].bits, node.output.bits) != 8:
            return None
        made = max_pool.MaxPool().call(node)
        return replace(made, kernel="mve_max_pool", sources=("mve/max_pool.c",), headers=("mve/pools.h",))
