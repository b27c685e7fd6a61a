"""A language model's program with its keys and values in memory of fixed size, so that one CUDA graph is replayed for every token.

A stored program is functional: it takes the past as an input and gives it back longer by one concatenation. Here a layer's keys and values
are written into a cache that is there from the beginning (`planish::gpu_kv_write`), and attention reads as much of it as `length`, a
number on the device, says (`planish::gpu_attention_decode`). Positions are counted from `length` too: nothing that changes from token to
token is a shape. The same program reads a prompt of any length and continues it, and on the CPU it runs by the references.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ..common.errors import PlanishError
from ..compress import kv_caches, layers
from ..compress.model import Model
from ..export import gpu_layers, gpu_rotary
from ..export.gpu_precision import CASTS
from ..kernels.gpu import kv_write

aten = torch.ops.aten
BLOCK = 128
"""capacities are multiples of it: blocks in which attention reads a cache"""


@dataclass(frozen=True)
class Cache:
    """The caches of one layer."""

    key: torch.Tensor
    """(batch, kv heads, capacity, size)"""
    key_scale: torch.Tensor | None
    """(batch, kv heads, capacity) float32; None where keys are not quantized"""
    value: torch.Tensor
    value_scale: torch.Tensor | None


@dataclass(frozen=True)
class Shape:
    """What a layer's caches are like."""

    heads: int
    size: int
    format: str

    def empty(self, capacity: int, dtype: torch.dtype, device: torch.device | str) -> Cache:
        """Caches for one sequence of `capacity` tokens."""
        key, value = (
            kv_write.empty_cache(1, self.heads, capacity, self.size, self.format, dtype, device) for _ in range(2)
        )
        return Cache(*key, *value)


@dataclass(frozen=True)
class Static:
    """A program `graph(tokens (1, t) int64, length (1,) int64, keys..., scales...) -> scores (1, t, vocabulary)`."""

    graph: GraphModule
    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    """of caches that are not quantized"""


def static(model: Model) -> Static:
    """The program with caches of fixed size. Raises PlanishError, one clause, for a program that is no plain causal decoder."""
    model = narrow_states(replace(model.editable(), mapped=()))  # its tensors are shared, not copied
    found = kv_caches.find(model)
    if not found or model.inputs[0].name != "input_ids" or len(model.inputs) != 1 + 2 * len(found):
        raise PlanishError(f"'{model.source}' takes other inputs than tokens, keys and values")
    attending = [kv_caches.attention_of(model, c) for c in found]
    graph = model.graph.graph
    first = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_after(first):
        length = graph.placeholder("length")
    place: Node = length
    sides: list[list[Node | None]] = []
    for cached in found:
        names = ["key", "key_scale", "value", "value_scale"]
        own: list[Node | None] = []
        for name in names:
            if name.endswith("scale") and cached.key.format == "none":
                own.append(None)
                continue
            with graph.inserting_after(place):
                place = graph.placeholder(f"{name}_{cached.name}")
            own.append(place)
        sides.append(own)
    _count_from(model, found, length)
    for cached, attends, own in zip(found, attending, sides, strict=True):
        if cached.key.format != cached.value.format:
            raise PlanishError(f"'{model.source}' keeps keys and values of layer {cached.name} in two formats")
        key, value = (_unrounded(s.new) for s in (cached.key, cached.value))
        given = dict(zip(("key_cache", "key_scale", "value_cache", "value_scale"), own, strict=True))
        given |= {"length": length, "format": cached.key.format}
        with graph.inserting_before(attends.mixed):
            gpu_layers.call(model.graph, "gpu_kv_write", {**given, **_turned("key", key), "value": value})
            reading = {**given, **_turned("query", attends.query), "scale": attends.scale}
            made = gpu_layers.call(model.graph, "gpu_attention_decode", reading)
        attends.mixed.replace_all_uses_with(made)
        graph.erase_node(attends.mixed)
    output = graph.output_node()
    output.args = (tree_leaves(output.args)[0],)
    layers.drop_unused(model.graph)
    _drop_states(model)
    graph.lint()
    model.graph.recompile()
    shapes = tuple(Shape(c.key.heads, c.key.size, c.key.format) for c in found)
    return Static(model.graph, shapes, model.inputs[1].dtype)


def narrow_states(model: Model) -> Model:
    """The program with states of the type in which it computes: casts at its border are gone. Edits the given graph."""
    graph, inputs = model.graph.graph, {i.name: i for i in model.inputs}
    for node in [n for n in graph.nodes if n.op == "placeholder" and inputs[str(n.target)].state]:
        casts = [u for u in node.users if layers.op(u) in CASTS]
        if len(casts) == 1 and len({u for u in node.users if layers.op(u) != "aten.sym_size"}) == 1:
            item = inputs[node.target]
            inputs[item.name] = replace(item, dtype=casts[0].meta["val"].dtype)
            node.meta["val"] = casts[0].meta["val"]
            casts[0].replace_all_uses_with(node)
            graph.erase_node(casts[0])
    output = graph.output_node()
    leaves = [n.args[0] if i and layers.op(n) in CASTS else n for i, n in enumerate(tree_leaves(output.args))]
    output.args = (tuple(leaves),)
    layers.drop_unused(model.graph)
    return replace(model, inputs=tuple(inputs[i.name] for i in model.inputs))


def _unrounded(node: Node) -> Node:
    """What is written into a cache: the write itself rounds."""
    source = node.args[0] if layers.op(node) == kv_caches.OP else node
    assert isinstance(source, Node)
    return source


def _turned(name: str, node: Node) -> dict[str, Node]:
    """Keys or queries for a kernel, which turns them itself where a rotary embedding makes them."""
    found = gpu_rotary.find(node)
    return {name: node} if found is None else {name: found.x, "cos": found.cos, "sin": found.sin}


def _count_from(model: Model, found: list[kv_caches.Cached], length: Node) -> None:
    """Let positions be counted from the device's `length` instead of from the past's size, in place."""
    graph = model.graph.graph
    states = {s.past for c in found for s in (c.key, c.value)}
    sizes = {n for n in graph.nodes if layers.op(n) == "aten.sym_size" and n.args[0] in states and n.args[1] in (2, -2)}
    tokens = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
        new = graph.call_function(aten.sym_size.int, (tokens, 1))
        past = graph.call_function(aten.sub.Tensor, (length, new))  # (1,): how many tokens stand before
    for node in list(graph.nodes):
        if layers.op(node) == "aten.arange" and node.args and node.args[0] in sizes and _ends(node, sizes):
            with graph.inserting_before(node):
                steps = graph.call_function(aten.arange.default, (new,), dict(node.kwargs))
                made = graph.call_function(aten.add.Tensor, (steps, past))
            node.replace_all_uses_with(made)
        elif layers.op(node) == "aten.add" and any(a in sizes for a in node.args[1:2]):
            node.update_arg(1, past)


def _ends(node: Node, sizes: set[Node]) -> bool:
    """Whether a range that begins with the past ends with the new tokens."""
    end = node.args[1] if len(node.args) > 1 else None
    return isinstance(end, Node) and end.target is operator.add and any(a in sizes for a in end.args)


def _drop_states(model: Model) -> None:
    """Remove the inputs of the past. Raises PlanishError where something besides attention and positions reads their size."""
    for node in [
        n for n in model.graph.graph.nodes if n.op == "placeholder" and str(n.target).startswith(kv_caches.PAST)
    ]:
        for user in list(node.users):
            if layers.op(user) == "aten.sym_size" and user.args[1] == 0:
                with model.graph.graph.inserting_before(user):
                    first = next(n for n in model.graph.graph.nodes if n.op == "placeholder")
                    user.replace_input_with(node, first)
        if node.users:
            raise PlanishError(f"'{model.source}': '{next(iter(node.users)).name}' depends on how long the past is")
        model.graph.graph.erase_node(node)


class Decoder:
    """One sequence that grows. `capture` makes of a step without arguments one that is replayed (a CUDA graph); None: it is run each time."""

    def __init__(
        self,
        program: Static,
        capacity: int,
        device: torch.device | str = "cpu",
        capture: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
    ) -> None:
        self.capacity = -(-capacity // BLOCK) * BLOCK
        self.program, self.device = program, device
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self.taken = 0
        caches = [s.empty(self.capacity, program.dtype, device) for s in program.shapes]
        self.caches = [t for c in caches for t in (c.key, c.key_scale, c.value, c.value_scale) if t is not None]
        self._capture = capture
        self._replay: Callable[[], Any] | None = None

    def read(self, tokens: torch.Tensor) -> int:
        """Tokens (1, t) that join the sequence; returns the most likely one behind them. Raises PlanishError when they do not fit."""
        count = tokens.shape[1]
        if self.taken + count > self.capacity:
            raise PlanishError(f"{self.taken + count} tokens do not fit a cache of {self.capacity}")
        with torch.no_grad():
            self.length += count
            scores = self.program.graph(tokens.to(self.device), self.length, *self.caches)
            self.token.copy_(scores[:, -1:].argmax(-1))
        self.taken += count
        return int(self.token)

    def next(self) -> int:
        """The token behind the one that was given last: one step of one token."""
        self.step()
        return int(self.token)

    def step(self) -> None:
        """As `next`, the token left on the device."""
        if self.taken >= self.capacity:
            raise PlanishError(f"{self.taken + 1} tokens do not fit a cache of {self.capacity}")
        with torch.no_grad():
            if self._replay is None:
                self._replay = self._captured()
            self._replay()
        self.taken += 1

    def rewind(self, taken: int) -> None:
        """Forget all but the first `taken` tokens."""
        self.taken = taken
        self.length.fill_(taken)

    def _advance(self) -> None:
        self.length += 1
        scores = self.program.graph(self.token, self.length, *self.caches)
        self.token.copy_(scores[:, -1:].argmax(-1))

    def _captured(self) -> Callable[[], Any]:
        """The step, captured; warm-up runs and the capture leave the sequence as it was."""
        if self._capture is None:
            return self._advance
        before = self.taken, self.token.clone()

        def within() -> None:  # a warm-up run past the end of the cache would write beyond it
            self.length.clamp_(max=self.capacity - 1)
            self._advance()

        replay = self._capture(within)
        self.rewind(before[0])
        self.token.copy_(before[1])
        return replay
