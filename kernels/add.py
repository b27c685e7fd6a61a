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
from .op import Array, Call, FloatOp, Node, Op, Unsupported


class Add(Op):
    """Add of two activations, or of an activation and a constant."""

    onnx_types = ("Add",)
    packed = True

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
        numbers = {"ratio_a": float(ratio_a), "ratio_b": float(ratio_b), "fixed": float(fixed)}
        if any(t.bits < 8 for t in (*node.inputs, node.output)):
            return _packed(node, numbers)
        return elementwise.call(node, "add", numbers)


def _packed(node: Node, numbers: dict[str, float]) -> Call:
    """The C call for codes of fewer than 8 bits in any operand."""
    y = node.output
    if any(t.shape != y.shape for t in node.inputs) or len(node.inputs) != 2:
        raise Unsupported("its codes are packed; two activations of the output's shape are supported then")
    a, b = node.inputs
    return Call(
        kernel="add_packed",
        sources=("add.c",),
        fields={
            "size": y.size,
            **numbers,
            "low": node.attributes["low"],
            "high": node.attributes["high"],
            "a_bits": a.bits,
            "b_bits": b.bits,
            "y_bits": y.bits,
        },
        arrays={},
        overlap=0 if y.bits <= a.bits else None,
        in_place=tuple(i for i, t in enumerate((a, b)) if t.bits == y.bits),
    )


def factors(node: Node) -> tuple[np.float32, np.float32, np.float32]:
    """float32 ra, rb and the fixed part."""
    a_scale, b_scale = node.attributes["scales"]
    a_zp, b_zp = (np.float32(z + integer.UNSIGNED) for z in node.attributes["zero_points"])
    ratio_a, ratio_b = a_scale / node.output.scale, b_scale / node.output.scale
    y_zp = np.float32(node.output.zero_point + integer.UNSIGNED)
    return ratio_a, ratio_b, y_zp - np.float32(integer.fma(np.asarray(a_zp), ratio_a, ratio_b * b_zp))
