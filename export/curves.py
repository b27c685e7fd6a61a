"""Functions of one activation that a model writes as several ops: one table of 256 codes.

GELU as x * (1 + erf(x / sqrt(2))) / 2, SiLU as x * sigmoid(x), or attention's scale between two quantizations, are elementwise in one
tensor and constants. Their result is a function of the tensor's code, tabled at export. Every op is evaluated in float32 in the
model's order, as runtimes do between dequantize and quantize.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from ..kernels import integer, lookup
from ..kernels.op import Array, FloatOp, Node, Tensor
from . import fold

TYPE = "Curve"
"""of a pending op that is such a function"""
OPS = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Log", "Reciprocal", "Min", "Max", "Relu", "Clip"),
    *lookup.Lookup.onnx_types,
)
"""ops that may be part of one"""


def evaluate(node: onnx.NodeProto, values: Sequence[Array | None], opset: int) -> Array:
    """float32 (256,) results of an op for all codes; `values` are (256,), or () for a constant."""
    given = [v for v in values if v is not None]
    if node.op_type in lookup.Lookup.onnx_types and len(given) == 1:
        return np.asarray(lookup.values(node.op_type, given[0], fold.attributes(node)), np.float32)
    with np.errstate(all="ignore"):  # a code that never occurs may have no real result
        return np.asarray(fold.evaluate(node, values, opset)[0], np.float32)


def node(op: FloatOp, x: Tensor, real: Array) -> Node:
    """The lookup; a rescale without a table, which costs nothing, where every code stays the same."""
    real = np.nan_to_num(real, nan=0.0)
    made = lookup.of(op, x, real)
    same = np.array_equal(made.constants["table"], integer.codes())
    return Node("rescale", made.name, made.inputs, made.output) if same else made
