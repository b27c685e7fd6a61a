"""Key/value caches in the traced graph of a causal language model: where a layer's keys and values join the past, and what reads them.

In the cache form (hugging_face.py) a layer has two states, keys and values. Each is an input `past` that one concatenation continues
with the new tokens; the whole is an output and what the layer's attention reads:

    whole = cat([past, new], 2)        past (batch, heads, past, size), new (batch, heads, tokens, size)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from ..common.errors import PlanishError
from ..kernels import kv_cache
from . import attention, layers
from .model import Model

assert kv_cache  # registers planish::kv_cache

OP = "planish.kv_cache"
PAST = ("past_key_", "past_value_")
REPEATS = (
    *("aten.slice", "aten.unsqueeze", "aten.expand", "aten.reshape", "aten.view", "aten.transpose", "aten.permute"),
    *("aten.repeat_interleave", "aten.contiguous", "aten.clone", "aten.to", "aten._to_copy"),
)
"""ops that may stand between a cache and the product that reads it: a head shared by several query heads, and turned keys"""
CASTS = ("aten.to", "aten._to_copy", "aten.dropout", "aten.detach")
"""ops that change no score"""
LONG = 1 << 17
"""window of a model that does not name its own"""
NEVER = -1e4
"""what a mask adds at most where it hides a place"""


@dataclass(frozen=True)
class Stored:
    """The keys or the values of one layer."""

    past: Node
    """input (batch, heads, past, size)"""
    new: Node
    """(batch, heads, tokens, size): what joins the past, behind `planish.kv_cache` where that is there"""
    whole: Node
    """the concatenation (batch, heads, past + tokens, size)"""
    output: int
    """its place among the model's outputs"""
    format: str
    """how `new` was rounded: 'int8', 'e4m3', or 'none'"""
    heads: int
    size: int


@dataclass(frozen=True)
class Cached:
    """One layer's cache."""

    name: str
    """of its states: '3' for past_key_3"""
    key: Stored
    value: Stored


@dataclass(frozen=True)
class Attending:
    """The attention that reads a cache: softmax(query keys^T * scale + mask) values, causal."""

    query: Node
    """(batch, query heads, tokens, size)"""
    mixed: Node
    """(batch, query heads, tokens, size): its result"""
    mask: Node
    """causal, so that whoever knows the sizes needs it no more"""
    scale: float


@dataclass(frozen=True)
class Mask:
    """What is added to the scores, or which places they may see."""

    node: Node
    """(..., tokens, past + tokens)"""
    hides: bool
    """whether true hides a place; else it shows one"""


def find(model: Model) -> list[Cached]:
    """The cache of every layer in the order of the inputs; empty for a model without states that are called past_key_….

    Raises PlanishError for a state that is not continued by one concatenation that is an output.
    """
    graph = model.graph.graph
    leaves = tree_leaves(graph.output_node().args)
    inputs = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    described = {i.name: i for i in model.inputs if i.state}
    found = []
    for name in described:
        if not name.startswith(PAST[0]):
            continue
        own = name.removeprefix(PAST[0])
        pair = [f"{kind}{own}" for kind in PAST]
        if pair[1] not in described:
            raise PlanishError(f"'{model.source}' has the state '{name}' without '{pair[1]}'")
        sides = [_stored(inputs[n], described[n].shape, leaves, model.source) for n in pair]
        found.append(Cached(own, *sides))
    return found


def _stored(past: Node, shape: Sequence[int], leaves: Sequence[Any], source: str) -> Stored:
    """What continues the state `past`."""
    joins = [
        n for n in past.users if layers.op(n) == "aten.cat" and n in leaves and layers.argument(n, "dim") in (2, -2)
    ]
    parts = layers.argument(joins[0], "tensors") if len(joins) == 1 else []
    if len(parts) != 2 or parts[0] is not past:
        raise PlanishError(
            f"'{source}': the state '{past.target}' is not continued by a concatenation that is an output"
        )
    new = parts[1]
    form = str(layers.argument(new, "format")) if layers.op(new) == OP else "none"
    return Stored(past, new, joins[0], leaves.index(joins[0]), form, shape[1], shape[3])


def attention_of(model: Model, cached: Cached) -> Attending:
    """The attention that reads a layer's cache. Raises PlanishError where there is none, or one that is not plainly causal."""
    where = f"'{model.source}', layer {cached.name}"
    readers = [a for a in attention.find(model.graph) if _reads(a.mixed, cached.value.whole)]
    if len(readers) != 1:
        raise PlanishError(f"{where}: {len(readers)} attentions read its values; one is expected")
    (item,) = readers
    key, mask, scale = _fused(item.mixed, where) if item.softmax is None else _written(item.softmax, where)
    if _source(key) is not cached.key.whole:
        raise PlanishError(f"{where}: the attention that reads its values reads other keys")
    if mask is None or not _causal(model, mask):
        raise PlanishError(f"{where}: its mask is not the causal one over past and new tokens")
    return Attending(item.query, item.mixed, mask.node, scale)


def _source(node: Node) -> Node:
    """What a node repeats, reshapes or turns."""
    while layers.op(node) in REPEATS:
        node = node.all_input_nodes[0]
    return node


def _reads(mixed: Node, whole: Node) -> bool:
    """Whether an attention's values are the cache."""
    value = layers.argument(mixed, "value") if layers.op(mixed) == attention.FUSED else mixed.args[1]
    return isinstance(value, Node) and _source(value) is whole


def _fused(node: Node, where: str) -> tuple[Node, Mask | None, float]:
    """Keys, mask and scale of a fused attention."""
    if layers.argument(node, "is_causal") or layers.argument(node, "dropout_p"):
        raise PlanishError(f"{where}: an attention that is causal from its first key on, or drops out, has no cache")
    query, key, mask, scale = (layers.argument(node, n) for n in ("query", "key", "attn_mask", "scale"))
    size = query.meta["val"].shape[-1]
    return key, None if mask is None else Mask(mask, False), float(size**-0.5 if scale is None else scale)


def _written(softmax: Node, where: str) -> tuple[Node, Mask | None, float]:
    """Keys, mask and scale of an attention that is written out, from the softmax backwards."""
    node, mask, scale = softmax.args[0], None, 1.0
    while isinstance(node, Node) and layers.op(node) not in attention.PRODUCT:
        kind, (first, second) = layers.op(node), (*node.args, None, None)[:2]
        if kind == "aten.mul" and isinstance(second, int | float):
            scale *= second
        elif kind == "aten.div" and isinstance(second, int | float):
            scale /= second
        elif kind in ("aten.add", "aten.masked_fill") and mask is None and isinstance(second, Node):
            mask = Mask(second, kind == "aten.masked_fill")
        elif kind not in CASTS:
            raise PlanishError(
                f"{where}: '{node.name}' ({kind or node.op}) stands between its scores and their softmax"
            )
        node = first
    if not isinstance(node, Node) or not isinstance(node.args[1], Node):
        raise PlanishError(f"{where}: its scores are no matrix product")
    return node.args[1], mask, scale


def _causal(model: Model, mask: Mask) -> bool:
    """Whether a mask hides exactly the tokens behind each query's own: several new tokens behind a short past and behind none, and one
    at the end of the model's window, where an attention to the nearest tokens alone would differ.
    """
    window = model.text.window if model.text is not None else LONG
    return all(_hides_the_future(model, mask, past, new) for past, new in ((3, 5), (0, 4), (max(window, 2) - 1, 1)))


def _hides_the_future(model: Model, mask: Mask, past: int, new: int) -> bool:
    """The same for `new` tokens behind `past` ones."""
    value = _of_sizes(model, mask.node, past, new)
    seen = torch.arange(past + new) <= torch.arange(past, past + new)[:, None]  # (new, past + new)
    if value is None or value.shape[-2:] != seen.shape:
        return False
    value = value.cpu()  # a program that was moved makes its mask on its own device
    if value.dtype == torch.bool:
        return bool((value == (seen ^ mask.hides)).all())
    return bool((value.masked_fill(~seen, 0.0) == 0).all() and (value.masked_fill(seen, NEVER) <= NEVER).all())


def _of_sizes(model: Model, node: Node, past: int, new: int) -> torch.Tensor | None:
    """The node's value with these sizes; None where it depends on the values of inputs."""
    needed, waiting = set[Node](), [node]
    while waiting:
        item = waiting.pop()
        if item not in needed:
            needed.add(item)
            waiting += item.all_input_nodes
    values: dict[Node, Any] = {}
    described = {i.name: i for i in model.inputs}
    for item in model.graph.graph.nodes:
        if item not in needed:
            continue
        if item.op == "placeholder":
            if any(u in needed and layers.op(u) != "aten.sym_size" for u in item.users):
                return None
            given = described[str(item.target)]
            size = past if given.state else new
            shape = [size if given.dim(i) else d for i, d in enumerate(given.shape)]
            values[item] = torch.empty(shape, dtype=given.dtype)
        elif item.op == "get_attr":
            values[item] = layers.read(model.graph, item)
        else:
            args, kwargs = map_arg((item.args, item.kwargs), values.__getitem__)
            values[item] = item.target(*args, **kwargs)
    return values[node] if isinstance(values[node], torch.Tensor) else None
