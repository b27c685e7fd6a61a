"""The way of the values through attention: from the linear that makes them, through the heads, to the linear that joins these.

What attention mixes are whole vectors of one head, so a rotation of a head's channels passes it: the rows of the first linear and
the columns of the second may be rotated against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from . import attention, layers, stream
from .model import Model


@dataclass(frozen=True)
class Values:
    """One attention's values."""

    name: str
    value: Node
    """the linear whose output (..., groups * size) is the values"""
    joined: Node
    """the linear that reads (..., heads * size)"""
    size: int
    """channels of a head"""
    states: tuple[str, ...]
    """names of the model's inputs that carry earlier values"""


def find(model: Model) -> list[Values | str]:
    """For every attention its values, or why they cannot be rotated."""
    sizes = layers.shapes(model, 2)
    return [_values(found, sizes) for found in attention.find(model.graph)]


def _values(found: attention.Attention, sizes: Mapping[Node, tuple[int, ...]]) -> Values | str:
    mixed = found.mixed
    value = layers.argument(mixed, "value") if layers.op(mixed) == attention.FUSED else mixed.args[1]
    assert isinstance(value, Node)
    size = sizes[value][-1]
    way: set[Node] = {mixed}
    states: list[str] = []
    source = _source(value, size, sizes, way, states)
    if isinstance(source, str):
        return f"{found.name}: {source}"
    joined = _joined(mixed, size, sizes, way)
    if isinstance(joined, str):
        return f"{found.name}: {joined}"
    for node in way - {mixed}:
        strangers = [
            u.name for u in node.users if u not in way and u is not joined and layers.op(u) not in stream.SILENT and u.op != "output"
        ]  # fmt: skip
        if strangers:
            return f"{found.name}: the values are read by '{strangers[0]}' too"
    if any(u.op == "output" for n in way for u in n.users) and not states:
        return f"{found.name}: the values are an output of the model"
    return Values(found.name, source, joined, size, tuple(states))


def _source(
    value: Node, size: int, sizes: Mapping[Node, tuple[int, ...]], way: set[Node], states: list[str]
) -> Node | str:
    """The linear behind the values; notes the nodes between and the states that join on the way."""
    pending, found = [value], None
    while pending:
        node = pending.pop()
        way.add(node)
        if node.op == "placeholder":
            states.append(str(node.target))
        elif layers.op(node) == "aten.linear" and layers.is_parameter(node.args[1]):
            if found not in (None, node):
                return "they come from more than one linear"
            found = node
        elif stream.keeps_vectors(node, sizes):
            pending += stream.operands(node)
        elif layers.op(node) in ("aten.view", "aten.reshape", "aten.unflatten") and _splits(node, size, sizes):
            pending.append(node.args[0])  # pyright: ignore[reportArgumentType]
        else:
            return f"they come from '{node.name}' ({layers.op(node) or node.op})"
    if found is None:
        return "no linear makes them"
    return found


def _splits(node: Node, size: int, sizes: Mapping[Node, tuple[int, ...]]) -> bool:
    """Whether (..., groups * size) becomes (..., groups, size)."""
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = sizes[source], sizes[node]
    return (
        len(after) > 1 and after[-1] == size and before[-1] == after[-2] * size and layers.op(source) == "aten.linear"
    )


def _joined(mixed: Node, size: int, sizes: Mapping[Node, tuple[int, ...]], way: set[Node]) -> Node | str:
    """The linear behind the heads."""
    node, split = mixed, True
    while True:
        users = [u for u in node.users if layers.op(u) not in stream.SILENT]
        if len(users) != 1:
            return "its output has more than one reader"
        before, node = node, users[0]
        if layers.op(node) == "aten.linear" and node.args[0] is before and layers.is_parameter(node.args[1]):
            return (
                "its heads are not joined" if split and sizes[before][-1] == size and _several(before, sizes) else node
            )
        merges = layers.op(node) in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten") and split
        if merges and sizes[before][-1] == size and sizes[node][-1] == sizes[before][-2] * size:
            split = False
        elif not stream.keeps_vectors(node, sizes):
            return f"'{node.name}' ({layers.op(node) or node.op}) reads its output"
        way.add(node)


def _several(node: Node, sizes: Mapping[Node, tuple[int, ...]]) -> bool:
    """Whether there is more than one head."""
    return len(sizes[node]) == 4 and sizes[node][-2] > 1
