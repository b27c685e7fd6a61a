"""Exact rewrites of a float graph that later passes rely on: batch-norm folding and one spelling for equal ops.

Folding (Jacob et al. 2018, section 3.2): for y = gain * (conv(x, W) + b - mean) / sqrt(var + eps) + shift,

    W' = W * gain / sqrt(var + eps)          b' = (b - mean) * gain / sqrt(var + eps) + shift

computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .graph import layer_of, read, set_parameter
from .model import Entry, Model

aten = torch.ops.aten

FOLDABLE = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
IDENTITIES = (
    aten.dropout.default,
    aten.clone.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.alias.default,
)
OUT_OF_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.relu6_.default: aten.relu6.default,
    aten.clamp_.default: aten.clamp.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
}


def fold_batch_norm(model: Model) -> Model:
    """Fold every batch norm that follows a convolution or linear layer of its own; the others stay and work."""
    model = model.copy()
    graph = model.graph.graph
    entries: list[Entry] = []
    for norm in list(graph.nodes):
        if norm.target is not aten.batch_norm.default:
            continue
        producer = norm.args[0]
        if not (isinstance(producer, Node) and producer.target in FOLDABLE and len(producer.users) == 1):
            continue
        _, gain, shift, mean, variance, _training, _momentum, eps, *_ = norm.args
        weight_node, bias_node = producer.args[1], producer.args[2] if len(producer.args) > 2 else None
        if not isinstance(weight_node, Node) or len(weight_node.users) != 1:
            continue  # a shared weight serves two layers; folding would change the other one
        weight = read(model.graph, weight_node)  # (out, ...)
        channels = weight.shape[0]
        average, spread = read(model.graph, mean).double(), (read(model.graph, variance).double() + eps).sqrt()
        factor = (read(model.graph, gain).double() if gain is not None else torch.ones(channels).double()) / spread
        bias = read(model.graph, bias_node).double() if bias_node is not None else torch.zeros(channels).double()
        offset = read(model.graph, shift).double() if shift is not None else torch.zeros(channels).double()
        layer = layer_of(producer)
        folded = (weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))).float()
        with graph.inserting_before(producer):
            new_weight = set_parameter(model.graph, f"{layer}.weight", folded)
            new_bias = set_parameter(model.graph, f"{layer}.bias", ((bias - average) * factor + offset).float())
        producer.args = (producer.args[0], new_weight, new_bias, *producer.args[3:])
        norm.replace_all_uses_with(producer)
        graph.erase_node(norm)
        name = layer_of(norm)
        size = 4 * channels
        entries.append(Entry(name, "folded", f"batch norm folded into {layer}", 4 * size, 0))
    _clean(model)
    return model.with_receipt(*entries)


def canonicalize(model: Model) -> Model:
    """One spelling per meaning: in-place ops out of place, inference no-ops dropped, global averages as one op.

    `mean` over the spatial dimensions and an average pool whose window is the whole map become
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
        elif node.target in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[node.target]
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
    _clean(model)
    return model


def _whole(node: Node) -> bool:
    """A slice that takes everything: x[:]."""
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return start in (None, 0) and (end is None or end == 2**63 - 1) and step == 1


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


def _clean(model: Model) -> None:
    """Drop what nothing uses, from the graph and from the parameters."""
    model.graph.graph.eliminate_dead_code()
    model.graph.recompile()
    model.graph.delete_all_unused_submodules()
    used = {n.target for n in model.graph.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in [*model.graph.named_parameters(), *model.graph.named_buffers()]]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(model.graph.get_submodule(owner), leaf)
