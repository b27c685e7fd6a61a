"""Multiply-accumulates of an ONNX graph, layer by layer, for one sample."""

from __future__ import annotations

from math import prod

import onnx
from onnx import shape_inference


def macs(model: onnx.ModelProto) -> dict[str, int]:
    """{node name: multiply-accumulates for one sample} of every Conv, Gemm and MatMul, in graph order.

    A dynamic dimension (the batch) counts as 1. Float and QDQ graphs give the same numbers.
    """
    inferred = shape_inference.infer_shapes(model)
    shapes: dict[str, tuple[int, ...]] = {i.name: tuple(i.dims) for i in inferred.graph.initializer}
    for value in [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]:
        shapes[value.name] = tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim)
    found: dict[str, int] = {}
    for node in inferred.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            over = shapes[node.output[0] if node.op_type == "Conv" else node.input[0]]
            found[node.name] = prod(over) * prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            depth = shapes[node.input[0]][0 if transposed else -1]
            found[node.name] = prod(shapes[node.output[0]]) * depth
    return found
