"""The deployment graph's memory: which bytes live when, and their places in the arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..kernels.op import Call
from . import planner
from .graph import Graph


@dataclass(frozen=True)
class Memory:
    """The arena of a graph."""

    plan: planner.Plan
    offsets: Mapping[str, int]
    """first byte by tensor name; tensors that are aliases share one place"""
    scratch: Mapping[str, int]
    """first byte of a node's work memory, by the node's name, where it needs any"""


def of(graph: Graph, calls: Mapping[str, Call]) -> Memory:
    """Plan the arena for `calls` by node name; alias nodes have none.

    Steps count the nodes. Inputs are written before step 0 and live until their last reader has run; outputs live on
    after the last step.
    """
    root: dict[str, str] = {p.tensor.name: p.tensor.name for p in graph.inputs}
    size = {p.tensor.name: p.tensor.bytes for p in graph.inputs}
    first = dict.fromkeys(root, -1)
    last = dict.fromkeys(root, -1)
    work: list[planner.Buffer] = []
    for step, node in enumerate(graph.nodes):
        for tensor in node.inputs:
            last[root[tensor.name]] = step
        name = node.output.name
        if node.name not in calls:
            root[name] = root[node.inputs[0].name]
            continue
        root[name] = name
        size[name], first[name], last[name] = node.output.bytes, step, step
        if calls[node.name].scratch:
            work.append(planner.Buffer(f"scratch of {node.name}", calls[node.name].scratch, step, step))
    for port in graph.outputs:
        last[root[port.tensor.name]] = len(graph.nodes)
    buffers = [planner.Buffer(n, size[n], first[n], last[n]) for n in size]
    plan = planner.plan([*buffers, *work])
    planner.check(plan)
    places = {p.buffer.name: p.offset for p in plan.placed}
    offsets = {name: places[owner] for name, owner in root.items()}
    scratch = {n: places[f"scratch of {n}"] for n, c in calls.items() if c.scratch}
    return Memory(plan, offsets, scratch)
