"""Convolution with MVE: three pixels against two outputs at a time, sixteen products an instruction (windows.h)."""

from __future__ import annotations

from typing import ClassVar

from ... import weights, window
from ...op import Call, Node
from .. import overlap
from ..version import Version
from . import stream

WINDOWS = 3
"""output pixels that are computed together"""


class Conv2d(Version):
    """One group, weights without zero points, activations of 8 bits."""

    op: ClassVar[str] = "conv2d"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        weight = node.constants["weight"]  # (out, in, kh, kw)
        if (
            node.attributes["groups"] != 1
            or node.constants["weight_zero_point"].any()
            or max(node.inputs[0].bits, node.output.bits) != 8
        ):
            return None
        outputs, depth, kh, kw = weight.shape
        rows = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)  # (out, kh * kw * in)
        shape = window.of(node)
        pointwise = shape.kernel == (1, 1) and shape.pads == (0, 0, 0, 0)
        _, channels, height, width = node.inputs[0].shape
        _, _, out_height, out_width = node.output.shape
        ends = overlap.blocks(out_height * out_width, WINDOWS)
        defines = {
            "PLANISH_POINTWISE": pointwise,
            "PLANISH_RAGGED": outputs % stream.BLOCK != 0,
            "PLANISH_CLAMP": (node.attributes["low"], node.attributes["high"]) != (-128, 127),
        }
        return Call(
            kernel="mve_conv2d",
            sources=(),
            template="mve/conv2d.c",
            headers=("mve/conv2d.h",),
            defines={name: 1 for name, wanted in defines.items() if wanted},
            fields={
                "in_height": height,
                "in_width": width,
                "in_channels": channels,
                "out_height": out_height,
                "out_width": out_width,
                "out_channels": outputs,
                **shape.fields(),
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "blocks": -(-outputs // stream.BLOCK),
            },
            arrays={"weight": stream.windows(rows, weights.folded_bias(node), node.constants["rescale"])},
            comments={"weight": f"out {outputs}, kernel {kh} x {kw}, in {depth}; packed, with bias and rescale"},
            scratch=0 if pointwise else WINDOWS * -(-rows.shape[1] // 4) * 4,
            overlap=overlap.of_pixels_read_late(node, ends) if pointwise else overlap.of_pixels(node, ends),
        )
