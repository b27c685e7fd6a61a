"""Norms as one node, `planish::gpu_norm`; and norm, rotation and rounding to codes as one, `planish::gpu_quantize_tokens`."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch.fx import Node

from ..compress import layers, stream
from ..compress.model import Model
from ..kernels.gpu import quantize_tokens
from .gpu_layers import QUANTIZE, call
from .gpu_precision import CASTS

NORM = "planish.gpu_norm"
Y, SUM = 3, 4
"""results of gpu_quantize_tokens: the norm's, and the sum with the residual"""


def fuse(model: Model) -> int:
    """Write every RMS norm and layer norm over the last dimension as one node, in place; returns how many."""
    module = model.graph
    found = stream.norms(model, layers.shapes(model, 2))
    for norm in found:
        with module.graph.inserting_before(norm.node):
            gain, shift = (p if p is None or p.op == "get_attr" else p.args[0] for p in (norm.gain, norm.shift))
            given = {"x": norm.stream, "weight": gain, "bias": shift, "norm": "layer" if norm.centred else "rms"}
            made = call(module, "gpu_norm", {**given, "eps": _epsilon(norm.node)})
            y = module.graph.call_function(operator.getitem, (made, 0))
        norm.node.replace_all_uses_with(y)
    layers.drop_unused(module)
    return len(found)


def _epsilon(node: Node) -> float:
    """What a norm adds to the mean square: an argument, or what stands below the root."""
    if layers.op(node) in ("aten.layer_norm", "aten.rms_norm"):
        given = layers.argument(node, "eps")
        return torch.finfo(torch.float32).eps if given is None else float(given)
    waiting = [node]
    while waiting:
        node = waiting.pop(0)
        if layers.op(node) == "aten.rsqrt":
            inside = node.args[0]
            assert isinstance(inside, Node)
            return float(inside.args[1]) if layers.op(inside) == "aten.add" else 0.0  # pyright: ignore[reportArgumentType]
        waiting += node.all_input_nodes
    return 0.0


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
    with graph.inserting_after(node):
        for old, index in [(y, Y)] * bool(others) + [(u, SUM) for u in moved]:
            made = graph.call_function(operator.getitem, (node, index))
            old.replace_all_uses_with(made, delete_user_cb=lambda user: user is not node)
    return True
