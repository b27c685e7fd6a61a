"""Which channels of a traced graph must be removed together.

Every tensor of the graph carries one list of *units* along its channel dimension. A convolution or linear layer gives
each of its output channels a new unit; an addition makes the units of its operands the same (union-find), a
concatenation strings them together, a flatten repeats them. A parameter dimension that runs along a list of units is
recorded as an axis. When the graph has been walked, a *group* is a set of united units: removing a group means
removing its positions from every axis that holds them.

Units that reach an output, a tensor of fixed size, or an op without a rule are protected, and the reason is kept.
The idea is DepGraph's (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"), found here per channel on the
graph of ATen ops, so that slices, channel padding and concatenations need no special cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from .. import layers
from ..model import Model

Axis = tuple[str, int]
"""parameter or buffer name, and the dimension of it that runs along channels"""


@dataclass(frozen=True)
class Track:
    """The units along one dimension of a tensor."""

    axis: int
    units: tuple[int, ...]


Tracked = Track | Sequence[Track | None] | None
"""of a tensor, of a list of tensors (split), or nothing known"""
SAMPLES = 3
"""batch that shapes are taken with: a batch of one could not be told from a dimension that a view adds or drops"""
Count = Callable[[Sequence[int]], int]
"""how many of these units remain"""


@dataclass
class Dependencies:
    """The result of walking a graph, and the state while walking it. Belongs to the graph of one Model."""

    graph: torch.fx.GraphModule
    shapes: dict[Node, tuple[int, ...]]
    tracks: dict[Node, Tracked] = field(default_factory=dict)
    axes: dict[Axis, tuple[int, ...]] = field(default_factory=dict)
    """units along every parameter dimension that runs along channels"""
    consumers: set[Axis] = field(default_factory=set)
    """axes that are multiplied with incoming channels and summed over: input channels of convolution and linear weights"""
    rewrites: list[Callable[[Count], None]] = field(default_factory=list)
    """each rewrites one constant of the graph (a view's size, a pad's amount) for the units that remain"""
    _parent: list[int] = field(default_factory=list)
    _reasons: dict[int, str] = field(default_factory=dict)
    _accounted: set[tuple[Node, str]] = field(default_factory=set)

    def group(self, unit: int) -> int:
        """The representative of all units that are removed together with this one."""
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

    def protected(self) -> dict[int, str]:
        """Why a group must stay, for those that must."""
        found: dict[int, str] = {}
        for unit, reason in self._reasons.items():
            found.setdefault(self.group(unit), reason)
        return found

    def new(self, count: int) -> tuple[int, ...]:
        """Units that nothing ties yet."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return tuple(range(start, start + count))

    def unite(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Make two lists of units the same, element by element."""
        for a, b in zip(first, second, strict=True):
            low, high = sorted((self.group(a), self.group(b)))
            self._parent[high] = low

    def protect(self, units: Sequence[int], reason: str) -> None:
        """Keep these units."""
        for unit in units:
            self._reasons.setdefault(unit, reason)

    def protect_node(self, node: object, reason: str) -> None:
        """Keep whatever units a node carries."""
        tracked = self.tracks.get(node) if isinstance(node, Node) else None
        for track in tracked if isinstance(tracked, Sequence) else [tracked]:
            if track is not None:
                self.protect(track.units, reason)

    def along(self, node: Node, axis: int) -> tuple[int, ...]:
        """Units of a tensor along `axis`; new protected ones when the tensor carries none along it."""
        tracked = self.tracks.get(node)
        if isinstance(tracked, Track) and tracked.axis == axis:
            return tracked.units
        units = self.new(self.shapes[node][axis])
        self.protect(units, f"runs along '{node.name}', whose channels are not followed")
        self.protect_node(node, f"channels reach dimension {axis} of '{node.name}' in a place that is not followed")
        return units

    def bind(self, user: Node, arg: object, axis: int, units: tuple[int, ...]) -> bool:
        """Record that dimension `axis` of the parameter `arg` runs along `units`. False when `arg` is no parameter."""
        if not (isinstance(arg, Node) and arg.op == "get_attr"):
            return False
        name = str(arg.target)
        self._accounted.add((user, name))
        if (name, axis) in self.axes:
            self.unite(self.axes[name, axis], units)
        else:
            self.axes[name, axis] = units
        return True

    def close(self) -> None:
        """Protect what is used in a way no rule accounted for: a weight that another op reads, or under another name."""
        owners: dict[int, str] = {}
        for (name, _), units in self.axes.items():
            other = owners.setdefault(layers.tensor(self.graph, name).data_ptr(), name)
            if other != name:
                self.protect(units, f"'{name}' and '{other}' are one tensor")
                for (parameter, _), theirs in self.axes.items():
                    if parameter == other:
                        self.protect(theirs, f"'{name}' and '{other}' are one tensor")
        for node in self.graph.graph.nodes:
            if node.op != "get_attr":
                continue
            name = str(node.target)
            for user in node.users:
                if (user, name) not in self._accounted:
                    for (parameter, _), units in self.axes.items():
                        if parameter == name:
                            self.protect(units, f"'{name}' is also read by '{user.name}' ({_called(user)})")


def analyse(model: Model) -> Dependencies:
    """Walk the graph of `model` and find its groups."""
    from . import rules

    found = Dependencies(model.graph, layers.shapes(model, batch=SAMPLES))
    for node in model.graph.graph.nodes:
        if node.op == "output":
            for result in node.all_input_nodes:
                found.protect_node(result, "reaches the model's output")
        elif node.op == "call_function":
            rule = rules.find(node)
            if rule is not None:
                found.tracks[node] = rule(found, node)
            else:
                reason = f"reaches {_called(node)} at '{node.name}', for which channel pruning has no rule"
                for source in node.all_input_nodes:
                    found.protect_node(source, reason)
    found.close()
    return found


def _called(node: Node) -> str:
    return layers.op(node) or str(getattr(node.target, "__name__", node.target))
