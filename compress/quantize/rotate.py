"""Rotations that spread outliers over all channels, exact in float: a pass in front of a quantizing one.

After QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2024). Row vectors: a tensor X that a linear y = X W^T reads becomes X R with R
orthogonal, and W becomes W R, so y stays.

    R1  residual stream    offline: everything that writes into the stream and reads it is multiplied once; gains and shifts of the
                           norms are folded into the next linears first, LayerNorm's mean into the linears before it
    R2  values of a head   offline: rows of the value projection, columns of the output projection; cached values are then rotated too
    R4  all other inputs   at run time, planish::hadamard in front of the linear: down_proj, and every layer where R1 or R2 does not fit;
                           there too the gains and shifts of norms are folded first

R is a Hadamard matrix with random signs, in equal blocks where the size has none. For R1 it may be K H instead, K the eigenvectors of the
second moments of what the norms give (float64): each channel of X K H then has the same mean square (MambaQuant, section 4.1).
Where a tensor enters or leaves the stream other than through a linear of its own, as with an embedding that the head shares, the
rotation stands in the graph. Computed in float64 and rounded once, to float32; tables and heads that are stored in 16 bits stay so. What was done, and where it did not fit and why, is in the receipt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from ...common.errors import PlanishError
from ...kernels.hadamard import largest_block
from .. import heads, layers, stream
from ..model import Entry, Model
from ..moments import Moments
from ..passes import Context
from ..stream import Stream
from .linears import Chosen
from .mamba_rotations import klt_hadamard, observe

aten = torch.ops.aten
hadamard = torch.ops.planish.hadamard.default


class Rotation:
    """R (n, n) for row vectors x R: (K) S H with signs S and Hadamard blocks on the diagonal."""

    def __init__(self, n: int, generator: torch.Generator, second: torch.Tensor | None = None) -> None:
        """`second` (n, n) are the second moments whose K is taken; None for S H alone."""
        self.signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1  # (n,)
        self.block = largest_block(n)
        self.matrix: torch.Tensor | None = None
        if second is not None:
            self.matrix = klt_hadamard(second, self._spread(torch.eye(n, dtype=torch.float64)))  # (n, n)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        return hadamard(x, self.signs, self.block, False)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x (..., n) float64, rotated."""
        return self._spread(x) if self.matrix is None else x @ self.matrix

    def insert(self, module: GraphModule, source: Node, name: str, back: bool) -> Node:
        """A node behind `source` (at the graph's insert point) with its rotation; `back` for the inverse."""
        graph = module.graph
        if self.matrix is None:
            args: tuple[Any, ...] = (source, layers.add_buffer(module, f"{name}.signs", _like(self.signs, source)), self.block, back)  # fmt: skip
            made = graph.call_function(hadamard, args)
        else:
            matrix = self.matrix.T if back else self.matrix
            args = (source, layers.add_buffer(module, f"{name}.matrix", _like(matrix, source)))
            made = graph.call_function(aten.matmul.default, args)
        made.meta["val"] = source.meta.get("val")
        return made

    @property
    def text(self) -> str:
        """For the receipt."""
        size = len(self.signs)
        if self.block == size:
            found = f"a Hadamard matrix of order {size}"
        elif self.block > 1:
            found = f"{size // self.block} Hadamard blocks of order {self.block} (none is known for {size})"
        else:
            found = f"signs alone ({size} is odd)"
        return found if self.matrix is None else f"K times {found}"


class Rotate(Chosen):
    """Hadamard rotations of what linear layers read; the model stays float and computes the same."""

    kind: Literal["hadamard", "klt-hadamard"] = "hadamard"
    """of R1; klt-hadamard takes calibration data"""
    residual: bool = True
    """R1; without it the layers that read the stream are rotated at run time"""
    attention: Literal["heads", "online", "none"] = "heads"
    """what the output projection reads: each head offline, the whole at run time, or left"""
    online: bool = True
    """rotate at run time what no rotation offline reaches"""

    def apply(self, model: Model, context: Context) -> Model:
        """Rotate. Raises PlanishError for a quantized model, a glob that matches no layer, and missing data."""
        layers.refuse_quantized(model, "quantize.rotate")
        wanted = self.wanted(model)
        model = model.editable()
        module, entries = model.graph, []
        done: set[Node] = set()

        def settle() -> None:
            """Let rewritten weights go to the journal, and the pages of those that were read."""
            context.journal.spill(module)
            context.journal.release()

        if self.residual:
            found = stream.find(model)
            if isinstance(found, str):
                entries.append(Entry("residual stream", "left", f"not rotated offline: {found}", 0, 0))
            else:
                second = self._second(model, found, context) if self.kind == "klt-hadamard" else None
                rotation = Rotation(found.width, context.generator, second)
                entries += _rotate_stream(module, found, rotation, wanted, settle)
                done |= {r for n in found.norms for r in n.readers}
        if self.online:
            norms = [n for n in stream.norms(model, layers.shapes(model)) if not done & set(n.readers)]
            entries += _fold_gains(module, norms, settle)
        joined = {v.joined: v for v in heads.find(model) if isinstance(v, heads.Values)}
        if self.attention == "heads":
            entries += [Entry("values", "left", f"not rotated offline: {v}", 0, 0) for v in heads.find(model) if isinstance(v, str)]  # fmt: skip
            for values in joined.values():
                entries.append(_rotate_heads(module, values, Rotation(values.size, context.generator)))
                settle()
            done |= set(joined)
        elif self.attention == "none":
            done |= set(joined)
        if self.online:
            for group in _groups([n for n in module.graph.nodes if n not in done], wanted):
                entries.append(_rotate_input(module, group, context.generator))
                settle()
        if not any(e.action == "folded" for e in entries):
            raise PlanishError(
                f"quantize.rotate: nothing of '{model.source}' was rotated; it takes linear layers with constant weights "
                + "".join(f"({e.tensor}: {e.reason})" for e in entries[:1])
            )
        layers.drop_unused(module)
        return model.with_receipt(*entries)

    def _second(self, model: Model, found: Stream, context: Context) -> torch.Tensor:
        """Second moments (width, width) float64 of the normalized stream, summed over the norms that linears read."""
        batches = self.batches(context, model)
        moments = Moments(found.width, products=True)

        def see(value: torch.Tensor) -> None:
            wide = value.float()
            wide = wide - wide.mean(-1, keepdim=True) if found.norms[0].centred else wide
            moments.add(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6), "norm")

        observe(model.graph, dict.fromkeys((n.stream for n in found.norms if n.readers), see), lambda: batches)
        return moments.hessian()


def _groups(nodes: Sequence[Node], wanted: Callable[[str], bool]) -> list[list[Node]]:
    """The linears with constant weights whose names are wanted, those that read the same tensor together, in graph order."""
    found: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.target is not aten.linear.default or not wanted(layers.layer(node)):
            continue
        source, weight, bias = node.args[0], node.args[1], layers.argument(node, "bias")
        if isinstance(source, Node) and layers.is_parameter(weight) and (bias is None or layers.is_parameter(bias)):
            found.setdefault(source, []).append(node)
    return list(found.values())


def _rotate_stream(
    module: GraphModule,
    found: Stream,
    rotation: Rotation,
    wanted: Callable[[str], bool],
    settle: Callable[[], None],
) -> list[Entry]:
    """R1 in place; the lines of the receipt. Layers that are not `wanted` are rotated too, and stay in the type they are stored in.

    `settle` is called whenever weights have been rewritten.
    """
    centred = found.norms[0].centred

    def written(rows: torch.Tensor) -> torch.Tensor:
        """What is added to the stream (..., width), without its mean where the norms take that off, rotated."""
        return rotation.turn(rows - rows.mean(-1, keepdim=True) if centred else rows)

    for index, norm in enumerate(found.norms):
        normal = _normalized(module, norm)
        if norm.readers:
            for node in norm.readers:
                _fold_norm(module, norm, node, rotation, alike=not wanted(layers.layer(node)))
                settle()
            norm.node.replace_all_uses_with(normal)
        else:
            _restore(module, norm, normal, rotation, f"rotation.norm_{index}")
    for node in found.writers:
        if layers.op(node) == "aten.embedding":
            _write_alike(module, node, 0, written(_read(module, node.args[0])))
            settle()
            continue
        _write(module, node, 1, written(_read(module, node.args[1]).T).T)
        if layers.argument(node, "bias") is not None:
            _write(module, node, 2, written(_read(module, node.args[2])))
        settle()
    for node, index in found.constants:
        _write(module, node, index, written(_read(module, node.args[index]).expand(*_read(module, node.args[index]).shape[:-1], found.width)))  # fmt: skip
    graph = module.graph
    for index, node in enumerate(found.inlets):
        users = list(node.users)
        with graph.inserting_after(node):
            anchor = graph.call_function(aten.detach.default, (node,))
        with graph.inserting_before(anchor):
            source = node
            if centred:
                mean = graph.call_function(aten.mean.dim, (node, [-1], True))
                source = graph.call_function(aten.sub.Tensor, (node, mean))
                source.meta["val"] = node.meta.get("val")
            made = rotation.insert(module, source, f"rotation.inlet_{index}", back=False)
        graph.erase_node(anchor)
        for user in users:
            if layers.op(user) not in stream.SILENT:
                user.replace_input_with(node, made)
    for index, (node, user) in enumerate(found.outlets):
        with graph.inserting_before(user):
            made = rotation.insert(module, node, f"rotation.outlet_{index}", back=True)
        user.replace_input_with(node, made)
    reason = (
        f"rotated by {rotation.text}; {sum(bool(n.readers) for n in found.norms)} norms folded into the next linears"
    )
    borders = found.borders
    where = [n.name for n in found.inlets] + [u.name for _, u in found.outlets] + [n.node.name for n in found.norms if not n.readers]  # fmt: skip
    if borders:
        reason += f"; at run time where it begins or ends: {', '.join(where)}"
    return [Entry("residual stream", "folded", reason, 0, 0)]


def _fold_gains(module: GraphModule, found: Sequence[stream.Norm], settle: Callable[[], None]) -> list[Entry]:
    """Let the linears behind norms take over gain and shift, without a rotation, in place; the lines of the receipt.

    `settle` is called whenever weights have been rewritten.
    """
    entries = []
    for norm in found:
        if norm.readers and (norm.gain is not None or norm.shift is not None):
            normal = _normalized(module, norm, keep_mean=True)
            for node in norm.readers:
                _fold_norm(module, norm, node, None)
                settle()
            norm.node.replace_all_uses_with(normal)
            name = layers.parameter(norm.gain or norm.shift) or norm.node.name
            entries.append(Entry(name, "folded", f"into {', '.join(layers.layer(r) for r in norm.readers)}", 0, 0))
    return entries


def _normalized(module: GraphModule, norm: stream.Norm, keep_mean: bool = False) -> Node:
    """The normalized stream without gain and shift, in front of the norm's node.

    A layer norm becomes an RMS norm, for a stream without a mean, or with `keep_mean` stays one.
    """
    graph, node = module.graph, norm.node
    if layers.op(node) == "aten.mul":
        return next(a for a in node.all_input_nodes if a is not norm.gain)
    with graph.inserting_before(node):
        if layers.op(node) == "aten.rms_norm":
            made = graph.call_function(aten.rms_norm.default, (*node.args[:2], None, layers.argument(node, "eps")))
        elif keep_mean:
            made = graph.call_function(aten.layer_norm.default, (*node.args[:2], None, None, norm.epsilon))
        else:
            square = graph.call_function(aten.pow.Tensor_Scalar, (norm.stream, 2))
            mean = graph.call_function(aten.mean.dim, (square, [-1], True))
            shifted = graph.call_function(aten.add.Tensor, (mean, norm.epsilon))
            factor = graph.call_function(aten.rsqrt.default, (shifted,))
            made = graph.call_function(aten.mul.Tensor, (norm.stream, factor))
    made.meta["val"] = node.meta.get("val")
    return made


def _fold_norm(
    module: GraphModule, norm: stream.Norm, node: Node, rotation: Rotation | None, alike: bool = False
) -> None:
    """Let a linear take over the norm's gain and shift, and read the stream rotated."""
    weight = _read(module, node.args[1])  # (out, width)
    if norm.shift is not None:
        bias = layers.argument(node, "bias")
        moved = weight @ _read(module, norm.shift)  # (out,)
        _write(module, node, 2, moved if bias is None else moved + _read(module, bias), layers.bias_name(node), node.args[1])  # fmt: skip
    gain = 1.0 if norm.gain is None else _read(module, norm.gain)
    write = _write_alike if alike else _write
    write(module, node, 1, weight * gain if rotation is None else rotation.turn(weight * gain))


def _restore(module: GraphModule, norm: stream.Norm, normal: Node, rotation: Rotation, name: str) -> None:
    """Give the readers of a norm what they had: the rotation is undone at run time, then gain and shift follow."""
    graph, node = module.graph, norm.node
    with graph.inserting_before(node):
        made = rotation.insert(module, normal, name, back=True)
        for kind, parameter in ((aten.mul.Tensor, norm.gain), (aten.add.Tensor, norm.shift)):
            if parameter is not None:
                made = graph.call_function(kind, (made, parameter))
                made.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(made)


def _rotate_heads(module: GraphModule, values: heads.Values, rotation: Rotation) -> Entry:
    """R2 of one attention in place; the line of the receipt."""
    node, joined, size = values.value, values.joined, values.size

    def each(rows: torch.Tensor) -> torch.Tensor:
        """Rows of (..., heads * size), every head rotated."""
        return rotation.turn(rows.unflatten(-1, (-1, size))).flatten(-2)

    _write(module, node, 1, each(_read(module, node.args[1]).T).T)
    if layers.argument(node, "bias") is not None:
        _write(module, node, 2, each(_read(module, node.args[2])))
    _write(module, joined, 1, each(_read(module, joined.args[1])))
    reason = f"every head rotated by {rotation.text}"
    if values.states:
        reason += f"; '{values.states[0]}' and its output carry rotated values"
    return Entry(f"values of {values.name}", "folded", reason, 0, 0)


def _rotate_input(module: GraphModule, nodes: Sequence[Node], generator: torch.Generator) -> Entry:
    """R4 in front of linears that read one tensor, in place; the line of the receipt."""
    source = nodes[0].args[0]
    assert isinstance(source, Node)
    name = layers.layer(nodes[0])
    rotation = Rotation(_read(module, nodes[0].args[1]).shape[1], generator)
    with module.graph.inserting_before(nodes[0]):
        made = rotation.insert(module, source, f"{name}.rotation", back=False)
    for node in nodes:
        node.update_arg(0, made)
        _write(module, node, 1, rotation.turn(_read(module, node.args[1])))
    readers = ", ".join(layers.layer(n) for n in nodes)
    return Entry(f"activation of {readers}", "folded", f"rotated at run time by {rotation.text}", 0, 0)


def _constant(node: Any) -> Node:
    """The get_attr node behind a parameter that may be converted where it is read."""
    assert isinstance(node, Node)
    inner = node if layers.is_constant(node) else node.args[0]
    assert isinstance(inner, Node)
    return inner


def _read(module: GraphModule, node: Any) -> torch.Tensor:
    """A parameter in float64."""
    return layers.read(module, _constant(node)).double()


def _write(
    module: GraphModule, node: Node, index: int, value: torch.Tensor, name: str | None = None, like: Any = None
) -> None:
    """Let an argument of `node` read a new value, in float64 where the old one (or that of `like`) was, else in float32."""
    old: Any = node.args[index] if like is None else like
    name = name or layers.parameter(old)
    assert name is not None
    wide = layers.read(module, _constant(old)).dtype == torch.float64
    layers.store(module, node, index, name, value if wide else value.float())


def _write_alike(module: GraphModule, node: Node, index: int, value: torch.Tensor) -> None:
    """The same in the type in which the parameter is stored: tables and heads, which other passes leave, do not grow."""
    old: Any = node.args[index]
    converted, dtype, name = old.op != "get_attr", layers.read(module, _constant(old)).dtype, layers.parameter(old)
    assert name is not None
    layers.store(module, node, index, name, value.to(dtype))
    if converted:
        stored: Any = node.args[index]
        with module.graph.inserting_after(stored):
            made = module.graph.call_function(aten._to_copy.default, (stored,), {"dtype": torch.float32})
        made.meta["val"] = value.new_empty(value.shape, dtype=torch.float32, device="meta")
        node.update_arg(index, made)


def _like(value: torch.Tensor, source: Node) -> torch.Tensor:
    """float64 where the activations are, else float32."""
    example = source.meta.get("val")
    return value if isinstance(example, torch.Tensor) and example.dtype == torch.float64 else value.float()
