"""Global average pool with MVE, eight channels at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ... import global_average_pool
from ...op import Call, Node
from ..version import Version


class GlobalAveragePool(Version):
    """Every size that the portable version takes."""

    op: ClassVar[str] = "global_average_pool"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if min(node.inputs[0].bits, node.output.bits) != 8:
            return None
        made = global_average_pool.GlobalAveragePool().call(node)
        sources = ("mve/global_average_pool.c",)
        return replace(made, kernel="mve_global_average_pool", sources=sources, headers=("mve/pools.h",))
