"""What the C layout makes free: transposes at the borders, flattening before a fully connected layer, dead nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..kernels import layout
from ..kernels.layout import CHANNELS_FIRST, CHANNELS_LAST
from ..kernels.op import Node, Tensor
from . import views
from .graph import Graph, Port


@dataclass(frozen=True)
class Moved:
    """How a tensor came from another by data movement."""

    type: str
    """ONNX op type"""
    source: Tensor
    axes: tuple[int, ...] | None
    """of a Transpose"""
    pads: list[int] | None
    """of a Pad with a constant: begins, then ends"""
    value: float
    """real value that a Pad fills in"""


def simplify(graph: Graph, moved: Mapping[str, Moved]) -> Graph:
    """The same function with less to run. `moved` tells of tensors that were made by data movement, by name."""
    graph = replace(graph, outputs=tuple(_output(p, moved) for p in graph.outputs))
    graph = live(graph)
    graph = replace(graph, inputs=tuple(_input(p, graph, moved) for p in graph.inputs))
    graph = live(graph)
    return live(views.fold_moves(live(_flatten(graph, moved))))


def live(graph: Graph) -> Graph:
    """The nodes that an output needs."""
    needed = {p.tensor.name for p in graph.outputs}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if node.output.name in needed and node.output.name not in {p.tensor.name for p in graph.inputs}:
            nodes.append(node)
            needed.update(t.name for t in node.inputs)
    return replace(graph, nodes=tuple(nodes[::-1]))


def consumers(graph: Graph, name: str) -> list[Node]:
    """The nodes that read a tensor."""
    return [n for n in graph.nodes if any(t.name == name for t in n.inputs)]


def _output(port: Port, moved: Mapping[str, Moved]) -> Port:
    """An output that a Transpose makes is handed out untransposed, and the port says in which order it lies."""
    move = moved.get(port.tensor.name)
    if move is None or move.axes is None:
        return port
    return replace(port, tensor=move.source, axes=tuple(int(a) for a in np.argsort(move.axes)))


def _input(port: Port, graph: Graph, moved: Mapping[str, Moved]) -> Port:
    """An input that only Transposes of one kind read is taken in transposed."""
    readers = consumers(graph, port.tensor.name)
    moves = [moved.get(n.output.name) for n in readers]
    perms = {m.axes if m is not None else None for m in moves}
    if len(readers) != 1 or perms == {None} or any(p.tensor.name == port.tensor.name for p in graph.outputs):
        return port
    return replace(port, tensor=readers[0].output, axes=next(iter(perms)) or port.axes)


def _channels_last(image: Tensor, moved: Mapping[str, Moved]) -> Tensor | None:
    """The tensor whose bytes are those of `image` (1, h, w, c) in its own order, where a Reshape made it of such."""
    move = moved.get(image.name)
    if move is None or move.type != "Reshape":
        return None
    before = moved.get(move.source.name)
    if before is not None and before.axes == CHANNELS_LAST:
        return before.source
    return None if len(move.source.shape) == 4 else move.source


def _flatten(graph: Graph, moved: Mapping[str, Moved]) -> Graph:
    """Reshape a tensor in the order in which it lies in memory where the model does so, or what follows allows it: then it costs nothing."""
    nodes = {n.output.name: n for n in graph.nodes}
    outputs = {p.tensor.name for p in graph.outputs}
    for node in graph.nodes:
        move = moved.get(node.output.name)
        if move is not None and move.axes == CHANNELS_FIRST and (source := _channels_last(move.source, moved)):
            nodes[node.output.name] = Node("flatten", node.name, (source,), node.output)
            continue
        if move is None or move.type != "Reshape" or len(node.output.shape) == 4:
            continue
        before = moved.get(move.source.name)
        if before is not None and before.axes == CHANNELS_LAST:  # the model itself flattens in NHWC order
            nodes[node.output.name] = Node("flatten", node.name, (before.source,), node.output)
            continue
        source, lying = move.source, np.arange(move.source.size).reshape(move.source.shape)
        if before is not None and before.axes is not None:  # what was transposed is flattened before that
            source, lying = before.source, lying.transpose(np.argsort(before.axes))
        columns = layout.to_memory(lying).reshape(-1)
        readers = consumers(graph, node.output.name)
        whole = node.output.shape == (1, source.size) and source.shape[0] == 1
        dense = all(r.op == "fully_connected" for r in readers) and node.output.name not in outputs
        if not whole or not dense or not readers or np.array_equal(columns, np.arange(source.size)):
            continue
        nodes[node.output.name] = Node("flatten", node.name, (source,), node.output)
        for reader in readers:
            current = nodes[reader.output.name]
            weight = np.ascontiguousarray(
                current.constants["weight"][:, columns]
            )  # (out, codes in the order of memory)
            nodes[reader.output.name] = replace(current, constants={**current.constants, "weight": weight})
    return replace(graph, nodes=tuple(nodes[n.output.name] for n in graph.nodes))
