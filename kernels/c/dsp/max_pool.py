"""Max pool, four channels at a time: SSUB8 and SEL keep the larger of each two codes."""

from __future__ import annotations

from dataclasses import replace

from ... import max_pool
from ...op import Call, Node
from ..version import Version


class MaxPool(Version):
    """Every window that the portable version takes, and codes of 4 and 2 bits with a multiple of 4 channels."""

    op = "max_pool"
    features = ("dsp",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        x, y = node.inputs[0], node.output
        if min(x.bits, y.bits) < 8 and x.shape[1] % 4:
            return None
        return replace(
            max_pool.MaxPool().call(node),
            kernel="dsp_max_pool",
            sources=(),
            headers=("dsp/pools.h",),
            template="dsp/max_pool.c",
            defines={"X_BITS": x.bits, "Y_BITS": y.bits},
        )
