"""Fully connected layers with SMLAD: one row by four outputs at a time, several rows as a 1 x 1 convolution over them."""

from __future__ import annotations

import math
from typing import ClassVar

from ...op import Call, Node
from .. import overlap
from ..version import Version
from . import conv2d, packing
from .packing import GROUP, UNIT


class FullyConnected(Version):
    """Weights without zero points. Activations may have 4 or 2 bits."""

    op: ClassVar[str] = "fully_connected"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if node.constants["weight_zero_point"].any():
            return None
        rows = math.prod(node.inputs[0].shape[:-1])
        return _row(node) if rows == 1 else _rows(node, rows)


def _row(node: Node) -> Call:
    """One row."""
    weight = node.constants["weight"]  # (out, in)
    outputs, depth = weight.shape
    streams = packing.pack(node, weight, even=True)
    staged = conv2d.is_staged(node, outputs)
    copied = depth % (2 * UNIT) > 0 or node.inputs[0].bits < 8
    return Call(
        kernel="dsp_fully_connected",
        sources=(f"dsp/row_product_{streams.form}.c",),
        template="dsp/fully_connected.c",
        headers=("dsp/fully_connected.h",),
        defines={**conv2d.defines(node, streams, staged), "COPIED": int(copied)},
        fields={
            "in_features": depth,
            "out_features": outputs,
            "y_zero_point": node.output.zero_point,
            "low": node.attributes["low"],
            "high": node.attributes["high"],
            "units": streams.units,
            "groups": streams.groups,
        },
        arrays={"weight": streams.words},
        comments={"weight": f"out {outputs}, in {depth}; packed, with bias and rescale"},
        scratch=UNIT * streams.units * copied + GROUP * streams.groups * staged,
        overlap=0 if copied or staged else None,  # then nothing of the input is read after the first output is written
    )


def _rows(node: Node, rows: int) -> Call | None:
    """Several rows: the pixels of an image of height 1."""
    outputs, depth = node.constants["weight"].shape
    ends = overlap.blocks(rows, conv2d.BLOCK)
    written, needed = ends * outputs * node.output.bits, ends * depth * node.inputs[0].bits
    distance = overlap.least(-(-written // 8), needed // 8)
    weight = node.constants["weight"][:, None, None]  # (out, 1, 1, in)
    return conv2d.call_of(node, weight, conv2d.POINT, (depth, 1, rows), (outputs, 1, rows), 1, distance)
