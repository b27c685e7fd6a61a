"""average_pool on Armv6-M: integer sums; floating point only where the formula's roundings could change the code.

Every tap is rounded to float32 and so is every partial sum, by at most 2^-24 of at most 255 * taps * x_scale; the two
divisions and the zero point round three times more.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from ... import average_pool, window
from ...op import Call, Node
from ..version import Version
from . import requantize

MOST_DOUBT = 0.02
"""of a code, that the formula's roundings may amount to"""


class AveragePool(Version):
    """Windows whose sums fit."""

    op: ClassVar[str] = "average_pool"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        x, y, a = node.inputs[0], node.output, node.attributes
        if max(x.bits, y.bits) != 8 or not average_pool.counts(node).all():
            return None  # a window of nothing but padding is 0 / 0
        taps = math.prod(window.of(node).kernel)
        ratio = float(x.scale) / float(y.scale)
        more = (taps + 4) * 2.0**-24 * 255 * max(ratio, 1.0) * taps + 2.0**-15
        counts = np.arange(1, taps + 1)
        scale = None
        if more < MOST_DOUBT:
            scale = requantize.words(ratio / counts, counts * 255, y.zero_point, a["low"], a["high"], more)
        if scale is None:
            return None
        portable = average_pool.AveragePool().call(node)
        fields = [f"{v!r}f" if isinstance(v, float) else str(v) for v in portable.fields.values()]
        return Call(
            kernel="armv6m_average_pool",
            sources=("armv6m/average_pool.c", requantize.SOURCE),
            headers=("armv6m/average_pool.h",),
            fields={"formula": "{" + ", ".join(fields) + "}", "scale": scale.initializer},
            arrays={"words": np.concatenate([scale.words[:1], scale.words])},
            comments={"words": "by what a sum is divided by, from 0 on"},
            overlap=portable.overlap,
            in_place=portable.in_place,
        )
