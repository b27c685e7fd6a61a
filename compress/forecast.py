"""What a recipe will take and give, from shapes alone, before any work: bytes, peak memory, and layers that do not fit.

Bytes are exact for methods that say what they store (`Pass.foresee`), except for what only data decides (outlier columns), which counts as
none. Peak memory is an estimate: what the process has held so far, what torch.export takes, and for the largest block

    its weights in float32, the replaced ones, the method's temporaries, the tensors between its ops that one batch needs at a time,
    and what later blocks read for all calibration samples

or, where that is more, what the evaluation of the whole model holds: mapped weights up to their limit, and the scores of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from . import layers
from .blocks import split
from .data import Data
from .evaluation import BATCH, SCORES
from .model import RESIDENT, Input, Model
from .passes import Foreseen, Pass

VIEWS = {"aten.view", "aten.transpose", "aten.permute", "aten.expand", "aten.unsqueeze", "aten.squeeze", "aten.slice", "aten.select", "aten.t", "aten.alias", "aten.detach", "aten.dropout", "aten.unflatten", "aten.flatten"}  # fmt: skip
"""ops whose result takes no memory"""
EXPORT = 100 << 20
"""bytes that torch.export takes for itself when the model is checked and written"""
FLOAT = 4
"""bytes of a number while a model computes"""


@dataclass(frozen=True)
class Forecast:
    """What will come of a recipe."""

    original_bytes: int
    bytes: int | None
    """of the compressed model's tensors; None when a pass does not foresee them"""
    peak_memory_bytes: int | None
    """of the process; None when a pass does not foresee it"""
    layers: int
    """that are replaced"""
    problems: tuple[str, ...]
    """one line for each layer that the recipe cannot take"""
    unknown: tuple[str, ...]
    """passes that foresee nothing"""


def forecast(model: Model, passes: Sequence[tuple[str, Pass]], data: Data | None, held: int) -> Forecast:
    """The forecast of passes by name; `held` is the most memory that the process has held so far, in bytes.

    Raises PlanishError for what the passes refuse as a whole (a glob that matches no layer).
    """
    left = {n: layers.tensor(model.graph, n) for n in _tensors(model)}
    size, peak, replaced = model.bytes(), _evaluation(model, data), 0
    unknown, problems = [], []
    taken: set[str] = set()
    for name, step in passes:
        found = step.foresee(model, frozenset(taken))
        if found is None:
            unknown.append(name)
            continue
        problems += [f"{name}: {p}" for p in found.problems]
        gone = {n for block in found.blocks.values() for n in block.layers}
        dropped = _dropped(model, taken | gone)
        size += sum(b.stored for b in found.blocks.values()) - sum(_bytes(left.pop(n)) for n in dropped if n in left)
        replaced += len(gone)
        taken |= gone
        peak = max(peak, _largest(model, found, data))
    known = not unknown
    return Forecast(
        model.bytes(),
        size if known else None,
        held + EXPORT + peak if known else None,
        replaced,
        tuple(problems),
        tuple(unknown),
    )


def _bytes(tensor: object) -> int:
    return tensor.numel() * tensor.element_size()  # pyright: ignore[reportAttributeAccessIssue]


def _tensors(model: Model) -> list[str]:
    """Names by which the graph reads its tensors: of a shared one, the one name among several."""
    return [str(n.target) for n in model.graph.graph.nodes if n.op == "get_attr"]


def _dropped(model: Model, gone: set[str]) -> set[str]:
    """Weights that no node reads once the layers in `gone` are replaced, embeddings by the names of their tables."""
    readers: dict[str, list[str]] = {}
    for node in model.graph.graph.nodes:
        for source in node.all_input_nodes:
            while layers.op(source) == "aten._to_copy":
                source = source.all_input_nodes[0]  # noqa: PLW2901 - down to the tensor
            if source.op == "get_attr" and layers.op(node) != "aten._to_copy":
                table = str(source.target) if layers.op(node) == "aten.embedding" else ""
                name = layers.layer(node) if node.args[0] is not source else table
                readers.setdefault(str(source.target), []).append(name)
    return {n for n, names in readers.items() if n.endswith("weight") and set(names) <= gone}


def _largest(model: Model, found: Foreseen, data: Data | None) -> int:
    """Bytes of the largest block while the pass works on it."""
    nodes = list(model.graph.graph.nodes)
    places = {b.name: b.nodes for b in split(model.graph)}
    running = found.samples > 0 and data is not None
    batch = _sizes(model, data, 8) if running else {}
    one = _sizes(model, data, 1) if running else {}
    count = min(found.samples, data.n) if data is not None else 0
    order = {n: i for i, n in enumerate(nodes)}
    most = 0
    for name, block in found.blocks.items():
        inside = places[name]
        first = order[inside[0]]
        made = _alive(inside, batch)
        waiting = [
            n
            for n in nodes[:first]
            if n.op != "get_attr" and any(order[u] >= first and u.op != "output" for u in n.users)
        ]
        kept = sum(one.get(n, 0) for n in waiting) * count
        most = max(most, block.weights + block.stored + block.work + made + kept)
    return most


def _alive(nodes: Sequence[Node], sizes: Mapping[Node, int]) -> int:
    """Most bytes of the tensors that a run of nodes holds at a time, when each goes behind its last reader."""
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        source = node.args[0] if node.args and layers.op(node) in VIEWS else None
        owner[node] = owner.get(source, source) if isinstance(source, Node) else node
        for item in (node, *node.all_input_nodes):
            last[owner.get(item, item)] = index
    going: dict[int, int] = {}
    held = most = 0
    for index, node in enumerate(nodes):
        if owner[node] is node:
            held += sizes.get(node, 0)
            going[last[node]] = going.get(last[node], 0) + sizes.get(node, 0)
        most = max(most, held)
        held -= going.get(index, 0)
    return most


def _sizes(model: Model, data: Data | None, samples: int) -> Mapping[Node, int]:
    """Bytes of every tensor of the graph for samples of the data."""
    assert data is not None
    shaped = tuple(_shaped(i, data) for i in model.inputs)
    found = layers.shapes(replace(model, inputs=shaped), samples)
    return {n: FLOAT * math.prod(s) for n, s in found.items() if n.op != "get_attr"}


def _shaped(item: Input, data: Data) -> Input:
    """The input with the sizes that the data has."""
    if item.name not in data.inputs:
        return item
    return replace(item, shape=(item.shape[0], *data.inputs[item.name].shape[1:]))


def _evaluation(model: Model, data: Data | None) -> int:
    """Bytes that the report's figures take: mapped weights, and the largest tensor of a batch three times over."""
    if data is None:
        return RESIDENT
    sizes = _sizes(model, data, 1)
    largest = max(sizes.values(), default=0)
    windows = max(1, min(BATCH, SCORES * FLOAT // max(1, largest)))
    return min(RESIDENT, model.bytes()) + 3 * largest * windows
