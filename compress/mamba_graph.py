"""Where the parts of a Mamba block are in a traced graph, and the residual stream that the blocks share.

The graph is the one that compress/mamba.py makes: linear -> split -> conv1d -> silu -> (linear -> split, linear -> softplus)
-> selective_scan -> times silu of the other half -> linear.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from ..common.errors import PlanishError
from . import layers
from .model import Model

SCAN = "planish.selective_scan"


@dataclass(frozen=True)
class Block:
    """The nodes of one Mamba block; a linear's name is a node of aten.linear."""

    name: str
    in_proj: Node
    """(batch, time, width) to (batch, time, 2 channels)"""
    z: Node
    """the half of in_proj's output that becomes the gate, (batch, time, channels)"""
    line: Node
    """what the convolution reads, (batch, channels, taps - 1 + time)"""
    conv: Node
    x: Node
    """the convolution's activated output, (batch, time, channels); x_proj and the scan read it"""
    x_proj: Node
    low: Node
    """(batch, time, rank), what dt_proj reads"""
    b: Node
    c: Node
    """(batch, time, states)"""
    dt_proj: Node
    scan: Node
    y: Node
    """(batch, time, channels)"""
    gate: Node
    """silu of z"""
    product: Node
    """y times gate, which out_proj reads"""
    out_proj: Node


def scans(model: Model) -> list[Node]:
    """Every node of planish::selective_scan, in graph order."""
    return [n for n in model.graph.graph.nodes if layers.op(n) == SCAN]


def blocks(model: Model) -> list[Block]:
    """Every Mamba block in graph order. Raises PlanishError when there is none, and for one that is built otherwise."""
    found = [_block(n) for n in scans(model)]
    if not found:
        raise PlanishError(f"'{model.source}' has no Mamba block: no selective scan is in its graph")
    return found


def _block(scan: Node) -> Block:
    name = (layers.parameter(scan.args[2]) or scan.name).rpartition(".")[0]

    def expect(node: object, op: str) -> Node:
        if not isinstance(node, Node) or layers.op(node) != op:
            found = layers.op(node) or node.name if isinstance(node, Node) else node
            raise PlanishError(f"Mamba block '{name}': {found} stands where {op} is expected; rotate a block only once")
        return node

    def item(node: object, index: int) -> Node:
        if not isinstance(node, Node) or node.target is not operator.getitem or node.args[1] != index:
            raise PlanishError(f"Mamba block '{name}': {node} stands where output {index} of a split is expected")
        return node

    def reader(node: Node, op: str) -> Node:
        users = [u for u in node.users if layers.op(u) == op]
        return expect(users[0] if len(users) == 1 else None, op)

    x, delta, _, b, c, *_ = scan.args
    x = expect(x, "aten.transpose")
    conv = expect(expect(x.args[0], "aten.silu").args[0], "aten.conv1d")
    line = expect(conv.args[0], "aten.cat")
    split = expect(item(b, 1).args[0], "aten.split_with_sizes")
    dt_proj = expect(expect(delta, "aten.softplus").args[0], "aten.linear")
    halves = line.args[0]
    assert isinstance(halves, list | tuple)
    both = item(expect(halves[-1], "aten.transpose").args[0], 0).args[0]
    z = next((u for u in expect(both, "aten.split_with_sizes").users if u.args[1] == 1), None)
    gate = reader(item(z, 1), "aten.silu")
    product = reader(gate, "aten.mul")
    y = item(next((a for a in product.all_input_nodes if a is not gate), None), 0)
    return Block(
        name,
        expect(expect(both, "aten.split_with_sizes").args[0], "aten.linear"),
        item(z, 1),
        line,
        conv,
        x,
        expect(split.args[0], "aten.linear"),
        item(dt_proj.args[0], 0),
        item(b, 1),
        item(c, 2),
        dt_proj,
        scan,
        y,
        gate,
        product,
        reader(product, "aten.linear"),
    )


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: gain times the normalized stream."""

    node: Node
    """what the next linears read"""
    gain: Node
    """the parameter (width,)"""
    stream: Node
    """what is normalized"""

    def without_gain(self) -> None:
        """Let the norm give the normalized stream itself; the node keeps its readers or is replaced."""
        if layers.op(self.node) == "aten.rms_norm":
            layers.set_argument(self.node, "weight", None)
        else:
            normal = next(a for a in self.node.all_input_nodes if a is not self.gain)
            self.node.replace_all_uses_with(normal)
            self.node.graph.erase_node(self.node)


def norm(node: Node) -> Norm | None:
    """The RMS norm that gives `node`, None when it is something else."""
    if layers.op(node) == "aten.rms_norm":
        source, gain = node.args[0], layers.argument(node, "weight")
        return Norm(node, gain, source) if isinstance(source, Node) and layers.is_parameter(gain) else None
    if layers.op(node) != "aten.mul":
        return None
    gain = next((a for a in node.all_input_nodes if layers.is_parameter(a)), None)
    normal = next((a for a in node.all_input_nodes if a is not gain), None)
    if gain is None or normal is None:
        return None
    product = _converted(normal)
    factor = next((a for a in product.all_input_nodes if layers.op(a) == "aten.rsqrt"), None)
    if layers.op(product) != "aten.mul" or factor is None:
        return None
    stream = next((a for a in product.all_input_nodes if a is not factor), None)
    inside = factor.args[0]
    mean = inside.args[0] if isinstance(inside, Node) and layers.op(inside) == "aten.add" else None
    power = mean.args[0] if isinstance(mean, Node) and layers.op(mean) == "aten.mean" else None
    if not isinstance(power, Node) or layers.op(power) != "aten.pow" or power.args != (stream, 2):
        return None
    return Norm(node, gain, stream) if stream is not None else None


def _converted(node: Node) -> Node:
    """What a conversion between float types reads."""
    while layers.op(node) in ("aten.to", "aten._to_copy") and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


@dataclass(frozen=True)
class Residual:
    """A residual stream that can be rotated: everything that writes into it and reads from it."""

    embeddings: tuple[Node, ...]
    writers: tuple[Node, ...]
    """linears whose output is added to the stream"""
    norms: tuple[tuple[Norm, tuple[Node, ...]], ...]
    """each norm on the stream with the linears that read it"""


def residual(model: Model) -> Residual | str:
    """The residual stream, or why it cannot be rotated."""
    norms: list[tuple[Norm, tuple[Node, ...]]] = []
    for node in model.graph.graph.nodes:
        found = norm(node) if node.op == "call_function" else None
        if found is None:
            continue
        readers = tuple(u for u in node.users if layers.op(u) != "aten._assert_tensor_metadata")
        if not all(layers.op(r) == "aten.linear" and layers.is_parameter(r.args[1]) for r in readers):
            return f"'{node.name}' is read by more than linear layers"
        norms.append((found, readers))
    if not norms:
        return "no RMS norm was found"
    inside: set[Node] = set()
    sources: list[Node] = []
    pending = [n.stream for n, _ in norms]
    while pending:
        node = pending.pop()
        if node in inside:
            continue
        inside.add(node)
        kind = layers.op(node)
        if kind in ("aten.to", "aten._to_copy") or (kind == "aten.add" and len(node.all_input_nodes) == 2):
            pending += node.all_input_nodes
        elif kind in ("aten.linear", "aten.embedding"):
            sources.append(node)
        else:
            return f"the stream comes from '{node.name}' ({kind or node.op})"
    streams = {n.stream for n, _ in norms}
    for node in inside:
        for user in node.users:
            known = user in inside or layers.op(user) == "aten._assert_tensor_metadata"
            if not known and not (node in streams and layers.op(user) in ("aten.pow", "aten.mul", "aten.rms_norm")):
                return f"the stream is read by '{user.name}' ({layers.op(user) or user.op})"
    order = {n: i for i, n in enumerate(model.graph.graph.nodes)}
    sources.sort(key=order.__getitem__)
    return Residual(
        tuple(s for s in sources if layers.op(s) == "aten.embedding"),
        tuple(s for s in sources if layers.op(s) == "aten.linear"),
        tuple(norms),
    )
