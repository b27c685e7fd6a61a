"""Average pool, four channels at a time.

The formula of kernels/average_pool.py rounds at every tap, so that there are no integer sums to take its place: with equal
scales means lie right between two codes all the time, and the order of roundings decides.
"""

from __future__ import annotations

from dataclasses import replace

from ... import average_pool
from ...op import Call, Node
from ..version import Version

REACH = 2**30
"""codes before saturation must stay below it"""


class AveragePool(Version):
    """Every window that the portable version takes."""

    op = "average_pool"
    features = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        x, y = node.inputs[0], node.output
        reach = 256 * float(x.scale) / float(y.scale)
        if min(x.bits, y.bits) != 8 or reach >= REACH:
            return None
        made = average_pool.AveragePool().call(node)
        return replace(made, kernel="dsp_average_pool", sources=("dsp/average_pool.c",), headers=("dsp/pools.h",))
