"""Patch-based execution (Lin et al. 2021, MCUNetV2, section 3.1): the first layers run once for every patch of a map.

The largest maps stand at the beginning of a network. Instead of computing each whole, a prefix of the graph runs patch by patch up to one
map, so that only patches of those before it are ever in memory. A patch of a layer's output needs a patch of its input that is larger
by the halo of the layer's window; what patches have in common is computed again. Inside the image a patch sees its real
neighbours, only the image's own border is padded, so every code is the same as without patches.

The rewritten graph is ordinary: slices of the input, the layers on patches, and pastes of the results into their map. Slices and
results of whole rows are runs of the map's bytes and cost nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..common.errors import PlanishError
from ..kernels import window
from ..kernels.op import Array, Call, Node, Tensor
from . import memory
from .graph import Graph

WINDOWS = ("conv2d", "depthwise_conv2d", "max_pool", "average_pool")
POINTWISE = ("add", "mul", "clamp", "lookup", "rescale", "concat")
LOCAL = (*WINDOWS, *POINTWISE, "pad", "slice")
"""ops whose output pixels depend on a window of input pixels"""
PATCH = " patch "
"""between a layer's name and the row and column of its patch"""
MOST_PATCHES = 144
FINALISTS = 6
"""candidates whose memory is planned in full; the others are ranked by an estimate"""

Span = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """Rows and columns of a map: [begin, end) each."""

    rows: Span
    columns: Span

    @property
    def area(self) -> int:
        """Pixels."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def shape(self, channels: int) -> tuple[int, int, int, int]:
        """Of a tensor that holds it."""
        return 1, channels, self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def union(self, other: Box) -> Box:
        """The smallest box around both."""
        (a, b), (c, d) = self.rows, self.columns
        return Box((min(a, other.rows[0]), max(b, other.rows[1])), (min(c, other.columns[0]), max(d, other.columns[1])))


@dataclass(frozen=True)
class Stage:
    """A prefix of a graph that can run in patches: all that the map `output` depends on, and nothing else reads."""

    graph: Graph
    nodes: tuple[Node, ...]
    output: Tensor

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The graph's inputs that it reads."""
        made = {n.output.name for n in self.nodes}
        return {t.name: t for n in self.nodes for t in n.inputs if t.name not in made}

    def boxes(self, wanted: Box) -> dict[str, Box]:
        """What is computed of every map (and read of every input) for a patch of the output, by tensor name."""
        found = {self.output.name: wanted}
        for node in reversed(self.nodes):
            for tensor in node.inputs:
                box = needs(node, found[node.output.name], tensor)
                found[tensor.name] = box.union(found[tensor.name]) if tensor.name in found else box
        return found

    def patches(self, grid: tuple[int, int]) -> list[Box]:
        """The output's patches, row by row; a grid has no more rows and columns than the map."""
        _, _, height, width = self.output.shape
        if not (1 <= grid[0] <= height and 1 <= grid[1] <= width):
            raise PlanishError(
                f"a grid of {grid[0]} x {grid[1]} patches; '{self.output.name}' has {height} x {width} pixels"
            )
        rows, columns = ([n * i // k for i in range(k + 1)] for n, k in zip((height, width), grid, strict=True))
        return [
            Box((top, bottom), (left, right))
            for top, bottom in itertools.pairwise(rows)
            for left, right in itertools.pairwise(columns)
        ]

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of the stage in patches, counted from the boxes: a layer's are proportional to its output's pixels."""
        whole = {n.output.name: self.graph.ops[n.op].macs(n) for n in self.nodes}
        return sum(
            whole[name] * box.area // math.prod(shape[2:])
            for patch in self.patches(grid)
            for name, box in self.boxes(patch).items()
            if name in whole
            for shape in [self._shapes[name]]
        )

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {n.output.name: n.output.shape for n in self.nodes}


def stages(graph: Graph) -> list[Stage]:
    """Every prefix that can run in patches, shortest first."""
    makers = {n.output.name: n for n in graph.nodes}
    outputs = {p.tensor.name for p in graph.outputs}
    found: list[Stage] = []
    for node in graph.nodes:
        inside = _ancestors(makers, node)
        nodes = tuple(n for n in graph.nodes if n.output.name in inside)
        private = inside - {node.output.name}
        read_outside = {t.name for n in graph.nodes if n.output.name not in inside for t in n.inputs}
        whole = len(node.output.shape) == 4 and math.prod(node.output.shape[2:]) > 1
        if whole and all(map(_local, nodes)) and not private & (read_outside | outputs):
            found.append(Stage(graph, nodes, node.output))
    return found


def _ancestors(makers: Mapping[str, Node], node: Node) -> set[str]:
    """Names of the tensors that a node's output depends on and that nodes make, its own included."""
    found: set[str] = set()
    waiting = [node.output.name]
    while waiting:
        name = waiting.pop()
        if name in makers and name not in found:
            found.add(name)
            waiting += [t.name for t in makers[name].inputs]
    return found


def _local(node: Node) -> bool:
    """Whether a patch of the output can be computed from patches of the inputs."""
    a = node.attributes
    if node.op not in LOCAL or any(len(t.shape) != 4 for t in (*node.inputs, node.output)):
        return False
    if node.op in ("add", "mul"):
        return all(t.shape == node.output.shape for t in node.inputs)
    if node.op == "concat":
        return a["axis"] % 4 == 1
    if node.op == "slice":
        return a["step"][2] > 0 and a["step"][3] > 0
    return True


def needs(node: Node, box: Box, tensor: Tensor) -> Box:
    """The part of an input that a node reads for a part of its output. Raises PlanishError where that is padding alone."""
    found: list[Span] = []
    for axis, span in enumerate((box.rows, box.columns)):
        begin, end = _reads(node, axis, span)
        begin, end = max(begin, 0), min(end, tensor.shape[2 + axis])
        if begin >= end:
            raise PlanishError(f"a patch of '{node.name}' would lie in its padding; a coarser grid is possible")
        found.append((begin, end))
    return Box(found[0], found[1])


def _reads(node: Node, axis: int, span: Span) -> Span:
    """Positions of the input, also beyond its ends, for positions [begin, end) of the output along axis 0 (rows) or 1."""
    begin, end = span
    a = node.attributes
    if node.op in WINDOWS:
        shape = window.of(node)
        step, before = shape.stride[axis], shape.pads[axis]
        return begin * step - before, (end - 1) * step - before + shape.span[axis]
    if node.op == "pad":
        return begin - a["before"][2 + axis], end - a["before"][2 + axis]
    if node.op == "slice":
        first, step = a["first"][2 + axis], a["step"][2 + axis]
        return first + begin * step, first + (end - 1) * step + 1
    return begin, end


def original(name: str) -> str:
    """The layer that a node computes a patch of; any other name as it is."""
    return name.partition(PATCH)[0]


def split(stage: Stage, grid: tuple[int, int]) -> Graph:
    """The graph with the stage in rows x columns patches; all its other tensors, its inputs and outputs are the same."""
    return split_with_origins(stage, grid)[0]


@dataclass(frozen=True)
class Origin:
    """What a tensor of a patched graph is a part of."""

    map: str
    """the tensor of the graph without patches"""
    patch: int | None
    """row by row; None for tensors that all patches share"""


def split_with_origins(stage: Stage, grid: tuple[int, int]) -> tuple[Graph, dict[str, Origin]]:
    """The same, and for every tensor of the patches where it comes from."""
    graph = stage.graph
    origins: dict[str, Origin] = {}
    whole_rows = grid[1] == 1
    made: list[Node] = []
    before: Tensor | None = None
    patches = stage.patches(grid)
    for i, patch in enumerate(patches):
        mark = f"{PATCH}{i // grid[1]}.{i % grid[1]}"
        boxes = stage.boxes(patch)
        tensors: dict[str, Tensor] = dict(stage.inputs)
        held: dict[str, Box] = {t.name: Box((0, t.shape[2]), (0, t.shape[3])) for t in tensors.values()}
        for node in stage.nodes:
            box = boxes[node.output.name]
            inputs: list[Tensor] = []
            for k, tensor in enumerate(node.inputs):
                source, wanted = tensors[tensor.name], needs(node, box, tensor)
                if wanted != held[tensor.name]:
                    slot = f"{tensor.name} for {node.name} {k}"
                    made.append(_cut(source, held[tensor.name], wanted, f"{slot}{mark}", slot, whole_rows))
                    source = made[-1].output
                    origins[source.name] = Origin(tensor.name, None if tensor.name in stage.inputs else i)
                inputs.append(source)
            name = node.output.name
            output = replace(node.output, name=f"{name}{mark}", shape=box.shape(node.output.shape[1]))
            made.append(_on_patch(node, f"{node.name}{mark}", tuple(inputs), output, box))
            tensors[name], held[name] = output, box
            origins[output.name] = Origin(name, None if name == stage.output.name else i)
        block = tensors[stage.output.name]
        last = i == len(patches) - 1
        after = stage.output if last else replace(stage.output, name=f"{stage.output.name} after{mark}")
        given = (block,) if before is None else (block, before)
        first = patch.rows[0], patch.columns[0]
        made.append(Node("paste", f"{stage.output.name}{mark} paste", given, after, {"first": first}))
        before = after
        origins[after.name] = Origin(stage.output.name, None)
    inside = {n.name for n in stage.nodes}
    rest = tuple(n for n in graph.nodes if n.name not in inside)
    return replace(graph, nodes=(*made, *rest)), origins


def _cut(source: Tensor, held: Box, wanted: Box, name: str, slot: str, view: bool) -> Node:
    """The part of a patch, or of an input, that a node reads."""
    first = (0, 0, wanted.rows[0] - held.rows[0], wanted.columns[0] - held.columns[0])
    output = replace(source, name=name, shape=wanted.shape(source.shape[1]))
    attributes = {"first": first, "step": (1, 1, 1, 1), "view": view, memory.SLOT: slot}
    return Node("slice", f"{name} slice", (source,), output, attributes)


def _on_patch(node: Node, name: str, inputs: tuple[Tensor, ...], output: Tensor, box: Box) -> Node:
    """A node for the part `box` of its output; its constants are the same arrays."""
    sizes = node.inputs[0].shape[2:]
    spans = [_reads(node, axis, span) for axis, span in enumerate((box.rows, box.columns))]
    before = [max(0, -begin) for begin, _ in spans]
    after = [max(0, end - size) for (_, end), size in zip(spans, sizes, strict=True)]
    attributes, constants = {**node.attributes, memory.SLOT: node.output.name}, node.constants
    if node.op in WINDOWS:
        attributes["pads"] = (before[0], before[1], after[0], after[1])
    elif node.op == "pad":
        attributes["before"] = (*node.attributes["before"][:2], *before)
        attributes["after"] = (*node.attributes["after"][:2], *after)
    elif node.op == "slice":
        attributes["first"] = (*node.attributes["first"][:2], 0, 0)
        attributes["view"] = False
    elif "operand" in constants and node.attributes["repeat"] == "same":
        constants = {**constants, "operand": _part(constants["operand"], node.output.shape, box)}
    return Node(node.op, name, inputs, output, attributes, constants)


def _part(values: Array, shape: tuple[int, ...], box: Box) -> Array:
    return values.reshape(shape)[:, :, slice(*box.rows), slice(*box.columns)]


@dataclass(frozen=True)
class Patched:
    """A graph whose first layers run in patches, and what that costs."""

    graph: Graph
    until: str
    """the map that the patches make"""
    layers: int
    """nodes of the original graph that run in patches"""
    grid: tuple[int, int]
    macs: int
    """of the original graph"""
    extra_macs: int
    """multiply-accumulates that are computed again"""
    arena: int
    """bytes, as planned"""

    @property
    def share(self) -> float:
        """`extra_macs` as a part of the original ones."""
        return self.extra_macs / max(1, self.macs)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "until": self.until,
            "layers": self.layers,
            "grid": list(self.grid),
            "extra_macs": self.extra_macs,
            "share": round(self.share, 6),
            "summary": self.summary(),
        }

    def summary(self) -> str:
        """One line for people."""
        rows, columns = self.grid
        return (
            f"{self.layers} layers up to '{self.until}' in {rows} x {columns} patches, {self.extra_macs} MACs "
            f"({self.share:.1%}) more, arena {self.arena} bytes"
        )


def choose(
    graph: Graph, calls: Callable[[Graph], Mapping[str, Call]], ram: int | None = None, extra: float = 0.15
) -> Patched | None:
    """The patches that need the least memory for at most `extra` (a share) more multiply-accumulates; None where none help.

    With `ram` bytes for the arena: the ones with the fewest additional multiply-accumulates that fit, or those with the least memory
    where none fit. `calls` gives the C calls of a graph by node name; overlaps and scratch depend on them.
    """
    whole = calls(graph)
    arena = memory.of(graph, whole).plan.arena
    ranked = sorted(_candidates(graph, whole, graph.macs * extra, arena))
    possible = stages(graph)
    best: Patched | None = None
    for _, more, index, grid in _finalists(ranked, ram):
        stage = possible[index]
        made = split(stage, grid)
        made_calls = calls(made)
        need = memory.needed(made, made_calls)
        if need >= arena or (best is not None and _key(need, more, ram) >= _key(best.arena, best.extra_macs, ram)):
            continue
        planned = memory.of(made, made_calls).plan.arena
        if planned < arena and (best is None or _key(planned, more, ram) < _key(best.arena, best.extra_macs, ram)):
            best = Patched(made, stage.output.name, len(stage.nodes), grid, graph.macs, made.macs - graph.macs, planned)
    return best


def _key(arena: int, more: int, ram: int | None) -> tuple[int, int, int]:
    """What is better is less: among those that fit the additional work, else the memory."""
    return (0, more, arena) if ram is not None and arena <= ram else (1, arena, more)


def _finalists(
    ranked: Sequence[tuple[int, int, int, tuple[int, int]]], ram: int | None
) -> list[tuple[int, int, int, tuple[int, int]]]:
    """The most promising candidates: by memory, and by additional work among those that seem to fit."""
    chosen = list(ranked[:FINALISTS])
    if ram is not None:
        fitting = [c for c in ranked if c[0] <= ram]
        chosen += [c for c in sorted(fitting, key=lambda c: (c[1], c[0]))[:FINALISTS] if c not in chosen]
    return chosen


def _candidates(
    graph: Graph, calls: Mapping[str, Call], limit: float, least: int
) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """(estimated bytes, additional multiply-accumulates, index of the stage, grid) of every split within the limit."""
    for index, stage in enumerate(stages(graph)):
        rest = _rest(stage, calls)
        if rest >= least:
            continue
        base = sum(graph.ops[n.op].macs(n) for n in stage.nodes)
        for grid in _grids(stage.output.shape[2], stage.output.shape[3]):
            try:
                more = stage.macs(grid) - base
            except PlanishError:
                continue  # a patch of padding alone
            if more <= limit:
                yield max(rest, _estimate(stage, grid)), more, index, grid


def _grids(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Whole rows, and patches that are about as wide as high."""
    for rows in range(1, height + 1):
        for columns in range(1, width + 1):
            alike = height * columns <= 2 * width * rows and width * rows <= 2 * height * columns
            if 1 < rows * columns <= MOST_PATCHES and (columns == 1 or alike):
                yield rows, columns


def _rest(stage: Stage, calls: Mapping[str, Call]) -> int:
    """Bytes that the layers after the stage need."""
    inside = {n.name for n in stage.nodes}
    rest = tuple(n for n in stage.graph.nodes if n.name not in inside)
    made = {n.output.name for n in rest}
    read = {t.name: t for n in rest for t in n.inputs if t.name not in made}
    ports = [p for p in stage.graph.inputs if p.tensor.name in read]
    border = replace(stage.graph.inputs[0], tensor=stage.output)
    graph = replace(stage.graph, nodes=rest, inputs=(*ports, border))
    return memory.needed(graph, calls)


def _estimate(stage: Stage, grid: tuple[int, int]) -> int:
    """About how many bytes the stage needs in patches: its inputs, the first patches' results, and the fullest step of a middle patch.

    An output is taken to lie over an input that dies, except for a row of its window.
    """
    patches = stage.patches(grid)
    middle = patches[(grid[0] // 2) * grid[1] + grid[1] // 2]
    boxes = stage.boxes(middle)
    size = {
        n.output.name: math.prod(boxes[n.output.name].shape(n.output.shape[1])) * n.output.bits // 8
        for n in stage.nodes
    }
    last = {t.name: i for i, n in enumerate(stage.nodes) for t in n.inputs}
    most = 0
    for i, node in enumerate(stage.nodes):
        live = sum(
            size[n.output.name]
            for n in stage.nodes[:i]
            if last.get(n.output.name, 0) > i or n.output.name == stage.output.name
        )
        dying = [t for t in node.inputs if last[t.name] == i]
        x = sum(
            size[t.name] if t.name in size else math.prod(boxes[t.name].shape(t.shape[1])) * t.bits // 8 for t in dying
        )
        y = size[node.output.name]
        row = 0
        if node.op in WINDOWS:
            box = boxes[node.output.name]
            row = (window.of(node).span[0] - 1) * y // max(1, box.rows[1] - box.rows[0])
        most = max(most, live + max(x, y) + min(row, x, y))
    inputs = sum(t.bytes for t in stage.inputs.values())
    first_row = patches[0].rows[1] * math.prod(stage.output.shape[1::2]) * stage.output.bits // 8
    return inputs + first_row + most
