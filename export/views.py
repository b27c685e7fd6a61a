"""Reshapes and transposes that need not run: those that leave every byte in its place, and those around matrix products.

A move of elements (reshape, transpose, slice) is known by where each element of its output lies in the memory of the tensor that
the chain of moves began with. Where that is the output's own order, the output is the same bytes under another shape. A matrix product
reads its operands and writes its result in even steps of memory, so it takes over every chain of moves that amounts to such steps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..kernels import integer, layout, matmul
from ..kernels.op import Array, Node, Tensor, Unsupported
from .graph import Graph

MOVES = ("reshape", "transpose", "slice", "flatten", "rescale")
"""ops that move codes and change none, as long as they have no table"""


def fold_moves(graph: Graph) -> Graph:
    """The same function with fewer copies; nodes that nothing reads any more stay, for `rewrite.live`."""
    graph = replace(graph, nodes=tuple(_idle(graph, n) for n in graph.nodes))
    graph = _Views(graph).same_bytes()
    graph = _Views(graph).results()
    return _Views(graph).operands()


def _idle(graph: Graph, node: Node) -> Node:
    """A rescale without a table for a sum or product with one number that changes no code, as attention's scale often is."""
    if node.op not in ("add", "mul") or "operand" not in node.constants or node.attributes["repeat"] != "one":
        return node
    codes = integer.codes().reshape(-1, *[1] * (len(node.output.shape) - 1))
    same = np.array_equal(graph.ops[node.op].reference(node, codes), codes)
    return Node("rescale", node.name, node.inputs, node.output) if same else node


class _Views:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.maker = {n.output.name: n for n in graph.nodes}
        self.readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in {t.name for t in node.inputs}:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {p.tensor.name for p in graph.outputs}

    def _moves(self, node: Node | None) -> bool:
        return node is not None and node.op in MOVES and "table" not in node.constants

    def _moved(self, node: Node, places: Array) -> Array:
        """What a move makes of positions (1, ...)."""
        return self.graph.ops[node.op].reference(node, places)

    def _chain(self, tensor: Tensor) -> tuple[Tensor, Array]:
        """The tensor that a chain of moves began with, and where in its memory each element of `tensor` (1, ...) lies."""
        steps: list[Node] = []
        source = tensor
        while (maker := self.maker.get(source.name)) is not None and self._moves(maker):
            steps.append(maker)
            source = maker.inputs[0]
        places = matmul.places(source.shape)
        for node in reversed(steps):
            places = self._moved(node, places)
        return source, places

    def same_bytes(self) -> Graph:
        """Moves that change no byte's place become `flatten`."""
        nodes: list[Node] = []
        for node in self.graph.nodes:
            made = node
            if self._moves(node) and not self.graph.alias(node):
                source, places = self._chain(node.output)
                lying = layout.to_memory(places)[0]
                if len(lying) == source.size and np.array_equal(lying, np.arange(source.size)):
                    made = Node("flatten", node.name, (source,), node.output)
            nodes.append(made)
        return replace(self.graph, nodes=tuple(nodes))

    def operands(self) -> Graph:
        """Matrix products read through the moves that made their operands."""
        return replace(self.graph, nodes=tuple(self._read(n) if n.op == "matmul" else n for n in self.graph.nodes))

    def _read(self, node: Node) -> Node:
        for index, key in enumerate(("a", "b")):
            source, places = self._chain(node.inputs[index])
            try:
                view = matmul.view(places, node.attributes["batches"], key)
            except Unsupported:
                continue
            inputs = (*node.inputs[:index], source, *node.inputs[index + 1 :])
            node = replace(node, inputs=inputs, attributes={**node.attributes, key: view})
        return node

    def results(self) -> Graph:
        """Matrix products write what the moves that alone read them would make."""
        replaced: dict[str, Node] = {}
        gone: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "matmul":
                made, passed = self._written(node)
                replaced[node.name] = made
                gone |= passed
        return replace(self.graph, nodes=tuple(replaced.get(n.name, n) for n in self.graph.nodes if n.name not in gone))

    def _written(self, node: Node) -> tuple[Node, set[str]]:
        """The product with the farthest result whose places are evenly spaced, and the names of the moves before that."""
        best, passed = node, set[str]()
        output, places = (
            node.output,
            np.arange(node.output.size).reshape(node.output.shape),
        )  # of the product's elements
        seen: set[str] = set()
        while output.name not in self.outputs:
            readers = self.readers.get(output.name, [])
            if len(readers) != 1 or not self._moves(readers[0]):
                break
            move = readers[0]
            output, places = move.output, self._moved(move, places)
            seen.add(move.name)
            if output.size != node.output.size:
                break
            where = np.empty(output.size, np.int64)
            where[places.reshape(-1)] = matmul.places(output.shape).reshape(-1)
            try:
                view = matmul.view(where.reshape(node.output.shape), node.attributes["batches"], "y")
            except Unsupported:
                continue
            best = replace(node, output=output, attributes={**node.attributes, "y": view})
            passed = set(seen)
        return best, passed
