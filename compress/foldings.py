"""Folding: the channels of a tensor are divided by factors by dividing the constants that it is made from.

The readers of the tensor multiply their columns by the same factors, so the network computes what it did. `find` walks from the
tensor up to its producers and says which constants have to change; it follows every channel by number through reshapes,
attention and repeated heads, and refuses where another reader would see the change. Where nothing can be folded, `divide` inserts
a multiplication.

    producer                                       what is divided
    linear                                         rows of the weight, bias
    layer_norm, rms_norm                           gain and shift
    mul(vector, x), as RMSNorm is often written    the vector
    a * b, a / b                                   one factor; the numerator
    a + b                                          both
    relu(x), -x, x * number, casts, dropout        x: a positive factor passes
    attention(q, k, v), matmul(p, v)               v: the result is linear in it, channel by channel
    views, transposes, repeats, parts              the tensor behind
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from . import layers
from .model import Model

aten = torch.ops.aten
SAME = {aten.relu.default, aten.neg.default, aten.dropout.default, aten._to_copy.default, aten.detach.default}
"""elementwise, and f(x / s) = f(x) / s for s > 0"""
WIDE = (None, torch.float32, torch.float64)
"""casts that round nothing which was folded"""
MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
}
"""elements keep their values and are placed elsewhere, perhaps more than once"""
PARTS = {aten.slice.Tensor, aten.select.int, aten.narrow.default}
"""a part of the tensor; others may read the rest"""
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
Concrete = Mapping[Node, Any]


@dataclass(frozen=True)
class Place:
    """A constant that makes the tensor: argument `argument` of `node` is divided, element by element, by factors[index]."""

    node: Node
    argument: int
    index: torch.Tensor
    """int64, broadcasts to the constant's shape"""

    @property
    def old(self) -> Node | None:
        """The constant, None where there is none yet."""
        return self.node.args[self.argument] if self.argument < len(self.node.args) else None  # pyright: ignore[reportReturnType]

    @property
    def name(self) -> str:
        """The constant's name."""
        return layers.parameter(self.old) or f"{layers.layer(self.node)}.gain"


@dataclass(frozen=True)
class Folding:
    """How the channels of one tensor can be divided by `count` free positive factors."""

    channels: torch.Tensor
    """(channels,) int64: the factor that each channel of the tensor is divided by"""
    count: int
    places: tuple[Place, ...] = ()
    """empty: a multiplication has to be inserted"""
    used: torch.Tensor | None = None
    """(count,) int64: the index, in places, of each factor"""

    @property
    def where(self) -> str:
        """Names of the constants that change, for the receipt."""
        return ", ".join(p.name for p in self.places) or "a multiplication"

    def joined(self, statistic: torch.Tensor, reduce: str = "amax") -> torch.Tensor:
        """(count,) of a statistic (channels,): what channels with a common factor have together ('amax' or 'mean')."""
        made = torch.zeros(self.count, dtype=statistic.dtype)
        return made.scatter_reduce_(0, self.channels, statistic, reduce, include_self=False)


@dataclass(frozen=True)
class _Trail:
    """What a tensor is divided by: a number for each element, its factor's, and the constants behind."""

    ids: torch.Tensor
    """int64, the tensor's shape"""
    size: int
    """numbers go from 0 to size - 1"""
    places: tuple[Place, ...]


class _Sizes(layers.Hollow):
    """Keeps the shape of each tensor and the value of each number."""

    def see(self, value: object) -> object:
        """Also of the tensors in a tuple."""
        return tree_map(lambda v: tuple(v.shape) if isinstance(v, torch.Tensor) else v, value)


def concrete(model: Model) -> Concrete:
    """Shapes and numbers of the graph for a small example, which `find` follows channels with."""
    return _Sizes(model).seen(model.example(2))


def find(module: GraphModule, source: Node, readers: Sequence[Node], sizes: Concrete) -> Folding:
    """How the channels (last dimension) of `source`, as `readers` see it, can be divided."""
    width = sizes[source][-1]
    free = Folding(torch.arange(width), width)
    trail = _Finder(module, sizes).visit(source, frozenset(readers))
    if trail is None:
        return free
    channels = _along_last(trail.ids)
    if channels is None:
        return free
    used, index = torch.unique(channels, return_inverse=True)
    return Folding(index, len(used), trail.places, used)


def divide(module: GraphModule, source: Node, readers: Sequence[Node], folding: Folding, factors: torch.Tensor) -> None:
    """Divide `source`, as `readers` see it, by `factors` (count,) > 0. The readers have still to be multiplied: `scale_columns`."""
    if not folding.places:
        _insert(module, source, readers, 1 / factors.double()[folding.channels])
        return
    assert folding.used is not None
    size = 1 + max(int(p.index.max()) for p in folding.places)
    spread = torch.ones(size, dtype=torch.float64).index_copy_(0, folding.used, factors.double())
    for place in folding.places:
        divisor = spread[place.index]
        value = _wide(module, place.old) if place.old is not None else torch.ones_like(divisor)
        layers.store(module, place.node, place.argument, place.name, _stored(value / divisor, place.node))


def scale_columns(module: GraphModule, reader: Node, factors: torch.Tensor) -> None:
    """Multiply the columns of a linear's weight (out, in) by factors (in,)."""
    old = reader.args[1]
    name = layers.parameter(old)
    assert name is not None
    layers.store(module, reader, 1, name, _stored(_wide(module, old) * factors.double(), reader))


def _wide(module: GraphModule, node: object) -> torch.Tensor:
    """A parameter in float64."""
    assert isinstance(node, Node)
    inner = node if layers.is_constant(node) else node.args[0]
    assert isinstance(inner, Node)
    return layers.read(module, inner).double()


def _stored(value: torch.Tensor, node: Node) -> torch.Tensor:
    """float32, or float64 where `node` computes in it."""
    example = node.meta.get("val")
    return value if isinstance(example, torch.Tensor) and example.dtype == torch.float64 else value.float()


def _insert(module: GraphModule, source: Node, readers: Sequence[Node], factors: torch.Tensor) -> None:
    """Let readers see source * factors (channels,)."""
    first = next(n for n in module.graph.nodes if n in set(readers))
    with module.graph.inserting_before(first):
        name = f"{layers.layer(first)}.input_scale.weight"
        vector = layers.add_parameter(module, name, _stored(factors, first))
        made = module.graph.call_function(aten.mul.Tensor, (source, vector))
    made.meta["val"] = source.meta.get("val")
    for reader in readers:
        reader.replace_input_with(source, made)


def _along_last(ids: torch.Tensor) -> torch.Tensor | None:
    """The numbers along the last dimension, when they are the same everywhere else; None when they are not."""
    rows = ids.reshape(-1, ids.shape[-1])
    return rows[0] if bool((rows == rows[0]).all()) else None


class _Finder:
    def __init__(self, module: GraphModule, sizes: Concrete) -> None:
        self.module, self.sizes = module, sizes

    def visit(self, node: Node, readers: frozenset[Node]) -> _Trail | None:
        """What `node` is made from, or None when it cannot be divided for `readers` alone."""
        if node.op != "call_function" or self._others(node, readers):
            return None
        return self._through(node)

    def _others(self, node: Node, readers: frozenset[Node]) -> list[Node]:
        """Readers of the tensor besides `readers`; who only asks for its shape is none."""
        return [u for u in node.users if u not in readers and u.target is not aten.sym_size.int]

    def _through(self, node: Node) -> _Trail | None:
        target, shape = node.target, self.sizes[node]
        if target is aten.linear.default and layers.is_parameter(node.args[1]):
            return self._rows(node, shape)
        if target in (aten.layer_norm.default, aten.rms_norm.default):
            return self._gain(node, shape, (2, 3) if target is aten.layer_norm.default else (2,))
        if target is aten.mul.Tensor:
            return self._product(node, shape)
        if target is aten.div.Tensor:
            return None if node.args[0] is node.args[1] else self._same(node, node.args[0], shape)
        if target is aten.add.Tensor:
            return self._sum(node, shape)
        if target is aten._to_copy.default and node.kwargs.get("dtype") not in WIDE:
            return None
        if target in SAME:
            return self._same(node, node.args[0], shape)
        if target is aten.scaled_dot_product_attention.default:
            return self._mixed(node, layers.argument(node, "value"), shape)
        if target in (aten.matmul.default, aten.bmm.default):
            return self._mixed(node, node.args[1], shape)
        if target in MOVES:
            return self._moved(node)
        if target in PARTS:
            return self._part(node)
        if target is operator.getitem:
            return self._piece(node)
        return None

    def _rows(self, node: Node, shape: tuple[int, ...]) -> _Trail | None:
        index = torch.arange(shape[-1])
        places = [Place(node, 1, index[:, None])]
        if len(node.args) > 2 and node.args[2] is not None:
            if not layers.is_parameter(node.args[2]):
                return None
            places.append(Place(node, 2, index))
        return _Trail(index.expand(shape), shape[-1], tuple(places))

    def _gain(self, node: Node, shape: tuple[int, ...], arguments: tuple[int, ...]) -> _Trail | None:
        if tuple(layers.argument(node, "normalized_shape")) != shape[-1:]:
            return None
        index = torch.arange(shape[-1])
        places = []
        for argument in arguments:
            value = node.args[argument] if argument < len(node.args) else None
            if value is not None and not layers.is_parameter(value):
                return None
            if value is not None or argument == 2:  # a norm without gain gets one
                places.append(Place(node, argument, index))
        return _Trail(index.expand(shape), shape[-1], tuple(places))

    def _product(self, node: Node, shape: tuple[int, ...]) -> _Trail | None:
        for position in (0, 1):
            factor = node.args[position]
            if layers.is_parameter(factor) and self._vector(factor) == shape[-1]:
                index = torch.arange(shape[-1])
                return _Trail(index.expand(shape), shape[-1], (Place(node, position, index),))
        if node.args[0] is node.args[1]:
            return None
        for factor in node.args[:2]:
            trail = self._same(node, factor, shape)
            if trail is not None:
                return trail
        return None

    def _vector(self, node: Any) -> int | None:
        """Length of a constant that varies along its last dimension only."""
        shape = self.sizes[node]
        return shape[-1] if shape and all(d == 1 for d in shape[:-1]) else None

    def _same(self, node: Node, operand: Any, shape: tuple[int, ...]) -> _Trail | None:
        """The result has the operand's elements in their places."""
        if not isinstance(operand, Node) or layers.is_parameter(operand) or self.sizes[operand] != shape:
            return None
        return self.visit(operand, frozenset([node]))

    def _sum(self, node: Node, shape: tuple[int, ...]) -> _Trail | None:
        left, right = node.args[:2]
        for one, other, position in ((left, right, 1), (right, left, 0)):
            if layers.is_parameter(other):
                trail = self._same(node, one, shape)
                index = None if trail is None else _along_last(trail.ids)
                if trail is None or index is None or self._vector(other) != shape[-1]:
                    return None
                return _Trail(trail.ids, trail.size, (*trail.places, Place(node, position, index)))
        both = [self._same(node, operand, shape) for operand in (left, right)]
        if both[0] is None or both[1] is None or left is right:
            return None
        if both[0].size != both[1].size or not torch.equal(both[0].ids, both[1].ids):
            return None
        return _Trail(both[0].ids, both[0].size, both[0].places + both[1].places)

    def _mixed(self, node: Node, value: Any, shape: tuple[int, ...]) -> _Trail | None:
        """Each result row is a combination of rows of `value`: its channels keep their places when all rows agree on the factors."""
        if not isinstance(value, Node) or self._sources(node).count(value) > 1:
            return None
        trail = self.visit(value, frozenset([node]))
        if trail is None or trail.ids.ndim < 2:
            return None
        ids = trail.ids
        if not bool((ids == ids[..., :1, :]).all()):
            return None
        if ids.ndim == len(shape) and ids.shape[:-2] != shape[:-2] and ids.shape[-3] != 1:
            ids = ids.repeat_interleave(shape[-3] // ids.shape[-3], -3)  # grouped-query attention inside the op
        return _Trail(ids[..., :1, :].expand(shape), trail.size, trail.places)

    def _sources(self, node: Node) -> list[Node]:
        found: list[Node] = []
        map_arg((node.args, node.kwargs), found.append)
        return found

    def _moved(self, node: Node) -> _Trail | None:
        operand = node.args[0]
        assert isinstance(operand, Node)
        trail = self.visit(operand, frozenset([node]))
        return None if trail is None else _Trail(self._apply(node, trail.ids), trail.size, trail.places)

    def _part(self, node: Node) -> _Trail | None:
        operand = node.args[0]
        assert isinstance(operand, Node)
        return self._chosen(node, operand, [u for u in operand.users if u.target in PARTS], self._apply)  # fmt: skip

    def _piece(self, node: Node) -> _Trail | None:
        split = node.args[0]
        if not isinstance(split, Node) or split.target not in SPLITS:
            return None
        operand = split.args[0]
        assert isinstance(operand, Node)
        if self._others(operand, frozenset([split])) or any(u.target is not operator.getitem for u in split.users):
            return None
        return self._chosen(node, operand, list(split.users), lambda u, ids: self._apply(split, ids)[u.args[1]], split)

    def _chosen(
        self, node: Node, operand: Node, parts: list[Node], take: Callable[[Node, torch.Tensor], torch.Tensor], reader: Node | None = None,
    ) -> _Trail | None:  # fmt: skip
        """`node` is one of `parts` of `operand`; the others must not hold a channel with a factor of this one's."""
        trail = self.visit(operand, frozenset(parts) if reader is None else frozenset([reader]))
        if trail is None:
            return None
        own = take(node, trail.ids)
        for other in parts:
            if other is not node and bool(torch.isin(take(other, trail.ids), own).any()):
                return None
        return _Trail(own, trail.size, trail.places)

    def _apply(self, node: Node, ids: torch.Tensor) -> Any:
        """The op, done to the numbers."""
        rest, named = map_arg((node.args[1:], dict(node.kwargs)), lambda n: self.sizes[n])
        assert callable(node.target)
        return node.target(ids, *rest, **named)
