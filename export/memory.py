"""The deployment graph's memory: which bytes live when, which may lie over which, and their places in the arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..kernels import paste
from ..kernels.layout import ALIGNMENT
from ..kernels.op import Call, Node
from . import planner
from .graph import Graph

SLOT = "slot"
"""attribute of a node: outputs of the same slot are placed together (see planner.Buffer.slot)"""


@dataclass(frozen=True)
class View:
    """A tensor's place: bytes of the buffer called `root`, from byte `begin` on."""

    root: str
    begin: int


@dataclass(frozen=True)
class Memory:
    """The arena of a graph."""

    plan: planner.Plan
    bound: int
    """bytes of tensors that live at once in the fullest step: what a plan without scratch and overlaps needs at least"""
    views: Mapping[str, View]
    """by tensor name"""
    offsets: Mapping[str, int]
    """first byte in the arena by tensor name"""
    scratch: Mapping[str, int]
    """first byte of a node's work memory, by the node's name, where it needs any"""


@dataclass
class _Root:
    """How a buffer is used."""

    size: int
    writes: list[tuple[int, int]] = field(default_factory=list)
    """(step, end of what is written)"""
    reads: list[tuple[int, int]] = field(default_factory=list)
    """(step, first byte that is read)"""

    @property
    def first(self) -> int:
        return self.writes[0][0]

    @property
    def last(self) -> int:
        return max(step for step, _ in [*self.writes, *self.reads])


def of(graph: Graph, calls: Mapping[str, Call]) -> Memory:
    """Plan the arena for `calls` by node name; nodes that run no code (`idle`) have none.

    Steps count the nodes. Inputs are written before step 0 and live until their last reader has run; outputs live on
    after the last step.
    """
    places = views(graph)
    tensors, work, sharings = demand(graph, calls, places)
    plan = planner.plan([*tensors, *work], ALIGNMENT, sharings)
    planner.check(plan)
    begin = {p.buffer.name: p.offset for p in plan.placed}
    offsets = {name: begin[view.root] + view.begin for name, view in places.items()}
    scratch = {n: begin[_scratch(n)] for n, c in calls.items() if c.scratch}
    return Memory(plan, planner.least(tensors), places, offsets, scratch)


def needed(graph: Graph, calls: Mapping[str, Call]) -> int:
    """Bytes that the arena needs at least, without a plan: the fullest step, scratch and overlaps included."""
    tensors, work, sharings = demand(graph, calls, views(graph))
    return planner.least([*tensors, *work], sharings, ALIGNMENT)


def bound(graph: Graph) -> int:
    """Bytes of tensors that live at once in the fullest step, without scratch and overlaps."""
    places = views(graph)
    return planner.least(_buffers(_roots(graph, {}, places)))


def idle(graph: Graph) -> set[str]:
    """Names of the nodes that run no code: their output is a view of an input, or was computed where it belongs."""
    inside = _inside(graph)
    return {
        n.name for n in graph.nodes if graph.view(n) is not None or (n.op == "paste" and n.inputs[0].name in inside)
    }


def views(graph: Graph) -> dict[str, View]:
    """The place of every tensor."""
    found = {p.tensor.name: View(p.tensor.name, 0) for p in graph.inputs} | _inside(graph)
    for node in graph.nodes:
        begin = graph.view(node)
        if begin is not None:
            source = found[node.inputs[0].name]
            found[node.output.name] = View(source.root, source.begin + begin)
        elif node.op == "paste" and len(node.inputs) > 1:
            found[node.output.name] = found[node.inputs[1].name]
        elif node.output.name not in found:
            found[node.output.name] = View(node.output.name, 0)
    return found


def _inside(graph: Graph) -> dict[str, View]:
    """Blocks that are computed inside the map that they are pasted into, by tensor name."""
    maps: dict[str, str] = {}
    made = {n.output.name for n in graph.nodes if graph.view(n) is None and n.op != "paste"}
    uses: dict[str, int] = {}
    for name in [t.name for n in graph.nodes for t in n.inputs] + [p.tensor.name for p in graph.outputs]:
        uses[name] = uses.get(name, 0) + 1
    found: dict[str, View] = {}
    for node in graph.nodes:
        if node.op != "paste":
            continue
        block, *before = (t.name for t in node.inputs)
        root = maps[before[0]] if before else node.output.name
        maps[node.output.name] = root
        begin = paste.inside(node)
        if begin is not None and block in made and uses[block] == 1:
            found[block] = View(root, begin)
    return found


def demand(
    graph: Graph, calls: Mapping[str, Call], places: Mapping[str, View]
) -> tuple[list[planner.Buffer], list[planner.Buffer], list[planner.Sharing]]:
    """Buffers of tensors, work memory of kernels, and which of them may overlap."""
    roots = _roots(graph, calls, places)
    slots = {n.output.name: n.attributes[SLOT] for n in graph.nodes if SLOT in n.attributes}
    tensors = [replace(b, slot=slots.get(b.name)) for b in _buffers(roots)]
    work = [
        planner.Buffer(
            _scratch(n.name),
            calls[n.name].scratch,
            step,
            step,
            _scratch(slots[n.output.name]) if n.output.name in slots else None,
        )
        for step, n in enumerate(graph.nodes)
        if n.name in calls and calls[n.name].scratch
    ]
    return tensors, work, _sharings(graph, calls, places, roots)


def _buffers(roots: Mapping[str, _Root]) -> list[planner.Buffer]:
    return [planner.Buffer(name, root.size, root.first, root.last) for name, root in roots.items()]


def _roots(graph: Graph, calls: Mapping[str, Call], places: Mapping[str, View]) -> dict[str, _Root]:
    """Every buffer with its writes and reads in the order of the steps."""
    found: dict[str, _Root] = {}
    tensors = graph.tensors
    for port in graph.inputs:
        found[port.tensor.name] = _Root(port.tensor.bytes, [(-1, port.tensor.bytes)])
    silent = idle(graph)
    sizes = {n.output.name: n.output.bytes for n in graph.nodes}
    for step, node in enumerate(graph.nodes):
        if node.name in silent:
            continue
        call = calls.get(node.name)
        for i, tensor in enumerate(node.inputs):
            if call is None or i != call.updates:
                view = places[tensor.name]
                found[view.root].reads.append((step, view.begin + (call.first_read if call and i == 0 else 0)))
        view = places[node.output.name]
        end = call.written if call and call.written is not None else tensors[node.output.name].bytes
        found.setdefault(view.root, _Root(sizes[view.root])).writes.append((step, view.begin + end))
    for port in graph.outputs:
        found[places[port.tensor.name].root].reads.append((len(graph.nodes), 0))
    return found


def _sharings(
    graph: Graph, calls: Mapping[str, Call], places: Mapping[str, View], roots: Mapping[str, _Root]
) -> list[planner.Sharing]:
    """What may lie over what: y over x when x is complete before y begins, and all that is written of y lies below what is still
    to be read of x, in every step after, and in the same step as the kernel allows.
    """
    found: list[planner.Sharing] = []
    for y, written in roots.items():
        for x, read in roots.items():
            if x == y or not read.writes[-1][0] < written.first <= read.last or written.size == 0:
                continue
            distance = _distance(graph, calls, places, (x, read), (y, written))
            same = _in_place(graph, calls, places, (x, read), (y, written))
            if distance < written.size or same:
                found.append(planner.Sharing(y, x, distance if distance < written.size else None, same))
    return found


def _distance(
    graph: Graph,
    calls: Mapping[str, Call],
    places: Mapping[str, View],
    x: tuple[str, _Root],
    y: tuple[str, _Root],
) -> int:
    """How far y must begin before x at least; y's size where it must be apart."""
    (x_name, read), (y_name, written) = x, y
    distance, end = 0, 0
    waiting = sorted(written.writes)
    for step, first in sorted(read.reads):
        while waiting and waiting[0][0] < step:
            end = max(end, waiting.pop(0)[1])
        distance = max(distance, end - first)
        if waiting and waiting[0][0] == step:  # the node that reads x here writes y
            node = graph.nodes[step]
            distance = max(distance, _within(node, calls.get(node.name), places, x_name, y_name, waiting[0][1], first))
    return min(distance, written.size)


def _within(node: Node, call: Call | None, places: Mapping[str, View], x: str, y: str, end: int, first: int) -> int:
    """The same for one node that reads x and writes y."""
    begins = [i for i, t in enumerate(node.inputs) if places[t.name].root == x and (call is None or i != call.updates)]
    if call is not None and call.overlap is not None and begins == [0]:
        return call.overlap + places[node.output.name].begin - places[node.inputs[0].name].begin
    return end - first


def _in_place(
    graph: Graph,
    calls: Mapping[str, Call],
    places: Mapping[str, View],
    x: tuple[str, _Root],
    y: tuple[str, _Root],
) -> bool:
    """Whether y may begin where x does: one node makes it, whose kernel says so, and x is not read afterwards."""
    (x_name, read), (_, written) = x, y
    if read.size != written.size or len(written.writes) != 1 or read.last != written.first:
        return False
    node = graph.nodes[written.first]
    call = calls.get(node.name)
    readers = [i for i, t in enumerate(node.inputs) if places[t.name].root == x_name]
    return (
        call is not None
        and all(i in call.in_place and node.inputs[i].bytes == read.size for i in readers)
        and node.output.bytes == written.size
    )


def _scratch(node: str) -> str:
    return f"scratch of {node}"
