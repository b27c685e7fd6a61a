"""Fused low-bit ops on their way to ONNX: torch.onnx writes each as one node of the domain `planish`, then its file lowers it.

The graph in between, with one node an op, is what the TVM importer reads (`lower=False` in `lowering.to_onnx`).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx import defs, helper, numpy_helper
from onnxscript import values

from ..common.errors import listed
from ..kernels import fused
from ..kernels.fused import Builder, Call

DOMAIN = "planish"
ATTRIBUTES = {
    "int": defs.OpSchema.AttrType.INT,
    "bool": defs.OpSchema.AttrType.INT,
    "float": defs.OpSchema.AttrType.FLOAT,
    "str": defs.OpSchema.AttrType.STRING,
    "List[int]": defs.OpSchema.AttrType.INTS,
    "List[float]": defs.OpSchema.AttrType.FLOATS,
}
TYPES = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "uint8", "int8", "int32", "int64", "bool")]


def translations() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """torch.onnx's custom table: every fused op as a node of the domain `planish` with the arguments of its schema."""
    return {overload(name): _translation(overload(name)) for name in fused.ops()}


def overload(name: str) -> torch._ops.OpOverload:
    """torch.ops.planish.<name>.default"""
    return getattr(torch.ops.planish, name).default


def used(proto: onnx.ModelProto) -> bool:
    """Whether a graph has planish nodes."""
    return any(n.domain == DOMAIN for n in proto.graph.node)


def low_bit(proto: onnx.ModelProto) -> list[str]:
    """The names of the ops of a graph's planish nodes that compute with codes, sorted."""
    known = fused.ops()
    nodes = (n for n in proto.graph.node if n.domain == DOMAIN)
    return sorted({n.op_type for n in nodes if known[n.op_type].low_bit(call(n))})


def lower(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Replace every planish node, in place, by the nodes that its op's file writes.

    Returns what the user should know of them before anything is written: layers that will be slower than in float, and bytes lost.
    """
    graph = proto.graph
    if not used(proto):
        return ()
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    builder = Builder(graph, constants, taken={v for n in graph.node for v in [*n.input, *n.output]} | set(constants))
    known = fused.ops()
    renamed: dict[str, str] = {}
    domains = {o.domain for o in proto.opset_import}
    for node in list(graph.node):
        node.input[:] = [renamed.get(v, v) for v in node.input]
        if node.domain != DOMAIN:
            builder.nodes.append(node)
            continue
        op, use = known[node.op_type], call(node)
        renamed |= dict(zip(node.output, op.lower(use, builder), strict=True))
        reason = op.slow(use)
        if reason is not None:
            builder.note(use.name, f"slower than in float: {reason}")
        domains |= set(op.domains)
    nodes = [n for n in builder.nodes]
    _restore_outputs(graph, nodes, renamed)
    del graph.node[:]
    graph.node.extend(nodes)
    versions = {o.domain: o.version for o in proto.opset_import if o.domain != DOMAIN}
    del proto.opset_import[:]
    proto.opset_import.extend(helper.make_opsetid(d, versions.get(d, 1)) for d in sorted(domains - {DOMAIN}))
    return together(builder.notes)


def together(notes: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """One line for each text, with the layers that it is about."""
    layers: dict[str, list[str]] = defaultdict(list)
    for layer, text in notes:
        layers[text].append(layer)
    return tuple(f"{listed(names)}: {text}" for text, names in layers.items())


def call(node: onnx.NodeProto) -> Call:
    """A planish node's arguments by the names of its schema."""
    tensors, _ = _arguments(overload(node.op_type)._schema)
    given = {n: v for n, v in zip(tensors, node.input, strict=False) if v}
    return Call(node.name, given, {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute})


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _restore_outputs(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], renamed: dict[str, str]) -> None:
    """The graph's outputs keep their names, whatever the lowering called them."""
    for output in graph.output:
        if output.name in renamed:
            inner = renamed[output.name]
            for node in nodes:
                node.input[:] = [output.name if v == inner else v for v in node.input]
                node.output[:] = [output.name if v == inner else v for v in node.output]


def _arguments(schema: torch.FunctionSchema) -> tuple[list[str], dict[str, str]]:
    """(names of the tensor arguments, type by name of the others)"""
    types = {a.name: str(a.type).removeprefix("Optional[").removesuffix("]") if "Tensor" in str(a.type) else str(a.type) for a in schema.arguments}  # fmt: skip
    return [n for n, t in types.items() if t == "Tensor"], {n: t for n, t in types.items() if t != "Tensor"}


def _translation(op: torch._ops.OpOverload) -> Callable[..., Any]:
    schema = op._schema
    tensors, others = _arguments(schema)
    names = [a.name for a in schema.arguments]
    parameter, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Optional
    results = range(len(schema.returns))
    name = schema.name.partition("::")[2]
    described = defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[parameter(n, f"T{i}", param_option=option) for i, n in enumerate(tensors)],
        outputs=[parameter(f"result{i}", f"R{i}") for i in results],
        type_constraints=[(f"T{i}", TYPES, "") for i in range(len(tensors))] + [(f"R{i}", TYPES, "") for i in results],
        attributes=[defs.OpSchema.Attribute(n, ATTRIBUTES[t], required=False) for n, t in others.items()],
    )
    written = values.Op(values.Opset(DOMAIN, 1), name, described)

    def emit(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return written(*(given.get(n) for n in tensors), **{n: given[n] for n in others if given.get(n) is not None})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    emit.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # pyright: ignore[reportFunctionMemberAccess]
    return emit
