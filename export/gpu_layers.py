"""The planish ops of a graph as their GPU forms: `planish::linear_x` with the definition's constants becomes `planish::gpu_linear_x` with packed ones."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..compress import layers
from ..compress.model import Model
from ..kernels.gpu import op as gpu
from ..kernels.gpu.core import Core
from ..kernels.gpu.op import Layer, Packed, Split

QUANTIZE = "gpu_quantize_tokens"
UNUSED = {"residual": None, "weight": None, "bias": None, "smooth": None, "signs": None, "norm": "", "eps": 0.0, "block": 0, "keep": False}  # fmt: skip
"""arguments of gpu_quantize_tokens that only quantizes"""
APART = ("planish.hadamard", "planish.kv_cache", "planish.quantize")
"""planish ops that are no layers of their own"""
PAIR = "static integers (quantize/dequantize pairs) are not fused here; --format onnx runs them, or compress with w8-dynamic"


@dataclass(frozen=True)
class Sorted:
    """The planish nodes of a graph."""

    fused: Mapping[Node, Layer]
    """those that a GPU form takes"""
    left: tuple[tuple[str, str], ...]
    """(layer, why it stays in PyTorch's ops)"""


def overload(name: str) -> torch._ops.OpOverload:
    """torch.ops.planish.<name>.default"""
    return getattr(torch.ops.planish, name).default


def is_gpu(node: Node) -> bool:
    """Whether a node is the GPU form of an op."""
    return layers.op(node).startswith("planish.gpu_")


def sort(model: Model, core: Core) -> Sorted:
    """Which planish ops have a kernel on this core."""
    kinds = gpu.ops()
    fused: dict[Node, Layer] = {}
    left: list[tuple[str, str]] = []
    for node in model.graph.graph.nodes:
        kind = layers.op(node)
        if not kind.startswith("planish.") or is_gpu(node) or kind in APART:
            continue
        name = kind.removeprefix("planish.")
        if name == "dequantize":  # the pair of an activation belongs to the layer whose weight has one too
            if isinstance(node.args[0], Node) and node.args[0].op == "get_attr":
                left.append((_owner(node.args[0]), PAIR))
            continue
        layer = described(model.graph, node)
        reason = kinds[name].refuses(layer, core) if name in kinds else f"there is no GPU kernel for {name} yet"
        if reason is None and len(_returns(f"gpu_{name}")) < sum(bool(u.users) for u in _parts(node)):
            reason = "its counter is read"
        if reason is None:
            fused[node] = layer
        else:
            left.append((layer.name, reason))
    return Sorted(fused, tuple(left))


def _owner(codes: Node) -> str:
    """The layer whose weight has these codes."""
    return str(codes.target).rpartition(".")[0] or str(codes.target)


def unfused(model: Model) -> tuple[tuple[str, str], ...]:
    """(node, reason) of rotations that no rounding has taken over: where none follows, and in blocks that are no power of two."""
    rotations = (n for n in model.graph.graph.nodes if layers.op(n) == "planish.hadamard")
    return tuple(
        (n.name, f"no kernel takes over its rotation in blocks of {layers.argument(n, 'block')}") for n in rotations
    )


def described(module: GraphModule, node: Node) -> Layer:
    """The layer of a planish node."""
    assert isinstance(node.target, torch._ops.OpOverload)
    tensors: dict[str, torch.Tensor] = {}
    attributes: dict[str, Any] = {}
    for argument in node.target._schema.arguments:
        value = layers.argument(node, argument.name)
        if "Tensor" not in str(argument.type):
            attributes[argument.name] = value
        elif isinstance(value, Node) and layers.is_parameter(value):
            tensors[argument.name] = layers.stored(module, value)
    return Layer(layers.op(node).removeprefix("planish."), layers.layer(node), tensors, attributes)


def pack(model: Model, fused: Mapping[Node, Layer], core: Core, dtype: torch.dtype) -> None:
    """Replace the nodes, in place. Their x has 16 bits already."""
    kinds = gpu.ops()
    for node, layer in fused.items():
        packed = kinds[layer.op].pack(layer, core)
        with model.graph.graph.inserting_before(node):
            made = _written(model.graph, node, layer, packed, dtype)
        if len(_returns(layers.op(made).removeprefix("planish."))) == 1:
            for part in _parts(node):
                part.replace_all_uses_with(made)
                if part is not node:
                    model.graph.graph.erase_node(part)
        else:
            node.replace_all_uses_with(made)
        model.graph.graph.erase_node(node)
    layers.drop_unused(model.graph)


def _written(module: GraphModule, node: Node, layer: Layer, packed: Packed, dtype: torch.dtype) -> Node:
    """The node, or the two nodes, of a packed layer, at the insert point."""
    stored = {n: layers.add_buffer(module, f"{layer.name}.{n}", t) for n, t in packed.tensors.items()}
    if "bias" in layer.tensors:
        stored["bias"] = layers.add_buffer(module, f"{layer.name}.bias", layer.tensors["bias"].to(dtype))
    if packed.split is not None:
        return _two(module, node.args[0], packed.split, stored, dtype)
    assert isinstance(node.target, torch._ops.OpOverload)
    computed = {a.name: layers.argument(node, a.name) for a in node.target._schema.arguments if "Tensor" in str(a.type)}
    computed = {n: v for n, v in computed.items() if n not in layer.tensors}
    return call(module, f"gpu_{layer.op}", {**computed, **stored, **packed.attributes})


def _two(module: GraphModule, x: Any, split: Split, stored: Mapping[str, Node], dtype: torch.dtype) -> Node:
    codes = call(module, QUANTIZE, {**UNUSED, **split.quantize, "x": x})
    parts = [module.graph.call_function(operator.getitem, (codes, i)) for i in range(3)]
    zero = {"token_zero": parts[2]} if split.quantize.get("group") == -1 else {}
    tensors = {n: stored[n] for n in split.tensors if n in stored} | {n: v for n, v in stored.items() if n == "bias"}
    given = {"codes": parts[0], "token_scale": parts[1], **zero, "dtype": str(dtype).removeprefix("torch.")}
    return call(module, f"gpu_{split.product}", {**given, **tensors, **split.attributes})


def call(module: GraphModule, name: str, given: Mapping[str, Any]) -> Node:
    """A planish node from arguments by name, at the insert point; what is missing is absent, or no activation."""
    schema = overload(name)._schema
    missing = {"activation": ""}
    return module.graph.call_function(overload(name), tuple(given.get(a.name, missing.get(a.name)) for a in schema.arguments))  # fmt: skip


def _returns(name: str) -> Any:
    return overload(name)._schema.returns


def _parts(node: Node) -> list[Node]:
    """The results of a node: itself, or the nodes that pick one of several."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return [node] if len(node.target._schema.returns) == 1 else [u for u in node.users if u.target is operator.getitem]
