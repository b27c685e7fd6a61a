"""Product of two quantized tensors.

    y = saturate(round_half_even(float32(float32((a - a_zp) * (b - b_zp)) * rescale) + y_zp))      y_zp and y in uint8
    rescale = float32(float32(a_scale * b_scale) / y_scale)

Equal to ONNX Runtime's QLinearMul on x86 bit for bit: it adds the zero point before rounding, counted as uint8.
"""

from __future__ import annotations

import numpy as np

from . import elementwise, integer
from .op import Array, Call, FloatOp, Node, Op


class Mul(Op):
    """Mul of two activations, or of an activation and a constant."""

    onnx_types = ("Mul",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        return elementwise.parse(node, "mul")

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        a, b = (
            v.astype(np.int32) - z
            for v, z in zip(elementwise.operands(node, inputs), node.attributes["zero_points"], strict=True)
        )
        scaled = (a * b).astype(np.float32) * factor(node)
        zero_point = np.float32(node.output.zero_point + integer.UNSIGNED)
        return integer.from_unsigned(scaled + zero_point, node.attributes["low"], node.attributes["high"])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        a_zp, b_zp = node.attributes["zero_points"]
        fields = {
            "a_zero_point": a_zp,
            "b_zero_point": b_zp,
            "y_zero_point": node.output.zero_point,
            "rescale": float(factor(node)),
        }
        return elementwise.call(node, "mul", fields)


def factor(node: Node) -> np.float32:
    """float32(float32(a_scale * b_scale) / y_scale)."""
    a_scale, b_scale = node.attributes["scales"]
    return np.float32(integer.rescale(a_scale, b_scale, node.output.scale))
