"""Norms as one node, `planish::gpu_norm`; and norm, rotation and rounding to codes as one, `planish::gpu_quantize_tokens`."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..compress import layers
from ..compress.model import Model
from ..kernels.gpu import quantize_tokens
from .gpu_layers import QUANTIZE, call
from .gpu_precision import CASTS

NORM = "planish.gpu_norm"
Y, SUM = 3, 4
"""results of gpu_quantize_tokens: the norm's, and the sum with the residual"""


@dataclass(frozen=True)
class Norm:
    """One norm over the last dimension."""

    node: Node
    """its result"""
    x: Node
    kind: str
    """rms or layer"""
    epsilon: float
    gain: Node | None = None
    shift: Node | None = None
    """constants, as they are stored; None where there is none"""
    added: float = 0.0
    """what is added to the gain (1 in Gemma)"""


def fuse(model: Model) -> int:
    """Write every RMS norm and layer norm over the last dimension as one node, in place; returns how many."""
    module = model.graph
    found = [n for n in (_norm(module, node) for node in list(module.graph.nodes)) if n is not None]
    for norm in found:
        with module.graph.inserting_before(norm.node):
            gain = norm.gain
            if gain is not None and norm.added:
                value = layers.read(module, gain).float() + norm.added
                gain = layers.add_buffer(module, f"{gain.target}_plus_{norm.added:g}".replace(".", "_"), value)
            given = {"x": norm.x, "weight": gain, "bias": norm.shift, "norm": norm.kind, "eps": norm.epsilon}
            made = call(module, "gpu_norm", given)
            y = module.graph.call_function(operator.getitem, (made, 0))
        norm.node.replace_all_uses_with(y)
    layers.drop_unused(module)
    return len(found)


def _norm(module: GraphModule, node: Node) -> Norm | None:
    """The norm that ends in `node`: one op of ATen, or x times the root of its mean square, written out, and perhaps times a gain."""
    if layers.op(node) in ("aten.layer_norm", "aten.rms_norm"):
        gain = layers.argument(node, "weight")
        shift = layers.argument(node, "bias") if layers.op(node) == "aten.layer_norm" else None
        constant = all(p is None or layers.is_parameter(p) for p in (gain, shift))
        if not constant or len(layers.argument(node, "normalized_shape")) != 1:
            return None
        given = layers.argument(node, "eps")
        epsilon = torch.finfo(torch.float32).eps if given is None else float(given)
        kind = "layer" if layers.op(node) == "aten.layer_norm" else "rms"
        return Norm(node, layers.argument(node, "input"), kind, epsilon, _stored(gain), _stored(shift))
    x, epsilon = _root_mean_square(node)
    if x is None:
        return None
    end = node
    while len(end.users) == 1 and layers.op(next(iter(end.users))) in CASTS:
        end = next(iter(end.users))
    user = next(iter(end.users)) if len(end.users) == 1 else node
    if layers.op(user) == "aten.mul":
        other = next((a for a in user.args[:2] if a is not end), None)
        added = 0.0
        if isinstance(other, Node) and layers.op(other) == "aten.add" and isinstance(other.args[1], int | float):
            other, added = other.args[0], float(other.args[1])
        if layers.is_parameter(other) and isinstance(other, Node) and layers.stored(module, other).ndim == 1:
            return Norm(user, x, "rms", epsilon, _stored(other), None, added)
    return Norm(node, x, "rms", epsilon)


def _root_mean_square(node: Node) -> tuple[Node | None, float]:
    """(x, epsilon) where `node` is x rsqrt(mean(x^2) + epsilon) over the last dimension."""
    if layers.op(node) != "aten.mul" or not all(isinstance(a, Node) for a in node.args[:2]):
        return None, 0.0
    root = next((a for a in node.args[:2] if layers.op(a) == "aten.rsqrt"), None)  # pyright: ignore[reportArgumentType]
    x = next((a for a in node.args[:2] if a is not root), None)
    if not isinstance(root, Node) or not isinstance(x, Node):
        return None, 0.0
    mean, epsilon = root.args[0], 0.0
    if isinstance(mean, Node) and layers.op(mean) == "aten.add" and isinstance(mean.args[1], int | float):
        mean, epsilon = mean.args[0], float(mean.args[1])
    if not isinstance(mean, Node) or layers.op(mean) != "aten.mean" or mean.target is not torch.ops.aten.mean.dim:
        return None, 0.0
    power = mean.args[0]
    last = list(mean.args[1]) == [-1] and len(mean.args) > 2 and mean.args[2] is True  # pyright: ignore[reportArgumentType]
    square = isinstance(power, Node) and layers.op(power) == "aten.pow" and power.args == (x, 2)
    return (x, epsilon) if last and square else (None, 0.0)


def _stored(parameter: Node | None) -> Node | None:
    """A parameter itself, without the conversion from 16 bits."""
    return parameter if parameter is None or parameter.op == "get_attr" else parameter.args[0]  # pyright: ignore[reportReturnType]


def fuse_rounding(model: Model) -> int:
    """Share roundings of one tensor, and let them take over the rotation and the norm before them, in place; how many norms they took."""
    module = model.graph
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in [_rotated(n) for n in module.graph.nodes if layers.op(n) == f"planish.{QUANTIZE}"]:
        same = next((o for o in readers[_x(node)] if o.args[1:] == node.args[1:]), None)
        if same is None:
            readers[_x(node)].append(node)
        else:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
    count = sum(_with_norm(model, x, nodes[0]) for x, nodes in readers.items())
    layers.drop_unused(module)
    return count


def _x(node: Node) -> Node:
    x = node.args[0]
    assert isinstance(x, Node)
    return x


def _rotated(node: Node) -> Node:
    """The node with the Hadamard rotation before it, which nothing else reads, as its own."""
    x = _through(_x(node))
    if layers.op(x) != "planish.hadamard" or _count(x) > 1:
        return node
    block, transposed = (layers.argument(x, n) for n in ("block", "transposed"))
    signs = layers.argument(x, "signs")
    if transposed or not quantize_tokens.takes_rotation(block) or not (signs is None or signs.op == "get_attr"):
        return node
    layers.set_argument(node, "x", _through(_x(x)))
    layers.set_argument(node, "block", block)
    layers.set_argument(node, "signs", signs)
    return node


def _through(node: Node) -> Node:
    """What casts read."""
    while layers.op(node) in CASTS:
        node = _x(node)
    return node


def _count(node: Node) -> int:
    """Readers, those behind a cast counted instead of the cast."""
    return sum(_count(u) if layers.op(u) in CASTS else 1 for u in node.users)


def _with_norm(model: Model, y: Node, node: Node) -> bool:
    """Let a rounding compute the norm whose result y it reads; other readers of y get it from there."""
    if y.target is not operator.getitem or y.args[1] != 0 or layers.op(_x(y)) != NORM:
        return False
    norm, graph = _x(y), model.graph.graph
    given = {a.name: layers.argument(norm, a.name) for a in norm.target._schema.arguments}  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
    others = [u for u in y.users if u is not node]
    for name in ("x", "residual", "weight", "bias", "norm", "eps"):
        layers.set_argument(node, name, given[name])
    layers.set_argument(node, "keep", bool(others))
    moved = [u for u in norm.users if u is not y and u.users]
    for constant in [n for n in node.all_input_nodes if n.op == "get_attr"]:
        norm.prepend(constant)
    norm.append(node)  # before everything that reads the norm
    with graph.inserting_after(node):
        for old, index in [(y, Y)] * bool(others) + [(u, SUM) for u in moved]:
            made = graph.call_function(operator.getitem, (node, index))
            old.replace_all_uses_with(made, delete_user_cb=lambda user: user is not node)
    return True
