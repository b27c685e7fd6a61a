"""Block-wise calibration: run the graph one block of the network at a time, see what its layers read, edit it, go on.

A block is one element of an outermost numbered list of layers (`layers.0`, `encoder.layer.1`): a transformer or Mamba block. Nodes are
walked in graph order; a node belongs to the block that was entered last. Between two blocks only the values that
later nodes read are kept, for every calibration batch, so memory is bounded by one block and those activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..common.progress import track
from . import layers
from .journal import Journal
from .model import Model
from .moments import SAMPLE, Moments

aten = torch.ops.aten
NUMBERED = re.compile(r"^((?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*\.\d+)\.")
MASK = "attention_mask"
"""input (n, length) whose zeros are padding"""
Batch = tuple[torch.Tensor, ...]
Values = dict[Node, Any]
Show = Callable[[Node, torch.Tensor], None]


@dataclass(frozen=True)
class Block:
    """A run of nodes in graph order: everything in front of the first numbered block, one block, or the rest behind the last."""

    name: str
    """'layers.3', 'before' or 'after'"""
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Linear:
    """One matrix product with constant weights: y = x W^T + b."""

    name: str
    """layer name"""
    node: Node
    source: Node
    """the tensor that it reads, (..., in)"""
    weight: torch.Tensor
    """(out, in) float32"""
    bias: torch.Tensor | None
    """(out,) float32"""


Visit = Callable[[Block, "Sequence[Sequence[Linear]]", Mapping[Node, Moments]], None]


def linear(module: GraphModule, node: Node) -> Linear | None:
    """The node as a `Linear`, None when it is none or its weights are no constants (or are codes already)."""
    if node.target is not aten.linear.default or not layers.is_parameter(node.args[1]):
        return None
    source, weight_node = node.args[0], node.args[1]
    bias_node = node.args[2] if len(node.args) > 2 else None
    if bias_node is not None and not layers.is_parameter(bias_node):
        return None
    assert isinstance(source, Node)
    bias = None if bias_node is None else layers.value(module, bias_node)
    return Linear(layers.layer(node), node, source, layers.value(module, weight_node), bias)


def chosen(block: Block, wanted: Callable[[str], bool]) -> list[str]:
    """Names of a block's linears that are wanted; their weights are not read."""
    names = (layers.layer(n) for n in block.nodes if n.target is aten.linear.default and layers.is_parameter(n.args[1]))
    return [n for n in names if wanted(n)]


def groups(module: GraphModule, nodes: Iterable[Node], wanted: Callable[[str], bool]) -> list[list[Linear]]:
    """The linears among `nodes` whose names are wanted, those that read the same tensor together (q, k and v), in graph order."""
    found: dict[Node, list[Linear]] = {}
    for node in nodes:
        item = linear(module, node) if node.target is aten.linear.default and wanted(layers.layer(node)) else None
        if item is not None:
            found.setdefault(item.source, []).append(item)
    return list(found.values())


def split(module: GraphModule) -> list[Block]:
    """The graph's computing nodes as blocks, in order. Names alone decide, so editing a block's layers moves no border."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    homes = [_home(n) for n in nodes]
    last = max((i for i, home in enumerate(homes) if home is not None), default=None)
    if last is None:
        return [Block("model", tuple(nodes))]
    places: list[list[Node]] = [[]]
    labels = ["before"]
    for index, (node, home) in enumerate(zip(nodes, homes, strict=True)):
        if home is not None and home not in labels:
            places.append([])
            labels.append(home)
        elif index > last and labels[-1] != "after" and _reads_constant(node):
            places.append([])
            labels.append("after")
        places[-1].append(node)
    return [Block(label, tuple(p)) for label, p in zip(labels, places, strict=True) if p]


def _home(node: Node) -> str | None:
    """The element of the outermost numbered list ('layers.3') that the node's tensors belong to, None for a node without one."""
    names = (NUMBERED.match(str(a.target)) for a in node.all_input_nodes if a.op == "get_attr")
    return next((m[1] for m in names if m), None)


def _reads_constant(node: Node) -> bool:
    return any(a.op == "get_attr" for a in node.all_input_nodes)


def _mask(given: torch.Tensor) -> torch.Tensor | None:
    """The tokens (n, length) that are no padding, None when none are."""
    return None if given.ndim != 2 or bool(given.bool().all()) else given.bool()


def _without_padding(show: Show, mask: torch.Tensor | None) -> Show:
    return show if mask is None else lambda node, value: show(node, _allowed(value, mask))


def _allowed(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(tokens, ...) of a value (n, length, ...) or (n * length, ...); another value as it is."""
    if value.ndim > 2 and value.shape[:2] == mask.shape:
        return value[mask]
    return value[mask.reshape(-1)] if value.ndim == 2 and len(value) == mask.numel() else value


class Run:
    """Calibration batches at one place of the graph: the values that nodes behind that place still read."""

    def __init__(self, module: GraphModule, batches: Iterable[Batch]) -> None:
        self.module = module
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.states: list[Values] = [dict(zip(inputs, b, strict=True)) for b in batches]
        place = next((i for i, n in enumerate(inputs) if n.target == MASK), None)
        self.masks = [None if place is None else _mask(state[inputs[place]]) for state in self.states]

    def see(self, block: Block, show: Show) -> None:
        """Run a block on all batches and call `show(node, value)` for every tensor that is read or made; the place stays.

        Of a tensor whose first dimensions are those of the model's attention_mask, only the tokens that it allows are shown.
        """
        for state, mask in zip(self.states, self.masks, strict=True):
            self._execute(block.nodes, dict(state), _without_padding(show, mask), set())

    def advance(self, block: Block, show: Show | None = None) -> None:
        """Run a block on all batches, as it is now, and go behind it; `show` as in `see`."""
        ahead = self._needed_behind(block)
        for index, (state, mask) in enumerate(zip(self.states, self.masks, strict=True)):
            seen = None if show is None else _without_padding(show, mask)
            values = self._execute(block.nodes, dict(state), seen, ahead)
            self.states[index] = {n: v for n, v in values.items() if n in ahead}

    def _needed_behind(self, block: Block) -> set[Node]:
        """Values that a node behind the block reads. Of the model's outputs only the first counts: nobody asks for a cache here."""
        inside, behind, needed = set(block.nodes), False, set[Node]()
        for node in self.module.graph.nodes:
            if node in inside:
                behind = True
            elif behind:
                needed.update(node.all_input_nodes[:1] if node.op == "output" else node.all_input_nodes)
        return needed

    def _execute(self, nodes: Sequence[Node], values: Values, show: Show | None, kept: set[Node]) -> Values:
        """Run nodes on `values`, which is changed: what no later one of them reads goes, unless it is `kept`."""
        last = {item: node for node in nodes for item in (node, *node.all_input_nodes)}

        def read(node: Node) -> Any:
            if node.op == "get_attr":
                return layers.tensor(self.module, str(node.target))
            return values[node]

        shown: set[Node] = set()
        with torch.inference_mode():
            for node in nodes:
                args, kwargs = map_arg((node.args, node.kwargs), read)
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
                if show is not None:
                    for item in (*node.all_input_nodes, node):
                        if item not in shown and item.op != "get_attr" and isinstance(values[item], torch.Tensor):
                            shown.add(item)
                            show(item, values[item])
                for item in {node, *node.all_input_nodes} - kept:
                    if last[item] is node:
                        values.pop(item, None)
        return values


def calibrate(
    model: Model,
    batches: Iterable[Batch],
    wanted: Callable[[str], bool],
    visit: Visit,
    journal: Journal,
    *,
    products: bool = False,
    keep: int = SAMPLE,
    edits: bool = True,
    what: str = "calibrating",
) -> None:
    """Go through the blocks in order: collect `Moments` of what each wanted linear reads, let `visit` edit the block, run it again.

    Later blocks see what the edited earlier ones give them. `visit(block, groups, moments by source node)` changes
    the graph of `model` in place. Without batches (an empty iterable) the moments are empty and nothing is run; so they are for a
    block that the journal knows, whose result `visit` takes from there. With `edits` false `visit` leaves the graph alone, and a block
    runs once instead of twice. Behind the last block that it does not know nothing is
    run either.
    """
    module = model.graph
    run = Run(module, batches)
    blocks = split(module)
    left = [bool(chosen(b, wanted)) and not journal.knows(b.name) for b in blocks]  # to be made yet
    for index in track(range(len(left)), what):
        block = split(module)[index] if run.states else blocks[index]
        members = groups(module, block.nodes, wanted)
        moments: dict[Node, Moments] = {}
        if run.states and left[index]:
            readers = {g[0].source: g[0] for g in members}

            def show(node: Node, value: torch.Tensor, readers: dict[Node, Linear] = readers, moments: dict[Node, Moments] = moments) -> None:  # fmt: skip
                if node in readers:
                    found = moments.setdefault(node, Moments(value.shape[-1], products, keep))
                    found.add(value, readers[node].name)

            if edits:
                run.see(block, show)
            else:
                run.advance(block, show)
        if members:
            visit(block, members, moments)
        members.clear()
        if run.states and any(left[index + 1 :]) and (edits or not left[index]):
            run.advance(split(module)[index])
        journal.release()
