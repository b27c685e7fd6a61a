"""Attention in the traced graph: where it is, what it reads, and its fused form written out.

Attention is softmax(q k^T * scale + mask) v, either as one aten.scaled_dot_product_attention or as matmul, softmax, matmul.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..common.errors import PlanishError, listed
from . import layers
from .model import Model
from .passes import matches

aten = torch.ops.aten
FUSED = "aten.scaled_dot_product_attention"
SOFTMAX = ("aten.softmax", "aten._softmax")
CHECK = "aten._assert_tensor_metadata"
"""reads a tensor's type and no value"""
PRODUCT = ("aten.matmul", "aten.bmm")
MOVES = (
    *("aten.transpose", "aten.permute", "aten.reshape", "aten.view", "aten.flatten", "aten._unsafe_view"),
    *("aten.contiguous", "aten.clone", "aten.dropout", "aten.to", "aten._to_copy", "aten.squeeze", "aten.unsqueeze"),
)
"""ops that may stand between attention and its output projection"""
SCALING = (
    *("aten.mul", "aten.div", "aten.add", "aten.sub", "aten.masked_fill", "aten.where", "aten.maximum", "aten.clamp"),
    *("aten.to", "aten._to_copy", "aten.view", "aten.reshape", "aten.tanh"),
)
"""ops that may stand between the scores and the softmax"""


@dataclass(frozen=True)
class Attention:
    """One attention."""

    name: str
    """'layers.3.self_attn': the output projection's name without its last part; the mixing node's name where there is none"""
    softmax: Node | None
    """None while it is fused"""
    query: Node
    """(batch, heads, length, size)"""
    mixed: Node
    """(batch, heads, length, size), what the heads give"""
    projection: Node | None
    """the linear layer that joins the heads"""


def find(module: GraphModule) -> list[Attention]:
    """Every attention of the graph, in order."""
    found = []
    for node in module.graph.nodes:
        if layers.op(node) == FUSED:
            query = node.args[0]
            assert isinstance(query, Node)
            found.append(_named(None, query, node))
        elif layers.op(node) in SOFTMAX:
            mixed, scores = _mixing(node), _scores(node)
            if mixed is not None and scores is not None:
                query = scores.args[0]
                assert isinstance(query, Node)
                found.append(_named(node, query, mixed))
    return found


def chosen(model: Model, method: str, patterns: Sequence[str]) -> list[Attention]:
    """The attentions whose names match. Raises PlanishError for a model without any, and for a glob that matches none."""
    found = find(model.graph)
    names = [a.name for a in found]
    if not found:
        raise PlanishError(f"{method}: '{model.source}' has no attention (softmax between two matrix products)")
    for pattern in patterns:
        if not any(matches(n, [pattern]) for n in names):
            raise PlanishError(f"{method}: '{pattern}' matches no attention; there are {listed(names, 6)}")
    return [a for a in found if matches(a.name, patterns)]


def describe(model: Model) -> None:
    """Note shape and type of every node's value (`meta["val"]`), where a pass has added nodes without."""
    if all("val" in n.meta for n in model.graph.graph.nodes if n.op == "call_function"):
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        FakeTensorProp(model.graph, mode).propagate(*model.example())


def input_of(attention: Attention) -> Node | None:
    """The block input x (batch, length, width) that the queries are made from; None when no linear layer makes them."""
    waiting, seen = [attention.query], set[Node]()
    while waiting:
        node = waiting.pop(0)
        if layers.op(node) == "aten.linear" or layers.op(node).startswith("planish.linear"):
            source = node.args[0]
            assert isinstance(source, Node)
            return source
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return None


def decompose(module: GraphModule, attention: Attention) -> Attention:
    """Write a fused attention out as matmul, softmax, matmul, in place; one that is written out is returned as it is.

    Every node must know its value's shape and type (`describe`). A row of a boolean mask that allows nothing gives the mean of all values, where the fused op gives zeros; such rows are padding.
    """
    if attention.softmax is not None:
        return attention
    node, graph = attention.mixed, module.graph
    query, key, value = (layers.argument(node, n) for n in ("query", "key", "value"))
    mask, scale = layers.argument(node, "attn_mask"), layers.argument(node, "scale")
    with graph.inserting_before(node):
        if layers.argument(node, "enable_gqa"):
            key, value = (_shared(graph, query, x) for x in (key, value))
        scale = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale
        scaled = graph.call_function(aten.mul.Tensor, (query, scale))
        turned = graph.call_function(aten.transpose.int, (key, -2, -1))
        scores = graph.call_function(aten.matmul.default, (scaled, turned))  # (batch, heads, length, seen)
        causal = bool(layers.argument(node, "is_causal"))
        if causal:
            mask = _causal(graph, query, key)
        if causal or (mask is not None and mask.meta["val"].dtype == torch.bool):
            hidden = graph.call_function(aten.logical_not.default, (mask,))
            scores = graph.call_function(aten.masked_fill.Scalar, (scores, hidden, torch.finfo(torch.float32).min))
        elif mask is not None:
            scores = graph.call_function(aten.add.Tensor, (scores, mask))
        softmax = graph.call_function(aten.softmax.int, (scores, -1))
        mixed = graph.call_function(aten.matmul.default, (softmax, value))
    mixed.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(mixed)
    graph.erase_node(node)
    return Attention(attention.name, softmax, query, mixed, attention.projection)


def _named(softmax: Node | None, query: Node, mixed: Node) -> Attention:
    projection = _projection(mixed)
    name = mixed.name if projection is None else layers.layer(projection).rpartition(".")[0]
    return Attention(name or mixed.name, softmax, query, mixed, projection)


def _projection(mixed: Node) -> Node | None:
    """The linear layer behind the heads' outputs, through ops that only move values; a gate's product too."""
    node = mixed
    while True:
        users = [u for u in node.users if layers.op(u) not in ("", CHECK)]
        if len(users) != 1:
            return None
        node = users[0]
        if layers.op(node) == "aten.linear" or layers.op(node).startswith("planish.linear"):
            return node
        if layers.op(node) not in (*MOVES, "aten.mul"):
            return None


def _mixing(softmax: Node) -> Node | None:
    """The matrix product that the softmax weights, None when there is none."""
    node = softmax
    while len(users := [u for u in node.users if layers.op(u) != CHECK]) == 1:
        node, before = users[0], node
        if layers.op(node) in PRODUCT:
            return node if node.args[0] is before else None
        if layers.op(node) not in (*MOVES, *SCALING):
            return None
    return None


def _scores(softmax: Node) -> Node | None:
    """The matrix product that gives the scores, through scaling and masks; None when there is none."""
    waiting = list(softmax.all_input_nodes)
    for node in _walk(waiting):
        if layers.op(node) in PRODUCT:
            return node
    return None


def _walk(waiting: list[Node]) -> Iterator[Node]:
    """Nodes from the softmax backwards as far as scaling and masking reach, nearest first."""
    seen = set[Node]()
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        yield node
        if layers.op(node) in SCALING:
            waiting += node.all_input_nodes


def _causal(graph: Graph, query: Node, key: Node) -> Node:
    """(length, seen) bool: each query sees the keys up to its own place, counted from the first."""
    length, seen = (graph.call_function(aten.sym_size.int, (x, -2)) for x in (query, key))
    rows, columns = (graph.call_function(aten.arange.default, (n,)) for n in (length, seen))
    place = graph.call_function(aten.unsqueeze.default, (rows, 1))
    return graph.call_function(aten.le.Tensor, (columns, place))


def _shared(graph: Graph, query: Node, shared: Node) -> Node:
    """A key or value (batch, groups, seen, size) once for every query head."""
    heads, groups = (x.meta["val"].shape[1] for x in (query, shared))
    if heads == groups:
        return shared
    return graph.call_function(aten.repeat_interleave.self_int, (shared, heads // groups, 1))
