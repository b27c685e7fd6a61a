"""global_average_pool on Armv6-M: integer sums, requantized without floating point."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ... import global_average_pool
from ...op import Call, Node
from ..version import Version
from . import requantize


class GlobalAveragePool(Version):
    """Every size whose sums fit."""

    op: ClassVar[str] = "global_average_pool"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        x, y = node.inputs[0], node.output
        if min(x.bits, y.bits) != 8:
            return None
        _, channels, height, width = x.shape
        pixels, a = height * width, node.attributes
        factor = np.array([global_average_pool.factor(node)], np.float32)
        scale = requantize.words(factor, np.array([pixels * 255]), y.zero_point, a["low"], a["high"])
        if scale is None:
            return None
        return Call(
            kernel="armv6m_global_average_pool",
            sources=("armv6m/global_average_pool.c", requantize.SOURCE),
            headers=("armv6m/global_average_pool.h",),
            fields={
                "pixels": pixels,
                "channels": channels,
                "bias": -x.zero_point * pixels,
                "word": f"{int(scale.words[0])}u",
                "scale": scale.initializer,
            },
            arrays={},
            overlap=0,
        )
