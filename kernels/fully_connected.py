"""Fully connected layer: Gemm, or MatMul by a constant matrix, on the last dimension.

    accumulator = bias + sum over inputs of (x - x_zp) * (w - w_zp)
    y           = requantize(accumulator, float32(x_scale * w_scale / y_scale))      one factor per output

Equal to ONNX Runtime's QGemm and QLinearMatMul bit for bit. A MatMul may carry the bias of a following Add as input 2.
"""

from __future__ import annotations

import math

import numpy as np

from . import integer, weights
from .c import overlap
from .op import Array, Call, Constant, FloatOp, Node, Op, Unsupported
from .parsing import clamp, flag, only


class FullyConnected(Op):
    """Gemm, MatMul with a constant second operand."""

    onnx_types = ("Gemm", "MatMul")
    packed = True

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. Input (1, [rows,] in), weight (in, out), or (out, in) with transB."""
        x = only(node)
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if not isinstance(weight, Constant):
            raise Unsupported("its second operand is computed; a constant is supported")
        if weight.values.ndim != 2:
            raise Unsupported(f"its weight has {weight.values.ndim} dimensions; 2 are supported")
        if len(x.shape) not in (2, 3):
            raise Unsupported(f"its input has {len(x.shape)} dimensions; 2 and 3 are supported")
        a = node.attributes
        if flag(a, "transA") or float(a.get("alpha", 1)) != 1 or float(a.get("beta", 1)) != 1:
            raise Unsupported("transA, alpha and beta other than 0, 1 and 1 are not supported")
        output_axis = 0 if node.type == "Gemm" and flag(a, "transB") else 1
        values = weight.values if output_axis == 0 else weight.values.T
        outputs, depth = values.shape
        if x.shape[-1] != depth:
            raise Unsupported(f"its weight takes {depth} inputs; {x.shape[-1]} arrive")
        made = Node(
            op="fully_connected",
            name=node.name,
            inputs=(x,),
            output=node.output,
            attributes=clamp(node),
            constants=weights.parse(node, x, weight, values, output_axis, outputs),
        )
        weights.folded_bias(made)  # refuses sums that do not fit
        return made

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs  # (n, [rows,] in)
        centred = x.astype(np.int16) - np.int16(node.inputs[0].zero_point)
        total = integer.matmul(centred, weights.centred(node.constants)) + node.constants["bias"]
        a = node.attributes
        return integer.requantize(total, node.constants["rescale"], node.output.zero_point, a["low"], a["high"])

    def macs(self, node: Node) -> int:
        """See Op."""
        return node.output.size * node.inputs[0].shape[-1]

    def call(self, node: Node) -> Call:
        """See Op."""
        outputs, depth = node.constants["weight"].shape
        packed = node.inputs[0].bits < 8
        return Call(
            kernel="fully_connected_packed" if packed else "fully_connected",
            sources=("fully_connected.c",),
            fields={
                "rows": math.prod(node.inputs[0].shape[:-1]),
                "in_features": depth,
                "out_features": outputs,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "x_bits": node.inputs[0].bits,
                "y_bits": node.output.bits,
            },
            arrays={
                "weight": node.constants["weight"],
                "bias": weights.folded_bias(node),
                "rescale": node.constants["rescale"],
                **weights.optional_zero_point(node.constants),
            },
            comments={
                "weight": f"out {outputs}, in {depth}",
                "bias": f"out {outputs}; with x_zero_point folded in",
                "rescale": f"out {outputs}; x_scale * w_scale / y_scale",
            },
            scratch=depth if packed else 0,
            overlap=overlap.of_rows(node),
        )
