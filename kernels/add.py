"""Add of two quantized tensors, each with its own scale.

ONNX Runtime's QLinearAdd on x86 with AVX2, which this equals bit for bit, counts codes a, b in uint8 and uses fused
multiply-adds (one rounding each):

    ra, rb = float32(a_scale / y_scale), float32(b_scale / y_scale)
    fixed  = float32(y_zp - fma(ra, a_zp, float32(rb * b_zp)))
    y      = saturate(round_half_even(fma(a, ra, fma(b, rb, fixed))))

Where one operand is broadcast it is b, whatever the order in the model. On Arm ONNX Runtime adds with 22-bit integer factors and rounds
halves away from zero, so there a result that lies next to a rounding boundary may differ by 1 code.
"""

from __future__ import annotations

import numpy as np

from . import elementwise, integer
from .op import Array, Call, FloatOp, Node, Op


class Add(Op):
    """Add of two activations, or of an activation and a constant."""

    onnx_types = ("Add",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        return elementwise.parse(node, "add")

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        a, b = elementwise.operands(node, inputs)
        ratio_a, ratio_b, fixed = factors(node)
        first, second = (v.astype(np.float32) + np.float32(integer.UNSIGNED) for v in (a, b))
        total = integer.fma(first, ratio_a, integer.fma(second, ratio_b, fixed))
        return integer.from_unsigned(total, node.attributes["low"], node.attributes["high"])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        ratio_a, ratio_b, fixed = factors(node)
        return elementwise.call(
            node, "add", {"ratio_a": float(ratio_a), "ratio_b": float(ratio_b), "fixed": float(fixed)}
        )


def factors(node: Node) -> tuple[np.float32, np.float32, np.float32]:
    """float32 ra, rb and the fixed part."""
    a_scale, b_scale = node.attributes["scales"]
    a_zp, b_zp = (np.float32(z + integer.UNSIGNED) for z in node.attributes["zero_points"])
    ratio_a, ratio_b = a_scale / node.output.scale, b_scale / node.output.scale
    y_zp = np.float32(node.output.zero_point + integer.UNSIGNED)
    return ratio_a, ratio_b, y_zp - np.float32(integer.fma(np.asarray(a_zp), ratio_a, ratio_b * b_zp))
