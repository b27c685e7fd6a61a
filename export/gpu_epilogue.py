"""What stands behind a linear layer and can be the end of its kernel: y = activation(z + bias) * factor + residual.

Only where nothing else reads what lies between, and where factor and residual have the shape of y.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compress import layers
from ..compress.model import Model
from .gpu_precision import FLOATS, Types, described

PLAIN = {"aten.relu": "relu", "aten.silu": "silu"}
GELU = {"none": "gelu", "tanh": "gelu_tanh"}


@dataclass
class Tail:
    """What the end of a kernel takes over."""

    bias: Node | None = None
    activation: str = ""
    factor: Node | None = None
    residual: Node | None = None
    nodes: list[Node] = field(default_factory=list)
    """in order; the last gives y"""


def result(node: Node) -> Node:
    """What carries a linear layer's y: the node, or where it gives a count beside y, the node that picks y."""
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), node)


def tail(node: Node, types: Types, biased: bool = False) -> Tail | None:
    """The nodes behind a linear layer's result `node` that its epilogue can take over; None where there is none.

    `biased`: the layer has a bias already.
    """
    found, last = Tail(), node
    while len(last.users) == 1:
        user = next(iter(last.users))
        if not _take(found, last, user, types, biased):
            break
        found.nodes.append(user)
        last = user
    return found if found.nodes else None


def _take(found: Tail, before: Node, user: Node, types: Types, biased: bool) -> bool:
    """Whether `user` is the next part; notes it."""
    kind = layers.op(user)
    if user not in types or types[user][1] != types[before][1]:
        return False
    if not found.nodes[1 if found.bias else 0 :] and (kind in PLAIN or kind == "aten.gelu"):
        found.activation = PLAIN.get(kind) or GELU[layers.argument(user, "approximate")]
        return True
    if kind not in ("aten.mul", "aten.add") or found.residual is not None:
        return False
    if kind == "aten.add" and layers.argument(user, "alpha") != 1:
        return False
    other = _other(before, user)
    if other is None or other not in types or types[other][0] not in FLOATS:
        return False
    whole = types[other][1] == types[before][1]
    if kind == "aten.mul":
        if found.factor is not None or not whole:
            return False
        found.factor = other
    elif whole:
        found.residual = other
    elif found.nodes or biased or other.op != "get_attr" or types[other][1] != types[before][1][-1:]:
        return False
    else:
        found.bias = other
    return True


def _other(before: Node, user: Node) -> Node | None:
    """The other operand of a sum or product of two tensors."""
    a, b = user.args[:2]
    other = b if a is before else a
    return other if isinstance(other, Node) and other is not before else None


def fuse(model: Model) -> int:
    """Move what stands behind the GPU forms of linear layers into them, in place; the number of nodes that it took over."""
    graph, types = model.graph.graph, described(model)
    place = {n: i for i, n in enumerate(graph.nodes)}
    count = 0
    for node in [n for n in graph.nodes if takes_tail(n)]:
        results = [u for u in node.users if u.target is operator.getitem]  # y, and a count that some give beside it
        y = result(node)
        found = tail(y, types, layers.argument(node, "bias") is not None)
        if found is None:
            continue
        last, others = found.nodes[-1], [u for u in results if u is not y]
        if any(place[reader] < place[last] for u in others for reader in u.users):
            continue  # the node moves to the end of its tail, behind what reads the count
        made = _moved(graph, node, found)
        with graph.inserting_after(made):
            parts = {u: graph.call_function(operator.getitem, (made, u.args[1])) for u in results}
        types[parts.get(y, made)] = types[last]
        place[made] = place[last]
        last.replace_all_uses_with(parts.get(y, made))
        for old in others:
            old.replace_all_uses_with(parts[old])
        for old in dict.fromkeys([*reversed(found.nodes), *results, node]):
            graph.erase_node(old)
        count += len(found.nodes)
    layers.drop_unused(model.graph)
    return count


def _moved(graph: Graph, node: Node, found: Tail) -> Node:
    """The layer with its tail, where that ends: all that it reads is known there."""
    values: dict[str, Any] = {n: getattr(found, n) for n in ("activation", "factor", "residual")}
    values |= {} if found.bias is None else {"bias": found.bias}
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    with graph.inserting_before(found.nodes[-1]):
        return graph.call_function(
            node.target, tuple(values[n] if n in values else layers.argument(node, n) for n in names)
        )


def takes_tail(node: Node) -> bool:
    """Whether a node is the GPU form of a linear layer, which ends in the epilogue, and has none yet."""
    if not layers.op(node).startswith("planish.gpu_"):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    return {a.name for a in node.target._schema.arguments} >= {"bias", "factor", "residual", "activation"}
