"""Constants and static shapes of an ONNX graph: what can be known without running it on data.

The batch becomes 1, every node whose inputs are constant is evaluated (shape computations among them), shapes come from
ONNX shape inference, and nodes that no output needs are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from ..common.errors import PlanishError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Value:
    """An input or output of the ONNX graph."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Folded:
    """An ONNX graph with batch 1 in which every shape is known and every constant is evaluated."""

    nodes: tuple[onnx.NodeProto, ...]
    """nodes that an output needs and that depend on an input, in topological order"""
    constants: Mapping[str, Array]
    """initializers and evaluated nodes; a DequantizeLinear of a constant is not evaluated, it stays in `nodes`"""
    shapes: Mapping[str, tuple[int, ...]]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    opset: int


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes as Python values; strings as str, tensors as arrays."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        elif attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            value = list(value)
        found[attribute.name] = value
    return found


def fixed(folded: Folded) -> set[str]:
    """Tensors that do not depend on the model's inputs."""
    found = set(folded.constants)
    for node in folded.nodes:
        if all(not i or i in found for i in node.input):
            found.update(node.output)
    return found


def set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    """Give an attribute a value, whether it has one or not."""
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))


def evaluate(node: onnx.NodeProto, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """Outputs of one node for constant inputs (None for an input that is left out)."""
    values = {name: x for name, x in zip(node.input, inputs, strict=True) if x is not None}
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in values.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(n) for n in node.output if n]
    graph = helper.make_graph([node], "constant", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        return [np.asarray(y) for y in ReferenceEvaluator(model).run(None, values)]
    except Exception as error:  # the evaluator raises whatever numpy raises on bad operands
        raise PlanishError(f"constant node '{label(node)}' ({node.op_type}) cannot be evaluated: {error}") from error


def label(node: onnx.NodeProto) -> str:
    """The node's name, or its first output where the exporter gave none."""
    return node.name or next((o for o in node.output if o), "unnamed")


def fold(model: onnx.ModelProto) -> Folded:
    """Fix the batch to 1, evaluate constants, infer shapes, drop dead nodes.

    Raises PlanishError for a dimension other than the first that is not a number, for a fixed batch other than 1, for
    control flow, and for shapes that depend on data.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < 13:
        raise PlanishError(f"the ONNX model has opset {opset}; opset 13 or newer is accepted")
    work = onnx.ModelProto()
    work.CopyFrom(model)
    graph = work.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    kept = [i for i in graph.input if i.name not in constants]
    del graph.input[:], graph.value_info[:]
    graph.input.extend(kept)
    for value in graph.input:
        _fix_batch(value)
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        if node.domain == "com.microsoft" and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""  # the contrib versions differ only in the types they accept
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise PlanishError(f"node '{label(node)}' ({node.op_type}) is control flow; a static graph is accepted")

    nodes = _live(list(graph.node), [o.name for o in graph.output])
    shapes: dict[str, tuple[int, ...]] = {}
    while True:
        shapes = _shapes(work, nodes, constants)
        rest = []
        for node in nodes:
            if not _fold_node(node, constants, shapes, opset):
                rest.append(node)
        if len(rest) == len(nodes):
            break
        nodes = _live(rest, [o.name for o in graph.output])
    for node in nodes:
        for name in node.output:
            if name and name not in shapes:
                raise PlanishError(
                    f"node '{label(node)}' ({node.op_type}): the shape of '{name}' depends on data; static shapes are accepted"
                )
    inputs = tuple(Value(v.name, shapes[v.name], _dtype(v)) for v in graph.input)
    outputs = tuple(Value(v.name, shapes.get(v.name, ()), _dtype(v)) for v in graph.output)
    return Folded(tuple(nodes), constants, shapes, inputs, outputs, opset)


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _fix_batch(value: onnx.ValueInfoProto) -> None:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise PlanishError(f"input '{value.name}' has no known rank; a tensor with a shape is accepted")
    for axis, dim in enumerate(kind.shape.dim):
        if axis == 0 and not dim.HasField("dim_value"):
            dim.dim_value = 1
        elif not dim.HasField("dim_value"):
            name = dim.dim_param or "unknown"
            raise PlanishError(
                f"input '{value.name}' has the dynamic dimension '{name}' at axis {axis}; only the batch may be"
            )
        elif axis == 0 and dim.dim_value != 1:
            raise PlanishError(
                f"input '{value.name}' has a fixed batch of {dim.dim_value}; 1 or a dynamic batch is accepted"
            )


def _live(nodes: list[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    needed = set(outputs)
    live = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(node.input)
    return live[::-1]


def _shapes(
    work: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Array]
) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that inference can tell, with the constants known so far as initializers."""
    used = {name for node in nodes for name in node.input} | {o.name for o in work.graph.output}
    probe = onnx.ModelProto()
    probe.CopyFrom(work)
    del probe.graph.node[:], probe.graph.initializer[:]
    probe.graph.node.extend(nodes)
    probe.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), n) for n, x in constants.items() if n in used)
    try:
        inferred = shape_inference.infer_shapes(probe, data_prop=True)
    except shape_inference.InferenceError as error:
        raise PlanishError(f"ONNX shape inference failed: {str(error).splitlines()[0]}") from None
    shapes = {n: x.shape for n, x in constants.items()}
    for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return shapes


def _fold_node(
    node: onnx.NodeProto, constants: dict[str, Array], shapes: Mapping[str, tuple[int, ...]], opset: int
) -> bool:
    """Evaluate the node into `constants` when its inputs are known; whether that was so."""
    if node.op_type == "Shape" and node.input[0] in shapes:
        extra = attributes(node)
        shape = shapes[node.input[0]][slice(extra.get("start"), extra.get("end"))]
        constants[node.output[0]] = np.array(shape, np.int64)
        return True
    known = all(name in constants for name in node.input if name)
    if not known or (node.op_type == "DequantizeLinear" and constants[node.input[0]].dtype.kind not in "f"):
        return False
    results = evaluate(node, [constants.get(n) if n else None for n in node.input], opset)
    constants.update(zip((o for o in node.output if o), results, strict=True))
    return True
