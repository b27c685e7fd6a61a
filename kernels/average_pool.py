"""Mean over a window.

ONNX Runtime's QLinearAveragePool, which this equals bit for bit, works on real values; every operation rounds to float32
and the sum runs over the window's taps row by row:

    mean = sum(x_scale * (x - x_zp)) / taps          taps: those inside the image, or all with count_include_pad
    y    = saturate(round_half_even(mean / y_scale + y_zp))                       y_zp and y in uint8
"""

from __future__ import annotations

import math

import numpy as np

from . import integer, window
from .c import overlap
from .op import Array, Call, FloatOp, Node, Op
from .parsing import clamp, flag, four, only


class AveragePool(Op):
    """AveragePool."""

    onnx_types = ("AveragePool",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        four(x, "its input")
        shape = window.parse(node, window.kernel(node))
        attributes = {
            **shape.attributes(),
            "include_pad": flag(node.attributes, "count_include_pad"),
            **clamp(node),
        }
        return Node("average_pool", node.name, (x,), node.output, attributes)

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs  # (n, c, h, w)
        shape = window.of(node)
        real = integer.dequantize(x, node.inputs[0])
        total = np.zeros((len(x), *node.output.shape[1:]), np.float32)
        for tap in window.taps(real, shape, 0.0):
            total += tap  # adding a padded 0 changes no bit
        y: integer.Float32 = total / counts(node) / node.output.scale
        y += np.float32(node.output.zero_point + integer.UNSIGNED)
        return integer.from_unsigned(y, node.attributes["low"], node.attributes["high"])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        return Call(
            kernel="average_pool",
            sources=("average_pool.c",),
            fields={
                **window.pool_fields(node),
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "include_pad": int(node.attributes["include_pad"]),
                "x_scale": float(node.inputs[0].scale),
                "y_scale": float(node.output.scale),
            },
            arrays={},
            overlap=overlap.of_pixels_read_late(node, overlap.blocks(math.prod(node.output.shape[2:]), 1)),
        )


def counts(node: Node) -> integer.Float32:
    """float32 (rows, columns): by how many taps each output position divides."""
    shape = window.of(node)
    _, _, height, width = node.inputs[0].shape
    inside = np.ones((1, 1, height, width), np.float32)
    if node.attributes["include_pad"]:
        return np.full(node.output.shape[2:], shape.kernel[0] * shape.kernel[1], np.float32)
    return np.asarray(sum(tap[0, 0] for tap in window.taps(inside, shape, 0.0)), np.float32)
