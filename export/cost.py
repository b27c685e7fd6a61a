"""Multiply-accumulates of an ONNX graph, layer by layer, for one sample."""

from __future__ import annotations

from math import prod

import onnx
from onnx import helper, shape_inference

PACKED = ("MatMulNBits", "MatMulBnb4")
"""ops of ONNX Runtime whose shapes ONNX does not know: products with a packed weight (N, K)"""
SMALL = 1024
"""elements of a constant that may be a target shape; larger ones are weights, of which only the shape matters here"""


def macs(model: onnx.ModelProto) -> dict[str, int]:
    """{node name: multiply-accumulates for one sample} of every convolution and matrix product, in graph order.

    A dynamic dimension (the batch) counts as 1. Float and quantized graphs give the same numbers. A product behind an op
    whose shape is not known is left out.
    """
    shapes = {n: tuple(d.dim_value or 1 for d in t.tensor_type.shape.dim) for n, t in _types(model).items()}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if any(n not in shapes for n in (*node.input[:2], node.output[0]) if n):
            continue
        if node.op_type in ("Conv", "ConvTranspose"):
            over = shapes[node.output[0] if node.op_type == "Conv" else node.input[0]]
            found[node.name] = prod(over) * prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul", "MatMulInteger", *PACKED):
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            depth = shapes[node.input[0]][0 if transposed else -1]
            found[node.name] = prod(shapes[node.output[0]]) * depth
    return found


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Type of every tensor whose shape is known: ONNX's inference, taken further behind each packed product."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    graph = light.graph
    large = [i for i in graph.initializer if prod(i.dims) > SMALL]
    for item in large:
        graph.initializer.remove(item)
    given = {v.name for v in graph.input}
    graph.input.extend(
        helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in large if i.name not in given
    )
    packed = [n for n in graph.node if n.op_type in PACKED]
    while True:
        inferred = shape_inference.infer_shapes(light, data_prop=True).graph
        types = {v.name: v.type for v in [*inferred.value_info, *inferred.input, *inferred.output]}
        types = {n: t for n, t in types.items() if t.tensor_type.HasField("shape")}
        types |= {i.name: helper.make_tensor_type_proto(i.data_type, i.dims) for i in graph.initializer}
        new = [n for n in packed if n.output[0] not in types and n.input[0] in types]
        if not new:
            return types
        for node in new:
            kind = onnx.TypeProto()
            kind.CopyFrom(types[node.input[0]])
            last = kind.tensor_type.shape.dim[-1]
            last.Clear()
            last.dim_value = next(a.i for a in node.attribute if a.name == "N")
            known = next((o for o in graph.output if o.name == node.output[0]), None)
            if known is None:
                graph.value_info.append(helper.make_value_info(node.output[0], kind))
            else:
                known.type.CopyFrom(kind)
