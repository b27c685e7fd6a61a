"""Convolution with SMLAD: two pixels and four outputs at a time, the weights packed for it (dsp/product.h)."""

from __future__ import annotations

from typing import ClassVar

from ... import window
from ...op import Call, Node
from .. import overlap
from ..version import Version
from . import packing
from .packing import GROUP, UNIT

BLOCK = 2
"""output pixels that are computed together"""


class Conv2d(Version):
    """Groups whose input and output channels are multiples of 4, weights without zero points."""

    op: ClassVar[str] = "conv2d"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        weight = node.constants["weight"]  # (out, depth, kh, kw)
        outputs, depth, kh, kw = weight.shape
        groups = node.attributes["groups"]
        if node.constants["weight_zero_point"].any() or depth % UNIT or outputs // groups % GROUP:
            return None
        if (node.attributes["low"], node.attributes["high"]) != (-128, 127):
            return None
        rows = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)  # (out, kh * kw * depth)
        streams = packing.pack(node, rows)
        if streams is None:
            return None
        bits = streams.bits
        shape = window.of(node)
        pointwise = shape.kernel == (1, 1) and shape.pads == (0, 0, 0, 0) and groups == 1
        _, channels, height, width = node.inputs[0].shape
        _, _, out_height, out_width = node.output.shape
        pixels = out_height * out_width
        return Call(
            kernel="dsp_conv2d",
            sources=("dsp/expand.c", f"dsp/product_{bits}.c"),
            template="dsp/conv2d.c",
            headers=("dsp/conv2d.h",),
            defines={"WEIGHT_BITS": bits, "POINTWISE": int(pointwise)},
            fields={
                "in_height": height,
                "in_width": width,
                "in_channels": channels,
                "out_height": out_height,
                "out_width": out_width,
                "out_channels": outputs,
                "groups": groups,
                **shape.fields(),
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "units": streams.units,
            },
            arrays={"weight": streams.words},
            comments={"weight": f"out {outputs}, kernel {kh} x {kw}, in {depth}; packed, with bias and rescale"},
            scratch=16 * streams.units + (0 if pointwise else depth),
            overlap=overlap.of_pixels(node, overlap.blocks(pixels, BLOCK)) if groups == 1 else None,
        )
