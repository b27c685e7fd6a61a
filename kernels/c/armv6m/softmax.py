"""softmax on Armv6-M: the float32 formula in integers, so that no floating-point library is needed."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ... import softmax
from ...op import Call, Node
from ..version import Version

LEAST = 2.0**24
"""the largest exponential, so that none too small for a normal float32 could change a sum"""


class Softmax(Version):
    """Every softmax whose exponentials use float32's range."""

    op: ClassVar[str] = "softmax"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        exponentials = node.constants["exponentials"]  # float32 (256,)
        if float(exponentials[-1]) < LEAST or min(node.inputs[0].bits, node.output.bits) != 8:
            return None
        portable = softmax.Softmax().call(node)
        bits = int(np.float32(node.attributes["inverse_scale"]).view(np.uint32))
        return Call(
            kernel="armv6m_softmax",
            sources=("armv6m/softmax.c",),
            headers=("armv6m/softmax.h",),
            fields={**portable.fields, "inverse_scale": f"{bits}u"},
            arrays={"exponentials": exponentials.view(np.uint32)},
            comments={"exponentials": "float32 as bits, of the largest code less 255, 254, ..., 0"},
            overlap=portable.overlap,
            in_place=portable.in_place,
        )
