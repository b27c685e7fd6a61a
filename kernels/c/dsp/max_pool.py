"""Max pool, four channels at a time: SSUB8 and SEL keep the larger of each two codes."""

from __future__ import annotations

from dataclasses import replace

from ... import max_pool
from ...op import Call, Node
from ..version import Version


class MaxPool(Version):
    """Every window that the portable version takes."""

    op = "max_pool"
    features = ("dsp",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if max(node.inputs[0].bits, node.output.bits) != 8:
            return None
        made = max_pool.MaxPool().call(node)
        return replace(made, kernel="dsp_max_pool", sources=("dsp/max_pool.c",), headers=("dsp/pools.h",))
