"""The residual stream of a pre-norm transformer in the traced graph: what writes into it, which norms read it.

    x0 = embedding;  x1 = x0 + linear(...);  x2 = x1 + linear(...);  ...        every branch begins with linear(norm(x))

Everything that is added to the stream and everything that reads it commutes with one rotation of its channels, when the norms scale whole
tokens only. What does not fit (an input, a table that the head shares, a second reader) is a border, where the tensor has
to be rotated while the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from . import layers, mamba_graph
from .model import Model

CASTS = ("aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.dropout", "aten.alias", "aten.detach")
SILENT = ("aten._assert_tensor_metadata", "aten.sym_size")
"""ops that read a tensor's shape and type, not its values"""
REGROUPS = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.flatten", "aten.repeat_interleave")  # fmt: skip
"""ops that keep the vectors along the last dimension when they keep its size"""
CHOOSING = (
    "aten.slice",
    "aten.select",
    "aten.transpose",
    "aten.permute",
    "aten.cat",
    "aten.index_select",
    "aten.narrow",
)


@dataclass(frozen=True)
class Norm:
    """One norm on the stream: gain * normalized + shift, read by linears alone where it is not a border."""

    node: Node
    """what is read"""
    stream: Node
    gain: Node | None
    shift: Node | None
    centred: bool
    """whether it subtracts the mean (LayerNorm)"""
    readers: tuple[Node, ...]
    """linears with constant weights of their own; () for a border"""
    epsilon: float


@dataclass(frozen=True)
class Stream:
    """The parts of a residual stream."""

    width: int
    writers: tuple[Node, ...]
    """linears and embeddings with constant weights of their own, whose output is added to the stream"""
    constants: tuple[tuple[Node, int], ...]
    """(node, argument): parameters that are added to the stream"""
    inlets: tuple[Node, ...]
    """borders: other tensors that are added to the stream"""
    outlets: tuple[tuple[Node, Node], ...]
    """borders: (stream, reader) of other readers of the stream"""
    norms: tuple[Norm, ...]

    @property
    def borders(self) -> int:
        """Places where the stream has to be rotated while the model runs."""
        return len(self.inlets) + len(self.outlets) + sum(not n.readers for n in self.norms)


def find(model: Model) -> Stream | str:
    """The residual stream, or why the graph has none that is worth a rotation."""
    sizes = layers.shapes(model, 2)
    normed = norms(model, sizes)
    if not any(n.readers for n in normed):
        return "no norm is read by linear layers alone"
    if len({n.centred for n in normed}) > 1:
        return "some norms subtract the mean and others do not"
    width = sizes[normed[0].stream][-1]
    inside: set[Node] = set()
    writers, constants, inlets = [], [], []
    pending = [n.stream for n in normed]
    if any(sizes[s][-1] != width for s in pending):
        return "norms have different widths"
    while pending:
        node = pending.pop()
        if node in inside:
            continue
        inside.add(node)
        if layers.op(node) == "aten.add" and all(isinstance(a, Node) for a in node.args[:2]):
            for index, item in enumerate(node.args[:2]):
                assert isinstance(item, Node)
                if layers.is_parameter(item):
                    constants.append((node, index))
                else:
                    pending.append(item)
        elif keeps_vectors(node, sizes):
            pending += operands(node)
        elif _own_weight(node) and layers.op(node) in ("aten.linear", "aten.embedding"):
            writers.append(node)
        else:
            inlets.append(_converted(node))
    sources = {n.stream for n in normed}
    outlets = [
        (node, user)
        for node in inside
        for user in node.users
        if user not in inside and layers.op(user) not in SILENT and not (node in sources and _inside_norm(node, user))
    ]
    order = {n: i for i, n in enumerate(model.graph.graph.nodes)}
    found = Stream(
        width,
        tuple(sorted(writers, key=order.__getitem__)),
        tuple(constants),
        tuple(sorted(inlets, key=order.__getitem__)),
        tuple(sorted(outlets, key=lambda o: (order[o[0]], order[o[1]]))),
        tuple(normed),
    )
    if normed[0].centred and outlets:
        return f"'{outlets[0][1].name}' reads the stream with its mean, which rotated layer norms do not carry"
    if 2 * found.borders > len(normed):
        return f"{found.borders} places would have to be rotated at run time for {len(normed)} norms"
    return found


def norms(model: Model, sizes: Mapping[Node, tuple[int, ...]]) -> list[Norm]:
    """Every norm of the graph, in order; `sizes` from `layers.shapes`."""
    return [n for n in (_norm(node, sizes) for node in model.graph.graph.nodes) if n is not None]


def _norm(node: Node, sizes: Mapping[Node, tuple[int, ...]]) -> Norm | None:
    """The norm that gives `node`."""
    if layers.op(node) == "aten.layer_norm":
        source, shape, gain, shift, epsilon = (layers.argument(node, n) for n in ("input", "normalized_shape", "weight", "bias", "eps"))  # fmt: skip
        constant = all(p is None or layers.is_parameter(p) for p in (gain, shift))
        return (
            Norm(node, source, gain, shift, True, _readers(node, sizes), epsilon)
            if constant and len(shape) == 1
            else None
        )
    found = mamba_graph.norm(node)
    return None if found is None else Norm(node, found.stream, found.gain, None, False, _readers(node, sizes), 0.0)


def _readers(norm: Node, sizes: Mapping[Node, tuple[int, ...]]) -> tuple[Node, ...]:
    """The linears that read a norm, perhaps a part of its tokens; () when something else does, or one's weight has other readers."""
    pending, found = [norm], []
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if layers.op(user) == "aten.linear" and user.args[0] is node and _own_weight(user):
                found.append(user)
            elif keeps_vectors(user, sizes) and operands(user) == [node]:
                pending.append(user)
            elif layers.op(user) not in SILENT:
                return ()
    return tuple(found)


def _own_weight(node: Node) -> bool:
    """Whether a linear's or an embedding's weight is a parameter that no other node reads."""
    if layers.op(node) not in ("aten.linear", "aten.embedding"):
        return False
    weight = node.args[0 if layers.op(node) == "aten.embedding" else 1]
    bias = layers.argument(node, "bias") if layers.op(node) == "aten.linear" else None
    if not layers.is_parameter(weight) or not (bias is None or layers.is_parameter(bias)):
        return False
    assert isinstance(weight, Node)
    source = weight if weight.op == "get_attr" else weight.args[0]
    assert isinstance(source, Node)
    same = [n for n in node.graph.nodes if n.op == "get_attr" and n.target == source.target]
    return sum(len(n.users) for n in same) == 1 and len(weight.users) == 1


def keeps_vectors(node: Node, sizes: Mapping[Node, tuple[int, ...]]) -> bool:
    """Whether an op only moves, repeats, selects or joins whole vectors along the last dimension."""
    kind, source = layers.op(node), node.args[0] if node.args else None
    if node not in sizes:
        return False
    if kind == "aten.cat":
        rank = len(sizes[node])
        return int(layers.argument(node, "dim")) % rank != rank - 1
    if not isinstance(source, Node) or source not in sizes or not sizes[source] or not sizes[node]:
        return False
    if kind in CASTS:
        return True
    rank, kept = len(sizes[source]), sizes[source][-1] == sizes[node][-1]
    if kind in REGROUPS:
        return kept and sizes[source][-1] > 1
    if kind == "aten.transpose":
        return all(int(d) % rank != rank - 1 for d in node.args[1:3])  # pyright: ignore[reportArgumentType]
    if kind == "aten.permute":
        return int(list(node.args[1])[-1]) % rank == rank - 1  # pyright: ignore[reportArgumentType]
    return kind in CHOOSING and kept and int(layers.argument(node, "dim")) % rank != rank - 1


def _converted(node: Node) -> Node:
    """The one conversion that reads a tensor stored in 16 bits, else the tensor."""
    users = [u for u in node.users if layers.op(u) not in SILENT]
    return users[0] if len(users) == 1 and layers.op(users[0]) in ("aten.to", "aten._to_copy") else node


def operands(node: Node) -> list[Node]:
    """The tensors whose vectors an op for which `keeps_vectors` holds hands on."""
    first = node.args[0]
    return [a for a in (first if isinstance(first, list | tuple) else [first]) if isinstance(a, Node)]


def _inside_norm(stream: Node, user: Node) -> bool:
    """Whether a reader of the stream is a part of a norm."""
    if layers.op(user) in ("aten.rms_norm", "aten.layer_norm"):
        return user.args[0] is stream
    if layers.op(user) == "aten.pow":
        return all(layers.op(u) == "aten.mean" for u in user.users)
    return layers.op(user) == "aten.mul" and any(layers.op(a) == "aten.rsqrt" for a in user.all_input_nodes)
