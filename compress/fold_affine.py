"""Constants in front of a layer fold into it: y = W (a x + b) + c becomes y = W' x + c' with a scale and a shift for each channel.

    W' = W diag(a)          c' = c + W b          computed in float64 and rounded once

Unified Normalization (Yang et al. 2022, arXiv 2208.01313) runs so without a norm: a = gamma / sqrt(rv + eps), b = beta, as its statistics
are constants after training. So does the normalization of an input by fixed means and deviations, or a batch norm in evaluation.

Folded is a chain of additions, subtractions, multiplications and divisions by constants that vary along the channels only, and batch norms,
when nothing but layers with weights of their own read its result: linear layers, and convolutions (those that pad with zeros take no shift).
What stays: the gain of a norm that is computed while the model runs, since the norm applies it anyway and smoothing and quantization want
it there; a chain in front of a layer whose input an earlier pass has scaled on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from . import layers
from .model import Entry, Model

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
SAME = (aten.dropout.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.alias.default)
"""ops that change no value in evaluation"""
MULTIPLY = ("aten.mul", "aten.mul_")
DIVIDE = ("aten.div", "aten.div_")
ADD = ("aten.add", "aten.add_")
SUBTRACT = ("aten.sub", "aten.sub_")
ROOTS = ("aten.sqrt", "aten.rsqrt", "aten.std", "aten.linalg_vector_norm")
"""ops that a norm written out divides by"""
DEPTH = 4
"""nodes between a norm's product and its root, at most"""


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift."""

    scale: torch.Tensor
    """(channels,) float64"""
    shift: torch.Tensor
    """(channels,) float64"""

    def then(self, scale: torch.Tensor | float, shift: torch.Tensor | float) -> Affine:
        """The same followed by scale * y + shift."""
        return Affine(self.scale * scale, self.shift * scale + shift)


def fold_affine(model: Model) -> Model:
    """Fold every chain of constants that its readers take; the model given, and its tensors, are not changed."""
    scaled = {e.tensor for e in model.receipt if e.action == "folded"}
    model = model.editable()
    module = model.graph
    entries: list[Entry] = []
    for last in list(module.graph.nodes):
        readers = list(last.users)
        if last.op != "call_function" or not readers or not all(_takes(r, last) for r in readers):
            continue
        if scaled & {f"{layers.layer(r)}.weight" for r in readers}:
            continue
        axes = {-1 if r.target is aten.linear.default else 1 for r in readers}
        if len(axes) > 1:
            continue
        source, affine, names = _chain(module, last, axes.pop())
        if source is last or not names or _normalized(source) or not all(_fits(module, r, affine) for r in readers):
            continue
        for reader in readers:
            _fold(module, reader, affine)
            reader.replace_input_with(last, source)
        into = ", ".join(layers.layer(r) for r in readers)
        size = sum(4 * layers.tensor(module, n).numel() for n in names)
        name = names[0].rpartition(".")[0] or names[0]
        entries.append(Entry(name, "folded", f"constants of each channel into {into}", size, 0))
    if not entries:
        return model
    layers.drop_unused(module)
    return model.with_receipt(*entries)


def _takes(reader: Node, source: Node) -> bool:
    """Whether a node is a layer that reads `source` as its input, with constant weight and bias."""
    if reader.target is not aten.linear.default and reader.target not in CONVOLUTIONS:
        return False
    if reader.all_input_nodes.count(source) != 1 or reader.args[0] is not source:
        return False
    bias = layers.argument(reader, "bias")
    return layers.is_parameter(layers.argument(reader, "weight")) and (bias is None or layers.is_parameter(bias))


def _fits(module: GraphModule, reader: Node, affine: Affine) -> bool:
    """Whether a layer has as many channels, and pads nothing that the shift would have to be added to."""
    inputs = layers.stored(module, reader.args[1]).shape[1]
    if reader.target is aten.linear.default:
        return inputs == len(affine.scale)
    padded = any(layers.argument(reader, "padding")) and bool(affine.shift.any())
    return inputs * int(layers.argument(reader, "groups")) == len(affine.scale) and not padded


def _fold(module: GraphModule, reader: Node, affine: Affine) -> None:
    weight = layers.value(module, reader.args[1]).double()  # (out, in / groups, ...)
    groups = 1 if reader.target is aten.linear.default else int(layers.argument(reader, "groups"))
    parts = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, ...)
    wide = (groups, 1, -1, *[1] * (weight.ndim - 2))
    shift = (parts * affine.shift.reshape(wide)).flatten(2).sum(2).flatten()  # (out,)
    name, bias_name = layers.parameter(reader.args[1]), layers.bias_name(reader)
    assert name is not None
    if bool(affine.shift.any()):
        bias = layers.argument(reader, "bias")
        shift = shift if bias is None else shift + layers.value(module, bias).double()
        layers.store(module, reader, 2, bias_name, shift.float())
    layers.store(module, reader, 1, name, (parts * affine.scale.reshape(wide)).flatten(0, 1).float())


def _chain(module: GraphModule, last: Node, axis: int) -> tuple[Node, Affine, Sequence[str]]:
    """(source, what `last` is of it, parameters that decide this) for the longest chain that ends in `last`; channels along `axis`."""
    value = last.meta.get("val")
    one = torch.ones(1, dtype=torch.float64)
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.dtype != torch.float32:
        return last, Affine(one, 0 * one), ()
    channels = value.shape[axis]
    if not isinstance(channels, int):
        return last, Affine(one, 0 * one), ()
    steps: list[tuple[torch.Tensor | float, torch.Tensor | float]] = []
    names: list[str] = []
    node = last
    while node is last or len(node.users) == 1:
        found = _step(module, node, axis, channels)
        if found is None or not _alike(found[0], value):
            break
        node, scale, shift, used = found
        steps.append((scale, shift))
        names += used
    ones = torch.ones(channels, dtype=torch.float64)
    affine = Affine(ones, torch.zeros_like(ones))
    for scale, shift in reversed(steps):
        affine = affine.then(scale, shift)
    return node, affine, names


def _alike(node: Node, value: torch.Tensor) -> bool:
    """Whether a tensor has the shape and type of `value`."""
    own = node.meta.get("val")
    return isinstance(own, torch.Tensor) and own.dtype == value.dtype and own.shape == value.shape


def _step(
    module: GraphModule, node: Node, axis: int, channels: int
) -> tuple[Node, torch.Tensor | float, torch.Tensor | float, list[str]] | None:
    """(x, scale, shift, parameters) of a node that computes scale * x + shift; None for another one."""
    kind = layers.op(node)
    if node.target in SAME:
        return node.args[0], 1.0, 0.0, []  # pyright: ignore[reportReturnType]
    if kind == "aten.batch_norm":
        return _batch_norm(module, node, axis)
    if kind not in (*MULTIPLY, *DIVIDE, *ADD, *SUBTRACT) or node.kwargs.get("rounding_mode") is not None:
        return None
    left, right = node.args[:2]
    alpha = float(node.kwargs.get("alpha", 1))  # pyright: ignore[reportArgumentType]
    constant = _vector(module, right, axis, node, channels)
    if constant is not None and isinstance(left, Node):
        used = _parameters(right)
        if kind in MULTIPLY:
            return left, constant, 0.0, used
        if kind in DIVIDE:
            return left, 1 / constant, 0.0, used
        return left, 1.0, (alpha if kind in ADD else -alpha) * constant, used
    constant = _vector(module, left, axis, node, channels)
    if constant is None or not isinstance(right, Node) or kind in DIVIDE:
        return None
    used = _parameters(left)
    if kind in MULTIPLY:
        return right, constant, 0.0, used
    return right, alpha if kind in ADD else -alpha, constant, used


def _batch_norm(
    module: GraphModule, node: Node, axis: int
) -> tuple[Node, torch.Tensor, torch.Tensor, list[str]] | None:
    """A batch norm by its running statistics."""
    x, gain, shift, mean, variance = node.args[:5]
    if (
        not isinstance(x, Node)
        or bool(layers.argument(node, "training"))
        or (axis == -1 and node.meta["val"].ndim != 2)
    ):
        return None
    if not (layers.is_constant(mean) and layers.is_constant(variance)):
        return None
    assert isinstance(mean, Node) and isinstance(variance, Node)
    scale = (layers.read(module, variance).double() + float(layers.argument(node, "eps"))).rsqrt()
    scale = scale if gain is None else scale * layers.value(module, gain).double()
    moved = -layers.read(module, mean).double() * scale
    moved = moved if shift is None else moved + layers.value(module, shift).double()
    return x, scale, moved, [str(n.target) for n in (gain, shift, mean, variance) if isinstance(n, Node)]


def _vector(module: GraphModule, operand: object, axis: int, node: Node, channels: int) -> torch.Tensor | None:
    """(channels,) or (1,) float64 of a constant operand that varies along the channels of `node` at most; None for another one."""
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return torch.tensor([float(operand)], dtype=torch.float64)
    value = layers.constant(module, operand, torch.float64) if isinstance(operand, Node) else None
    if value is None:
        return None
    rank = node.meta["val"].ndim
    shape = [1] * (rank - value.ndim) + list(value.shape)
    if len(shape) != rank or any(d != 1 for i, d in enumerate(shape) if i != axis % rank):
        return None
    return value.reshape(-1) if shape[axis] in (1, channels) else None


def _parameters(operand: object) -> list[str]:
    """Names of the tensors that a constant operand is computed from."""
    if not isinstance(operand, Node):
        return []
    if layers.is_constant(operand):
        return [str(operand.target)]
    return [name for n in operand.all_input_nodes for name in _parameters(n)]


def _normalized(source: Node) -> bool:
    """Whether a tensor is what a norm that is written out divides: x * rsqrt(...) or x / sqrt(...) of something that is computed."""
    while layers.op(source) == "aten._to_copy" or source.target in SAME:
        source = source.args[0]  # pyright: ignore[reportAssignmentType]
    if layers.op(source) not in (*MULTIPLY, *DIVIDE):
        return False
    return any(_is_root(a, DEPTH) for a in source.args[:2])


def _is_root(node: object, depth: int) -> bool:
    if not isinstance(node, Node) or not depth:
        return False
    kind = layers.op(node)
    if kind in ROOTS or kind == "aten.pow":
        return True
    passes = kind in ("aten._to_copy", "aten.reciprocal", "aten.add", "aten.expand", "aten.unsqueeze", "aten.clamp_min", "aten.clamp")  # fmt: skip
    return passes and _is_root(node.args[0], depth - 1)
