"""Fully connected layers with SMLAD: one row by four outputs at a time, several rows as a 1 x 1 convolution over them."""

from __future__ import annotations

import math
from typing import ClassVar

from ...op import Call, Node
from ..version import Version
from . import packing


class FullyConnected(Version):
    """Weights without zero points."""

    op: ClassVar[str] = "fully_connected"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        weight = node.constants["weight"]  # (out, in)
        outputs, depth = weight.shape
        if node.constants["weight_zero_point"].any() or math.prod(node.inputs[0].shape[:-1]) > 1:
            return None
        streams = packing.pack(node, weight, even=True)
        if streams is None:
            return None
        bits = streams.bits
        limits = (node.attributes["low"], node.attributes["high"])
        padded = depth % (2 * packing.UNIT) > 0
        staged = limits != (-128, 127) or outputs % packing.GROUP > 0
        return Call(
            kernel="dsp_fully_connected",
            sources=(f"dsp/row_product_{bits}.c",),
            template="dsp/fully_connected.c",
            headers=("dsp/fully_connected.h",),
            defines={"WEIGHT_BITS": bits, "PADDED": int(padded), "STAGED": int(staged), "Y_BITS": 8},
            fields={
                "in_features": depth,
                "out_features": outputs,
                "y_zero_point": node.output.zero_point,
                "low": limits[0],
                "high": limits[1],
                "units": streams.units,
                "groups": streams.groups,
            },
            arrays={"weight": streams.words},
            comments={"weight": f"out {outputs}, in {depth}; packed, with bias and rescale"},
            scratch=4 * streams.units * padded + 4 * streams.groups * staged,
            overlap=0 if staged else None,
        )
