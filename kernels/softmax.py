"""Softmax along one axis, with a table of exponentials made at export.

    e[d]  = float32(exp((headroom - d) * x_scale))       d = largest code - code, 0 to 255; headroom below
    y     = saturate(round_half_even(float32(e * floor(1 / y_scale)) / sum(e)) + y_zp)        sum in float32, in order

This is ONNX Runtime's QLinearSoftmax, and equals it bit for bit, with the one weakness that it rounds 1 / y_scale down: for the usual
y_scale = 1/256 nothing is lost; for 1/255.5 every probability comes out 0.2 % small. `headroom` only moves
the exponentials up, to use float32's range: max(0, log(float32_max / n) - 5) / x_scale for n elements.
Where e * floor(1 / y_scale) would leave float32 (a y_scale below about 1/(148 n)) the runtime's result is wrong: its largest entries
become 0; here the headroom is smaller then, and the result right. planish itself quantizes probabilities at 1/256. Below a Relu or Clip the runtime computes in float: within 1 code.
"""

from __future__ import annotations

import math

import numpy as np

from . import integer, layout
from .op import Array, Call, FloatOp, Node, Op, Tensor, Unsupported
from .parsing import axis, clamp, only

FLOAT32_MAX = np.finfo(np.float32).max


class Softmax(Op):
    """Softmax (opset 13 or newer: along one axis)."""

    onnx_types = ("Softmax",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        at = axis(node, len(x.shape), -1)
        if at == 0:
            raise Unsupported("it runs along the batch")
        if node.output.scale > 1:
            raise Unsupported(f"its output scale is {node.output.scale}; up to 1 is supported")
        inverse = np.floor(np.float32(1) / node.output.scale)
        constants = {"exponentials": exponentials(x, x.shape[at], inverse)}
        attributes = {"axis": at, "inverse_scale": inverse, **clamp(node)}
        return Node("softmax", node.name, (x,), node.output, attributes, constants)

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs
        a = node.attributes
        at = a["axis"]
        behind = x.max(axis=at, keepdims=True).astype(np.int32) - x
        e = node.constants["exponentials"][255 - behind]
        total = np.add.accumulate(e, axis=at, dtype=np.float32).take([-1], at)  # one after the other, as C does
        zero_point = node.output.zero_point
        codes = np.rint(np.clip(e * a["inverse_scale"] / total, a["low"] - zero_point, a["high"] - zero_point))
        return (codes + zero_point).astype(np.int8)

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        shape = layout.memory_shape(node.output.shape)
        at = layout.order(len(shape)).index(node.attributes["axis"])
        return Call(
            kernel="softmax",
            sources=("softmax.c",),
            fields={
                "outer": math.prod(shape[:at]),
                "size": shape[at],
                "inner": math.prod(shape[at + 1 :]),
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "inverse_scale": float(node.attributes["inverse_scale"]),
            },
            arrays=dict(node.constants),
            comments={"exponentials": "of the largest code less 255, 254, ..., 0"},
            overlap=0 if math.prod(shape[at + 1 :]) == 1 else None,
            in_place=(0,),
        )


def exponentials(x: Tensor, size: int, inverse: np.float32) -> integer.Float32:
    """float32 (256,): entry i for codes 255 - i below the largest of `size`, whose product with `inverse` stays finite."""
    scale = float(x.scale)
    top = max(0.0, math.log(np.float32(FLOAT32_MAX / np.float32(size))) - 5)
    top = min(top, math.log(FLOAT32_MAX / float(inverse)) - 1e-3)
    return np.exp((np.arange(256) - 255 + top / scale) * scale).astype(np.float32)
