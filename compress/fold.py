"""Exact rewrites of a float graph that later passes rely on: batch-norm folding and one spelling for equal ops.

Folding (Jacob et al. 2018, section 3.2): for y = gain * (conv(x, W) + b - mean) / sqrt(var + eps) + shift,

    W' = W * gain / sqrt(var + eps)          b' = (b - mean) * gain / sqrt(var + eps) + shift

computed in float64 and rounded once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from . import layers
from .model import Entry, Model

aten = torch.ops.aten

PADDED_BY_NAME = (aten.conv1d.padding, aten.conv2d.padding)
FOLDABLE = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
PARTED = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
IDENTITIES = (
    aten.dropout.default,
    aten.clone.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.alias.default,
)


def fold_batch_norm(model: Model) -> Model:
    """Fold every batch norm that follows a convolution or linear layer of its own.

    Another one becomes a depthwise convolution of width 1, which has an integer kernel everywhere; what is left (on five-dimensional
    tensors, or with weights that are used twice) stays as it is.
    """
    model = model.copy()
    graph = model.graph.graph
    entries: list[Entry] = []
    for norm in list(graph.nodes):
        if norm.target is not aten.batch_norm.default:
            continue
        producer = norm.args[0]
        if not (isinstance(producer, Node) and producer.target in FOLDABLE and len(producer.users) == 1):
            producer = _as_convolution(model, norm)
            if producer is None:
                continue
        _, gain, shift, mean, variance, _training, _momentum, eps, *_ = norm.args
        source, weight_node, bias_node = (layers.argument(producer, n) for n in ("input", "weight", "bias"))
        if not isinstance(weight_node, Node) or len(weight_node.users) != 1:
            continue  # a shared weight serves two layers; folding would change the other one
        weight = layers.read(model.graph, weight_node)  # (out, ...)
        channels = weight.shape[0]

        def vector(node: object, default: float, channels: int = channels) -> torch.Tensor:
            """(channels,) float64 of an optional parameter."""
            if not isinstance(node, Node):
                return torch.full((channels,), default, dtype=torch.float64)
            return layers.read(model.graph, node).double()

        factor = vector(gain, 1.0) / (vector(variance, 1.0) + eps).sqrt()
        bias = (vector(bias_node, 0.0) - vector(mean, 0.0)) * factor + vector(shift, 0.0)
        folded = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
        with graph.inserting_before(producer):
            new_bias = layers.add_parameter(model.graph, layers.bias_name(producer), bias.float())
            new_weight = layers.add_parameter(model.graph, str(weight_node.target), folded.float())
        producer.args = (source, new_weight, new_bias, *producer.args[3:])
        name = layers.layer(norm)
        norm.replace_all_uses_with(producer)
        graph.erase_node(norm)
        entries.append(Entry(name, "folded", f"batch norm into {layers.layer(producer)}", 16 * channels, 0))
    layers.drop_unused(model.graph)
    return model.with_receipt(*entries)


def _as_convolution(model: Model, norm: Node) -> Node | None:
    """A depthwise convolution of ones in front of a batch norm, for it to fold into; None where that does not work.

    Features (n, c) become pixels (n, c, 1, 1) for it.
    """
    source, running = norm.args[0], norm.args[3]
    value = source.meta.get("val") if isinstance(source, Node) else None
    if (
        not isinstance(value, torch.Tensor)
        or value.ndim not in (2, 3, 4)
        or not isinstance(running, Node)
        or len(running.users) != 1
    ):
        return None
    channels = len(layers.read(model.graph, running))
    name = str(running.target).rpartition(".")[0] or running.name
    graph, width = model.graph.graph, 1 if value.ndim == 3 else 2
    kind = aten.conv1d.default if width == 1 else aten.conv2d.default
    weight = torch.ones(channels, 1, *[1] * width)
    numbers = ([1] * width, [0] * width, [1] * width, channels)
    with graph.inserting_before(norm):
        image = value
        if value.ndim == 2:
            image = value.new_empty((*value.shape, 1, 1))
            source = _made(graph, aten.unflatten.int, (source, 1, [channels, 1, 1]), image)
        ones = layers.add_parameter(model.graph, f"{name}.depthwise.weight", weight)
        convolution = _made(graph, kind, (source, ones, None, *numbers), image)
    if value.ndim == 2:
        with graph.inserting_after(norm):
            flat = _made(graph, aten.flatten.using_ints, (norm, 1), value)
        norm.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
        norm.meta["val"] = image
    return convolution


def _made(graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], value: torch.Tensor) -> Node:
    """A new node whose result is like `value`."""
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def canonicalize(model: Model) -> Model:
    """One spelling per meaning: in-place ops out of place, paddings as numbers, no-ops dropped, global averages as one op.

    Parts of a tensor (chunk, split, unbind) become slices. `mean` over the spatial dimensions and an average pool whose window is the whole map become
    adaptive_avg_pool2d(1), which every back end has as an integer op; silu becomes x * sigmoid(x).
    """
    model = model.copy()
    graph = model.graph.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # what made its input contiguous is dropped
        elif (plain := _out_of_place(node)) is not None:
            _read_after(node, graph)
            node.target = plain
        elif node.target in PADDED_BY_NAME:
            _numeric_padding(node, graph)
        elif node.target in PARTED:
            _parts_as_slices(node, graph)
        elif node.target is aten.slice.Tensor and _whole(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.silu.default:
            with graph.inserting_before(node):
                gate = graph.call_function(aten.sigmoid.default, (node.args[0],))
                gate.meta = dict(node.meta)
                product = graph.call_function(aten.mul.Tensor, (node.args[0], gate))
                product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)
        elif _global_mean(node):
            keep = node.target is not aten.mean.dim or (len(node.args) > 2 and bool(node.args[2]))
            with graph.inserting_before(node):
                pooled = graph.call_function(aten.adaptive_avg_pool2d.default, (node.args[0], [1, 1]))
                pooled.meta = dict(node.meta)
                result = pooled if keep else graph.call_function(aten.flatten.using_ints, (pooled, 1))
                result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    layers.drop_unused(model.graph)
    return model


def _out_of_place(node: Node) -> Any:
    """Relu for relu_, add.Tensor for add_.Tensor, and so on; None for an op that changes nothing in place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._opname
    if not name.endswith("_") or name.endswith("__") or not hasattr(aten, name[:-1]):
        return None
    return getattr(getattr(aten, name[:-1]), target._overloadname, None)


def _read_after(node: Node, graph: torch.fx.Graph) -> None:
    """Let what reads the changed tensor after an in-place op read the op's result instead."""
    changed, order = node.args[0], {n: i for i, n in enumerate(graph.nodes)}
    assert isinstance(changed, Node)
    for reader in list(changed.users):
        if order[reader] > order[node]:
            reader.replace_input_with(changed, node)


def _numeric_padding(node: Node, graph: torch.fx.Graph) -> None:
    """padding='valid' or 'same' as numbers; an odd total puts the extra row or column last, as PyTorch does."""
    plain = aten.conv2d.default if node.target is aten.conv2d.padding else aten.conv1d.default
    stride, mode, dilation, groups = (layers.argument(node, n) for n in ("stride", "padding", "dilation", "groups"))
    x, weight, bias = (layers.argument(node, n) for n in ("input", "weight", "bias"))
    kernel = list(weight.meta["val"].shape[2:])
    spread = list(dilation) * (len(kernel) if len(dilation) == 1 else 1)
    totals = [d * (k - 1) if mode == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
    if any(t % 2 for t in totals):
        amounts = [a for t in reversed(totals) for a in (t // 2, t - t // 2)]
        with graph.inserting_before(node):
            padded = graph.call_function(aten.constant_pad_nd.default, (x, amounts))
        value = x.meta["val"]
        padded.meta["val"] = value.new_empty(
            [*value.shape[:2], *(n + t for n, t in zip(value.shape[2:], totals, strict=True))]
        )
        x, totals = padded, [0] * len(totals)
    node.args = (x, weight, bias, stride, [t // 2 for t in totals], dilation, groups)
    node.kwargs = {}
    node.target = plain


def _parts_as_slices(node: Node, graph: torch.fx.Graph) -> None:
    """chunk, split and unbind as one slice, or one index, for each part that is read."""
    source, values = node.args[0], node.meta["val"]
    assert isinstance(source, Node)
    dim = int(layers.argument(node, "dim")) % source.meta["val"].ndim
    one = node.target is aten.unbind.int
    sizes = [1 if one else v.shape[dim] for v in values]
    if any(not isinstance(size, int) for size in sizes) or any(u.target is not operator.getitem for u in node.users):
        return
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        start = sum(sizes[: index % len(sizes)])
        with graph.inserting_before(user):
            args = (source, dim, start) if one else (source, dim, start, start + sizes[index])
            part = _made(graph, aten.select.int if one else aten.slice.Tensor, args, values[index])
        user.replace_all_uses_with(part)
        graph.erase_node(user)
    graph.erase_node(node)


def _whole(node: Node) -> bool:
    """A slice that takes everything: x[:]."""
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start in (None, 0) and end in (None, 2**63 - 1) and step == 1)


def _global_mean(node: Node) -> bool:
    value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return False
    if node.target is aten.mean.dim:
        dims = node.args[1]
        return isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]  # pyright: ignore[reportOperatorIssue]
    if node.target is aten.avg_pool2d.default:
        kernel = list(node.args[1])  # pyright: ignore[reportArgumentType]
        kernel = kernel * 2 if len(kernel) == 1 else kernel
        padding = node.args[3] if len(node.args) > 3 else [0]
        return kernel == list(value.shape[2:]) and not any(padding)  # pyright: ignore[reportArgumentType]
    return False
