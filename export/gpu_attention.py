"""Attention that is written out as matmul, softmax, matmul, as one aten.scaled_dot_product_attention: scores never reach memory."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..compress import attention, layers
from ..compress.model import Model
from .gpu_precision import CASTS, Types, described

aten = torch.ops.aten
NEUTRAL = (*CASTS, "aten.dropout", "aten.alias", "aten.contiguous", "aten.clone")


def fuse(model: Model) -> int:
    """Replace each attention that is plainly softmax(q k^T * scale + mask) v, in place; how many."""
    types = described(model)
    found = [a for a in attention.find(model.graph) if a.softmax is not None]
    count = sum(_fuse(model, a, types) for a in found)
    layers.drop_unused(model.graph)
    return count


def _fuse(model: Model, found: attention.Attention, types: Types) -> bool:
    graph, softmax, mixed = model.graph.graph, found.softmax, found.mixed
    assert softmax is not None
    probabilities, value = mixed.args[:2]
    while isinstance(probabilities, Node) and layers.op(probabilities) in NEUTRAL and _alone(probabilities):
        probabilities = probabilities.args[0]
    rank = len(types[softmax][1])
    if (
        probabilities is not softmax
        or not _alone(softmax)
        or rank != 4
        or layers.argument(softmax, "dim") not in (-1, rank - 1)
    ):
        return False
    scores, scale, mask = softmax.args[0], 1.0, None
    assert isinstance(scores, Node)
    if layers.op(scores) == "aten.add" and _alone(scores):
        first, second = scores.args[:2]
        scores, mask = (first, second) if _is_scores(first) else (second, first)
    while isinstance(scores, Node) and layers.op(scores) in ("aten.mul", "aten.div") and _alone(scores):
        factor = scores.args[1]
        if not isinstance(factor, int | float):
            return False
        scale = scale * factor if layers.op(scores) == "aten.mul" else scale / factor
        scores = scores.args[0]
    if not isinstance(scores, Node) or layers.op(scores) != "aten.matmul" or not _alone(scores):
        return False
    query, turned = scores.args[:2]
    if (
        not (isinstance(query, Node) and isinstance(turned, Node) and isinstance(value, Node))
        or len(types[query][1]) != 4
    ):
        return False
    if not (mask is None or (isinstance(mask, Node) and mask in types and types[mask][0].is_floating_point)):
        return False
    with graph.inserting_before(mixed):
        if layers.op(turned) == "aten.transpose" and {int(d) % rank for d in turned.args[1:3]} == {2, 3}:  # pyright: ignore[reportArgumentType]
            key = turned.args[0]
        else:
            key = graph.call_function(aten.transpose.int, (turned, -2, -1))
        made = graph.call_function(
            aten.scaled_dot_product_attention.default, (query, key, value, mask), {"scale": scale}
        )
    mixed.replace_all_uses_with(made)
    return True


def _is_scores(node: object) -> bool:
    """Whether a summand is the scores rather than the mask: a product behind scaling."""
    while isinstance(node, Node) and layers.op(node) in ("aten.mul", "aten.div"):
        node = node.args[0]
    return isinstance(node, Node) and layers.op(node) == "aten.matmul"


def _alone(node: Node) -> bool:
    return len(node.users) == 1
