"""Fully connected layers with MVE: four outputs at a time, sixteen products an instruction; several rows as a 1 x 1 convolution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np

from ...op import Call, Node
from ...window import Window
from .. import overlap
from ..version import Version
from . import conv2d, stream

POINT = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))


class FullyConnected(Version):
    """Weights without zero points, activations of 8 bits."""

    op: ClassVar[str] = "fully_connected"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if node.constants["weight_zero_point"].any() or min(node.inputs[0].bits, node.output.bits) != 8:
            return None
        weight = node.constants["weight"]  # (out, in)
        outputs, depth = weight.shape
        rows = math.prod(node.inputs[0].shape[:-1])
        if rows > 1:
            points = weight[:, :, None, None]
            call = conv2d.call_of(node, points, POINT, (depth, 1, rows), (outputs, 1, rows))
            ends = overlap.blocks(rows, conv2d.together(points))
            return replace(call, overlap=overlap.least(ends * outputs, np.concatenate([[0], ends[:-1]]) * depth))
        packed = stream.blocks(node, weight, stream.ROW_LEVELS)
        words = stream.row(packed)
        unrolled = {} if depth % (2 * stream.STEP) else {"PLANISH_UNROLLED": 1}
        return Call(
            kernel="mve_fully_connected",
            sources=(),
            template="mve/fully_connected.c",
            headers=("mve/fully_connected.h",),
            defines={**unrolled, **conv2d.defines(node, packed.bits, outputs)},
            fields={
                "in_features": depth,
                "out_features": outputs,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "words": words.size,
            },
            arrays={"weight": words},
            comments={"weight": f"out {outputs}, in {depth}; packed, with bias and rescale"},
        )
