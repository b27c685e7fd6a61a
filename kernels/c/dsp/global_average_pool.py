"""Global average pool, four channels at a time with two SXTAB16."""

from __future__ import annotations

import math
from dataclasses import replace

from ... import global_average_pool
from ...op import Call, Node
from ..version import Version

REACH = 2**30
"""codes before saturation must stay below it"""


class GlobalAveragePool(Version):
    """Every size that the portable version takes, and inputs of 4 and 2 bits with a multiple of 4 channels."""

    op = "global_average_pool"
    features = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        x = node.inputs[0]
        reach = 256 * math.prod(x.shape[2:]) * float(global_average_pool.factor(node))
        if node.output.bits != 8 or (x.bits != 8 and x.shape[1] % 4) or reach >= REACH:
            return None
        made = global_average_pool.GlobalAveragePool().call(node)
        return replace(
            made,
            overlap=x.shape[1] - x.shape[1] * x.bits // 8,  # an output's byte lies over channels that are packed closer
            kernel="dsp_global_average_pool",
            sources=(),
            headers=("dsp/pools.h",),
            template="dsp/global_average_pool.c",
            defines={"X_BITS": x.bits},
        )
