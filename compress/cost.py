"""What a model costs: multiply-accumulates and parameters per layer, counted on the traced graph.

One multiply-accumulate is one product added to a sum in a convolution, matrix product or recurrent cell. Element-wise
ops, normalization and pooling count 0, as in the papers' "MACs" (half of their FLOPs). Padding is counted as computed.
"""

from __future__ import annotations

from math import prod

from torch.fx import Node

from . import layers
from .model import Model, weights

CONVOLUTION = {"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"}
TRANSPOSED = {"aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"}
RECURRENT = {"aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu"}
Shapes = dict[Node, tuple[int, ...]]


def macs(model: Model) -> dict[str, int]:
    """Multiply-accumulates for one sample by layer name, in graph order; their sum is the model's. Layers with 0 are absent.

    A layer that is called several times has the sum of its calls. A model with a fixed batch is counted per sample.
    """
    shapes = layers.shapes(model)
    batch = 1 if model.batched else _samples(model)
    found: dict[str, int] = {}
    for node in model.graph.graph.nodes:
        count = node_macs(node, shapes)
        if count:
            name = layers.layer(node)
            found[name] = found.get(name, 0) + count
    return {name: count // batch for name, count in found.items()}


def total_macs(model: Model) -> int:
    """Multiply-accumulates of the whole model for one sample."""
    return sum(macs(model).values())


def parameters(model: Model) -> dict[str, int]:
    """Weight elements by layer name (`conv1.weight` and `conv1.bias` count for `conv1`)."""
    found: dict[str, int] = {}
    for name, count in weights(model.graph).items():
        layer = name.removesuffix("_codes").rpartition(".")[0]
        found[layer] = found.get(layer, 0) + count
    return found


def node_macs(node: Node, shapes: Shapes) -> int:
    """Multiply-accumulates of one node for the batch that `shapes` was taken with; 0 for an op that multiplies nothing up."""
    op = layers.op(node)
    if op in CONVOLUTION and not (op == "aten.convolution" and node.args[6]):
        weight = _shape(node, 1, shapes)  # (out, in // groups, *kernel)
        return prod(shapes[node]) * prod(weight[1:])
    if op in TRANSPOSED or op == "aten.convolution":
        weight = _shape(node, 1, shapes)  # (in, out // groups, *kernel)
        return prod(_shape(node, 0, shapes)) * prod(weight[1:])
    if op in ("aten.linear", "aten.matmul", "aten.mm", "aten.bmm"):
        return prod(shapes[node]) * _shape(node, 0, shapes)[-1]
    if op in ("aten.addmm", "aten.baddbmm"):
        return prod(shapes[node]) * _shape(node, 1, shapes)[-1]
    if op == "aten.scaled_dot_product_attention":
        query, value = _shape(node, 0, shapes), _shape(node, 2, shapes)  # (..., length, head)
        return prod(query) * value[-2] + prod(query[:-1]) * value[-2] * value[-1]
    if op in RECURRENT:
        x = _shape(node, 0, shapes)  # (time, batch, features), batch and time swapped with batch_first
        kernels = [prod(s) for s in _list_shapes(node, shapes) if len(s) == 2]
        return x[0] * x[1] * sum(kernels)
    if op.startswith("planish.linear"):  # some have a second output: the codes (out, ...) tell the first one's width
        return prod(_shape(node, 0, shapes)) * _shape(node, 1, shapes)[0]
    return 0


def _shape(node: Node, index: int, shapes: Shapes) -> tuple[int, ...]:
    arg = node.args[index]
    assert isinstance(arg, Node)
    return shapes[arg]


def _list_shapes(node: Node, shapes: Shapes) -> list[tuple[int, ...]]:
    """Shapes of the tensors in the op's list of weights: the last list argument that holds more than the states."""
    lists = [a for a in node.args if isinstance(a, list | tuple) and all(isinstance(n, Node) for n in a)]
    return [shapes[n] for n in lists[-1] if isinstance(n, Node)] if lists else []


def _samples(model: Model) -> int:
    shape = model.inputs[0].shape
    return max(1, shape[0]) if shape else 1
