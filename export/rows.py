"""Sequences: ops on the last axis see a matrix of rows, and the batch stands in front, whatever the model's own shapes are.

PyTorch's attention holds tensors as (tokens, batch, features), and heads as a fourth axis. The batch of a deployment graph is 1, so such a
tensor holds one sample's elements in the same order as (1, rows, features), rows being all axes but the last. That form is given to

- every tensor whose first axis is not the batch,
- what linear layers, layer norms and softmax read and make when it has four or more dimensions,
- and what only elementwise ops keep apart from these.

Ops that move elements see the tensor with a batch of 1 in front of its own shape. The reshapes in between move no byte by themselves;
export/views.py takes away those that would because of the order in which C keeps images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from ..kernels.lookup import Lookup
from . import fold
from .fold import Array, Folded

LAST_AXIS = ("MatMul", "Gemm", "LayerNormalization", "Softmax")
"""ops that treat every row alike; the matrix product only with a constant matrix"""
ELEMENTWISE = (
    *(
        "QuantizeLinear",
        "DequantizeLinear",
        "Relu",
        "Clip",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Identity",
        "Dropout",
    ),
    *Lookup.onnx_types,
)
SAME_ORDER = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")


def arrange(folded: Folded) -> Folded:
    """The same function on rows; a graph without such tensors as it is."""
    made = _Arranged(folded)
    return made.result() if made.needed() else folded


class _Arranged:
    def __init__(self, folded: Folded) -> None:
        self.folded = folded
        self.fixed = fold.fixed(folded)
        self.maker = {o: n for n in folded.nodes for o in n.output}
        self.members = self._members()
        self.constants = dict(folded.constants)
        self.shapes: dict[str, tuple[int, ...]] = dict(folded.shapes)
        self.nodes: list[onnx.NodeProto] = []
        self.left: set[str] = set()
        """members that were given their own shape again"""

    def needed(self) -> bool:
        """Whether any node must change."""
        return bool(self.members) or any(self._moves_batch(n) for n in self.folded.nodes)

    # --- which tensors

    def _activations(self, names: Iterable[str]) -> list[str]:
        return [n for n in names if n and n not in self.fixed and self.folded.shapes.get(n)]

    def _leads(self, name: str) -> bool:
        """Whether the first axis of an activation is not the batch."""
        return self.folded.shapes[name][0] != 1

    def _on_rows(self, node: onnx.NodeProto) -> bool:
        """A linear layer, layer norm or softmax, along the last axis."""
        if node.op_type not in LAST_AXIS or node.input[0] in self.fixed:
            return False
        if node.op_type in ("MatMul", "Gemm"):
            return node.input[1] in self.fixed and len(self.folded.shapes[node.input[1]]) == 2
        rank = len(self.folded.shapes[node.input[0]])
        return int(fold.attributes(node).get("axis", -1)) % rank == rank - 1

    def _members(self) -> set[str]:
        """The tensors that become (1, rows, features)."""
        found: set[str] = set()
        for node in self.folded.nodes:
            tensors = self._activations([*node.input, *node.output])
            found.update(t for t in tensors if self._leads(t))
            if self._on_rows(node):
                found.update(t for t in tensors if len(self.folded.shapes[t]) > 3)
        while True:
            before = len(found)
            for node in self.folded.nodes:
                tensors = self._activations([*node.input, *node.output])
                if (node.op_type in ELEMENTWISE or self._on_rows(node)) and found.intersection(tensors):
                    found.update(tensors)
            if len(found) == before:
                return found

    def _moves_batch(self, node: onnx.NodeProto) -> bool:
        """A move of a tensor with the batch in front that a kernel does not take as it is."""
        if node.op_type == "Transpose":
            return not {node.input[0]} & self.fixed and fold.attributes(node).get("perm", [1])[0] != 0
        return node.op_type == "Gather" and self._single(node)

    def _single(self, node: onnx.NodeProto) -> bool:
        """A Gather of one index, whose axis goes away."""
        index = self.folded.constants.get(node.input[1])
        return index is not None and index.ndim == 0 and node.input[0] not in self.fixed

    # --- forms of a tensor

    def _rows_shape(self, name: str) -> tuple[int, ...]:
        shape = self.folded.shapes[name]
        return (1, math.prod(shape[:-1]), shape[-1])

    def _rows(self, name: str) -> str:
        """Name of a member as rows."""
        return f"{name}.rows"

    def _constant(self, name: str, value: Array) -> str:
        self.constants[name] = value
        self.shapes[name] = value.shape
        return name

    def _reshape(self, name: str, made: str, shape: tuple[int, ...]) -> str:
        if made not in self.shapes or made in self.folded.shapes:
            target = self._constant(f"{made}.shape", np.array(shape, np.int64))
            self.nodes.append(helper.make_node("Reshape", [name, target], [made], name=made))
            self.shapes[made] = shape
        return made

    def _own(self, name: str) -> str:
        """A tensor in its own shape."""
        if name in self.members and name not in self.left:
            self.left.add(name)
            self._reshape(self._rows(name), name, self.folded.shapes[name])
        return name

    def _sample(self, name: str) -> str:
        """A tensor with the batch in front of its own shape."""
        source = self._rows(name) if name in self.members else name
        return self._reshape(source, f"{name}.sample", (1, *self.folded.shapes[name]))

    def _arrive(self, made: str, name: str) -> None:
        """The tensor `name`, as rows or in its own shape, from a tensor with its elements."""
        if name in self.members:
            self._reshape(made, self._rows(name), self._rows_shape(name))
        else:
            self._reshape(made, name, self.folded.shapes[name])

    # --- nodes

    def result(self) -> Folded:
        for value in self.folded.inputs:
            if value.name in self.members:
                self.left.add(value.name)
                self._arrive(value.name, value.name)
        for node in self.folded.nodes:
            self._node(node)
        for value in self.folded.outputs:
            self._own(value.name)
        return replace(self.folded, nodes=tuple(self.nodes), constants=self.constants, shapes=self.shapes)

    def _node(self, node: onnx.NodeProto) -> None:
        tensors = self._activations([*node.input, *node.output])
        leading = any(self._leads(t) for t in tensors)
        if not self.members.intersection(tensors) and not self._moves_batch(node):
            self.nodes.append(node)
        elif node.op_type in ELEMENTWISE or self._on_rows(node):
            self._on_all_rows(node)
        elif node.op_type in SAME_ORDER:
            x = node.input[0]
            self._arrive(self._rows(x) if x in self.members else x, node.output[0])
        elif node.op_type == "Gather" and self._single(node):
            self._select(node)
        elif node.op_type in ("Transpose", "Slice", "Split", "Concat", "MatMul") and (
            leading or self._moves_batch(node)
        ):
            self._on_samples(node)
        elif node.op_type == "ReduceMean" and leading:
            self._mean(node)
        else:
            self._as_it_is(node)

    def _copy(self, node: onnx.NodeProto) -> onnx.NodeProto:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        return made

    def _on_all_rows(self, node: onnx.NodeProto) -> None:
        made = self._copy(node)
        for index, name in enumerate(node.input):
            if name in self.members:
                made.input[index] = self._rows(name)
            elif node.op_type in ("Add", "Sub", "Mul", "Div") and name in self.fixed:
                made.input[index] = self._operand(name, node.output[0])
        for index, name in enumerate(node.output):
            if name in self.members:
                made.output[index] = self._rows(name)
                self.shapes[self._rows(name)] = self._rows_shape(name)
        if node.op_type in ("LayerNormalization", "Softmax"):
            fold.set_attribute(made, "axis", -1)
        self.nodes.append(made)

    def _operand(self, name: str, output: str) -> str:
        """A constant that meets a tensor of rows: one value, or one for each feature, or spread to the tensor's size."""
        shape, wanted = self.folded.shapes[name], self.folded.shapes[output]
        if math.prod(shape) == 1 or math.prod(shape[:-1]) == 1:
            return name if len(shape) < 2 else self._constant_as(name, shape[-1:])
        return self._constant_as(name, self._rows_shape(output), wanted)

    def _constant_as(self, name: str, shape: tuple[int, ...], spread: tuple[int, ...] | None = None) -> str:
        """A constant, or the dequantization of one, in another shape, spread before."""
        made = f"{name}.as_{'x'.join(map(str, shape))}"
        if made in self.shapes:
            return made
        maker = self.maker.get(name)
        source = name if maker is None else maker.input[0]
        if source not in self.constants or (maker is not None and maker.op_type != "DequantizeLinear"):
            return name
        value = self.constants[source]
        value = (value if spread is None else np.broadcast_to(value, spread)).reshape(shape)
        if maker is None:
            return self._constant(made, value)
        copied = self._copy(maker)
        copied.input[0], copied.output[0] = self._constant(f"{made}.codes", value), made
        self.nodes.append(copied)
        self.shapes[made] = shape
        return made

    def _on_samples(self, node: onnx.NodeProto) -> None:
        """A node on tensors with the batch in front: its axes count one more."""
        made = self._copy(node)
        rank = len(self.folded.shapes[node.input[0]])
        for index, name in enumerate(node.input):
            if name in self.fixed or not name:
                continue
            made.input[index] = self._sample(name)
        for index, name in enumerate(node.output):
            made.output[index] = f"{name}.sample"
            self.shapes[f"{name}.sample"] = (1, *self.folded.shapes[name])
        given = fold.attributes(node)
        if node.op_type == "Transpose":
            perm = given.get("perm") or list(range(rank))[::-1]
            fold.set_attribute(made, "perm", [0, *(p + 1 for p in perm)])
        elif node.op_type in ("Split", "Concat"):
            fold.set_attribute(made, "axis", int(given.get("axis", 0)) % rank + 1)
        elif node.op_type == "Slice":
            count = self.constants[node.input[1]].size if node.input[1] in self.constants else 0
            named = len(node.input) > 3 and node.input[3] in self.constants
            axes = self.constants[node.input[3]] if named else np.arange(count)
            while len(made.input) < 4:
                made.input.append("")
            made.input[3] = self._constant(f"{node.output[0]}.axes", np.asarray(axes % rank + 1, np.int64))
        self.nodes.append(made)
        for name in node.output:
            self._arrive(f"{name}.sample", name)

    def _select(self, node: onnx.NodeProto) -> None:
        """One index of an axis, which goes away: a slice of width 1."""
        rank = len(self.folded.shapes[node.input[0]])
        axis = int(fold.attributes(node).get("axis", 0)) % rank + 1
        index = int(self.constants[node.input[1]]) % self.folded.shapes[node.input[0]][axis - 1]
        output = node.output[0]
        window = [self._constant(f"{output}.{k}", np.array([v], np.int64)) for k, v in (("start", index), ("end", index + 1), ("axis", axis))]  # fmt: skip
        chosen = f"{output}.chosen"
        self.nodes.append(
            helper.make_node("Slice", [self._sample(node.input[0]), *window], [chosen], name=fold.label(node))
        )
        shape = (1, *self.folded.shapes[node.input[0]])
        self.shapes[chosen] = (*shape[:axis], 1, *shape[axis + 1 :])
        self._arrive(chosen, output)

    def _mean(self, node: onnx.NodeProto) -> None:
        """A mean over the tokens of (tokens, batch, features)."""
        given = self.constants.get(node.input[1]) if len(node.input) > 1 else fold.attributes(node).get("axes")
        shape = self.folded.shapes[node.input[0]]
        if given is None or np.atleast_1d(np.asarray(given)).tolist() not in ([0], [-3]) or len(shape) != 3 or shape[1] != 1:  # fmt: skip
            self._as_it_is(node)
            return
        output = node.output[0]
        axes, pooled = self._constant(f"{output}.axes", np.array([1], np.int64)), f"{output}.pooled"
        self.nodes.append(helper.make_node("ReduceMean", [self._rows(node.input[0]), axes], [pooled], name=fold.label(node), keepdims=1))  # fmt: skip
        self.shapes[pooled] = (1, 1, shape[-1])
        self._arrive(pooled, output)

    def _as_it_is(self, node: onnx.NodeProto) -> None:
        """A node that sees its own shapes."""
        for name in self._activations(node.input):
            self._own(name)
        made = self._copy(node)
        for index, name in enumerate(node.output):
            if name in self.members:
                made.output[index] = f"{name}.made"
                self.shapes[f"{name}.made"] = self.folded.shapes[name]
        self.nodes.append(made)
        for name in node.output:
            if name in self.members:
                self._arrive(f"{name}.made", name)
