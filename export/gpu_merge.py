"""Linear layers that read the same tensor, as one: their weights stand below each other, its result is split. q, k and v.

One launch then reads x once, and a short matrix fills the GPU that three would leave half empty. Layers with something behind them
that their epilogue takes over stay alone, and so do gate and up of a gated block, whose product is one: that saves more launches.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..compress import layers
from ..compress.model import Model
from . import gpu_epilogue
from .gpu_precision import described

aten = torch.ops.aten
STACKED = ("weight", "codes", "scale", "zero_point", "outlier_weight", "up", "values", "positions", "bias")
"""tensor arguments with one row for each output; all others must be equal"""


def is_linear(node: Node) -> bool:
    """Whether a node is a linear layer, quantized or not, whose parameters are constants."""
    kind = layers.op(node)
    if kind != "aten.linear" and not kind.startswith("planish.linear"):
        return False
    return all(a.op == "get_attr" or layers.is_parameter(a) for a in node.all_input_nodes if a is not node.args[0])


def merge(model: Model) -> list[tuple[str, ...]]:
    """Merge what can be merged, in place; the names of the layers that became one each time."""
    module, types = model.graph, described(model)
    groups: dict[Hashable, list[Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if is_linear(node):
            groups[node.args[0], node.target, _attributes(node)].append(node)
    found = []
    for group in groups.values():
        tails = [gpu_epilogue.tail(gpu_epilogue.result(n), types) for n in group]
        operands = {o for t in tails if t is not None for o in (t.factor, t.residual)}
        rest = [n for n, t in zip(group, tails, strict=True) if t is None and gpu_epilogue.result(n) not in operands]
        for same in _compatible(module, rest):
            if len(same) > 1:
                found.append(tuple(layers.layer(n) for n in same))
                _merge(module, same, [types[gpu_epilogue.result(n)][1][-1] for n in same])
    layers.drop_unused(module)
    return found


def _attributes(node: Node) -> tuple[Any, ...]:
    """The arguments that are no tensors, by the schema's order."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values = [layers.argument(node, a.name) for a in node.target._schema.arguments if "Tensor" not in str(a.type)]
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _tensors(node: Node) -> dict[str, Node | None]:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments[1:] if "Tensor" in str(a.type)]
    return {n: layers.argument(node, n) for n in names}


def _compatible(module: GraphModule, group: Sequence[Node]) -> list[list[Node]]:
    """The layers sorted into sets that can be one: the first of a set decides."""
    sets: list[list[Node]] = []
    for node in group:
        if layers.op(node).startswith("planish.") or _own(node):
            fitting = next((s for s in sets if _fits(module, s[0], node)), None)
            sets.append([node]) if fitting is None else fitting.append(node)
    return sets


def _own(node: Node) -> bool:
    """Whether nothing else reads a float layer's weight: a copy of a tied one would cost memory."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    return len(weight.users) == 1 and (weight.op == "get_attr" or len(weight.all_input_nodes[0].users) == 1)


def _fits(module: GraphModule, first: Node, other: Node) -> bool:
    ours, theirs = _tensors(first), _tensors(other)
    for name, node in ours.items():
        if (node is None) != (theirs[name] is None):
            return False
        if node is None:
            continue
        a, b = layers.stored(module, node), layers.stored(module, theirs[name])
        if a.dtype != b.dtype or a.shape[1:] != b.shape[1:]:
            return False
        if (name not in STACKED or a.ndim == 0) and not torch.equal(a, b):
            return False
    return layers.op(first) != "planish.linear_codebook" or _whole_blocks(module, first)


def _whole_blocks(module: GraphModule, node: Node) -> bool:
    """Whether no block of codes of one layer reaches into the next layer's when they stand below each other."""
    codes = layers.stored(module, layers.argument(node, "codes"))  # two a byte
    return 2 * codes.numel() % layers.argument(node, "group") == 0


def _merge(module: GraphModule, group: Sequence[Node], sizes: Sequence[int]) -> None:
    """One layer in the place of the first, and a split."""
    graph, first = module.graph, group[0]
    parts = [layers.layer(n) for n in group]
    path = parts[0].rpartition(".")[0]
    name = f"{path}.{'_'.join(p.rpartition('.')[2] for p in parts)}".removeprefix(".")
    assert isinstance(first.target, torch._ops.OpOverload)
    given: dict[str, Any] = {}
    with graph.inserting_before(first):
        for argument in first.target._schema.arguments[1:]:
            values = [layers.argument(n, argument.name) for n in group]
            stacked = argument.name in STACKED and isinstance(values[0], Node)
            if stacked and layers.stored(module, values[0]).ndim:
                tensor = torch.cat([layers.stored(module, v) for v in values])
                given[argument.name] = layers.add_buffer(module, f"{name}.{argument.name}", tensor)
            else:
                given[argument.name] = values[0]
        made = graph.call_function(first.target, (first.args[0], *given.values()))
        several = len(first.target._schema.returns) > 1
        y = graph.call_function(operator.getitem, (made, 0)) if several else made
        split = graph.call_function(aten.split_with_sizes.default, (y, list(sizes), -1))
        pieces = [graph.call_function(operator.getitem, (split, i)) for i in range(len(group))]
        count = graph.call_function(operator.getitem, (made, 1)) if several else None
    for node, piece in zip(group, pieces, strict=True):
        if several:
            for user in list(node.users):
                user.replace_all_uses_with(piece if user.args[1] == 0 else _known(count))
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(piece)
        graph.erase_node(node)


def _known(node: Node | None) -> Node:
    assert node is not None
    return node
