"""How exactly each MatMulNBits takes its activations, chosen by the output error that was measured.

At accuracy level 0 the op multiplies float activations; at level 4 it rounds them to int8 block by block, which on x86 is two to five times
faster and is silent about what it costs. Neither default is right for every model, so each node is measured:

1. The model runs on the golden inputs at level 0 with a twin at level 4 beside every node. A node may take level 4 when
   |y4 - y0| <= BOUND * |y0| over all its outputs on these inputs (Frobenius norms).
2. If the model's scores then name another class or token anywhere on the golden inputs (argmax of a first output (n, classes), or
   of one called logits), the nodes that err most go back to level 0: a prefix of the nodes, by growing error, that moves no argmax
   keeps level 4. It is found by bisection, which need not find the longest: a longer prefix may move an argmax back. Between two
   scores that level 0 tells apart by at most BOUND of their spread (standard deviation over the classes) either may win: among some
   hundred tokens there nearly always is such a tie.
3. Nodes of 8 or 2 bits that stay at level 0 are written as nodes of 4 bits with the same value, since those are the ones that
   multiply floats without decoding the weight on every call.

A node that stands at level 4 already is left alone: its op defines the rounding (linear_dynamic with activation groups).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..kernels import matmul_nbits
from ..kernels.fused import Builder
from ..kernels.matmul_nbits import FLOAT, INT8, OP
from . import ort_session

BOUND = 0.01
"""relative error of a node's output that level 4 may add, and how near two scores are a tie"""
BATCH = 8
"""samples that are measured at a time"""


@dataclass(frozen=True)
class Choice:
    """One MatMulNBits node."""

    node: str
    level: int
    """0 or 4"""
    error: float
    """relative error of its output that level 4 adds on the golden inputs"""
    reason: str
    """why it is not 4; '' when it is"""
    slow: bool
    """whether it is slower than a float product for as many tokens as a golden sample has"""


@dataclass(frozen=True)
class Measured:
    """A node on the golden inputs."""

    error: float
    """relative error of its output that level 4 adds"""
    rows: float
    """rows (tokens) that it takes for one sample"""


def choose(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], bound: float = BOUND) -> tuple[Choice, ...]:
    """Set the accuracy level of every node that is still at 0, in place, and say what was measured. `inputs` (n, ...) by name."""
    found = measure(model, inputs)
    if not found:
        return ()
    able = sorted((n for n, m in found.items() if m.error <= bound), key=lambda n: (found[n].error, n))
    chosen = set(able[: _without_flips(model, inputs, able)])
    _set(model, chosen)
    shapes = {
        n.name: [helper.get_node_attr_value(n, a) for a in ("bits", "K")] for n in model.graph.node if n.name in found
    }
    in_floats(model)
    choices = []
    for name, measured in found.items():
        level = INT8 if name in chosen else FLOAT
        why = "it moves a top score" if measured.error <= bound else f"error above {bound:g}"
        slow = matmul_nbits.slower(shapes[name][0], level, shapes[name][1], measured.rows)
        choices.append(Choice(name, level, measured.error, "" if level == INT8 else why, slow))
    return tuple(choices)


def measure(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, Measured]:
    """What level 4 does to each node at level 0 while all other nodes are at level 0, by node name."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    graph, nodes = probe.graph, _open_nodes(probe)
    if not nodes:
        return {}
    for index, node in enumerate(nodes):
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = twin.output[0] = f"planish.twin.{index}"
        _level(twin).i = INT8
        norm, apart, change, size = (f"planish.{what}.{index}" for what in ("norm", "apart", "change", "size"))
        graph.node.append(twin)
        graph.node.append(helper.make_node("Sub", [twin.output[0], node.output[0]], [apart]))
        graph.node.append(helper.make_node("ReduceSumSquare", [node.output[0]], [norm], keepdims=0))
        graph.node.append(helper.make_node("ReduceSumSquare", [apart], [change], keepdims=0))
        graph.node.append(helper.make_node("Size", [node.output[0]], [size]))
        graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in (norm, change))
        graph.output.append(helper.make_tensor_value_info(size, TensorProto.INT64, []))
    runs = ort_session.create(probe.SerializeToString(), 1)
    names = [f"planish.{what}.{i}" for i in range(len(nodes)) for what in ("norm", "change", "size")]
    sums = np.zeros(len(names))
    for part in ort_session.batches(runs, inputs, BATCH):
        sums += np.array([float(v) for v in runs.run(names, part)])
    samples = len(next(iter(inputs.values())))
    found = {}
    for node, (norm, change, size) in zip(nodes, sums.reshape(-1, 3), strict=True):
        error = float(np.sqrt(change / norm)) if norm else float(change > 0)
        found[node.name] = Measured(error, size / helper.get_node_attr_value(node, "N") / samples)
    return found


def in_floats(model: onnx.ModelProto) -> None:
    """Write the nodes of 8 and 2 bits at level 0 as nodes of 4 bits, in place."""
    graph = model.graph
    wide = {n.name for n in _open_nodes(model) if helper.get_node_attr_value(n, "bits") != 4}
    if not wide:
        return
    read = {v for n in graph.node if n.name in wide for v in n.input}
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.name in read}
    taken = {v for n in graph.node for v in [*n.input, *n.output]} | {i.name for i in graph.initializer}
    builder = Builder(graph, constants, taken=taken)
    for node in graph.node:
        if node.name not in wide:
            builder.nodes.append(node)
            continue
        matmul_nbits.in_floats(builder, node)
        last = builder.nodes[-1]
        last.name, last.output[0] = node.name, node.output[0]
    nodes = list(builder.nodes)
    del graph.node[:]
    graph.node.extend(nodes)
    read = {v for n in graph.node for v in n.input}
    for item in [i for i in graph.initializer if i.name not in read]:
        graph.initializer.remove(item)


def _without_flips(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], nodes: Sequence[str]) -> int:
    """How many of the nodes, from the front, may take level 4 such that no top score moves on the inputs."""
    names = _scores(model)
    if not names or not nodes:
        return len(nodes)
    wanted = _answers(model, inputs, names)

    def same(count: int) -> bool:
        trial = onnx.ModelProto()
        trial.CopyFrom(model)
        _set(trial, nodes[:count])
        return not any(moved(a, b).any() for a, b in zip(wanted, _answers(trial, inputs, names), strict=True))

    low, high = (
        0,
        len(nodes) + 1,
    )  # `low` nodes are known to move nothing, `high` are known to move something or too many
    trial = len(nodes)
    while high - low > 1:
        low, high = (trial, high) if same(trial) else (low, trial)
        trial = (low + high) // 2
    return low


def _scores(model: onnx.ModelProto) -> list[str]:
    """Outputs whose largest element over the last axis is an answer: logits of any shape, and a first output (n, classes)."""
    return [
        o.name
        for index, o in enumerate(model.graph.output)
        if o.type.tensor_type.elem_type == TensorProto.FLOAT
        and (o.name.endswith("logits") or (index == 0 and len(o.type.tensor_type.shape.dim) == 2))
    ]


def moved(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(...) bool: where the largest of `others` (..., classes) is not the largest of `scores`, nor one that ties with it."""
    found = np.take_along_axis(scores, others.argmax(-1)[..., None], -1)[..., 0]
    return scores.max(-1) - found > BOUND * scores.std(-1)


def _answers(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """The named outputs."""
    answers = ort_session.run(ort_session.create(model.SerializeToString(), 1), inputs, BATCH)
    return [answers[n] for n in names]


def _open_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """MatMulNBits nodes at level 0 that a name tells apart (a user's own file may lack names)."""
    named = Counter(n.name for n in model.graph.node if n.op_type == OP)
    return [n for n in model.graph.node if n.op_type == OP and n.name and named[n.name] == 1 and _level(n).i == FLOAT]


def _level(node: onnx.NodeProto) -> onnx.AttributeProto:
    """The attribute accuracy_level, added where it is missing (which means 0)."""
    for item in node.attribute:
        if item.name == "accuracy_level":
            return item
    node.attribute.append(helper.make_attribute("accuracy_level", FLOAT))
    return node.attribute[-1]


def _set(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Put nodes at level 4."""
    wanted = set(names)
    for node in model.graph.node:
        if node.op_type == OP and node.name in wanted:
            _level(node).i = INT8
