"""`Graph`: the deployment graph. Every activation is a tensor of int8 codes and every node is one integer op of kernels/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..common.errors import PlanishError, listed
from ..kernels import layout
from ..kernels.op import Node, Op, Tensor, ops
from . import codes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Port:
    """An input or output of the original model and the tensor of codes that stands for it."""

    name: str
    shape: tuple[int, ...]
    """as in the ONNX model, batch 1"""
    dtype: str
    """of the ONNX model: float32 (real values), int8 or uint8 (codes)"""
    tensor: Tensor
    axes: tuple[int, ...]
    """`tensor` is the original transposed by these; not the identity where a Transpose at the border vanished"""

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of `shape` in the order in which C stores the codes, slowest first."""
        return tuple(self.axes[a] for a in layout.order(len(self.tensor.shape)))

    def to_codes(self, x: Array) -> Array:
        """int8 codes (n, ...) of the tensor's shape for values (n, ...) of the model's dtype and shape."""
        return codes.to_codes(x, self.dtype, self.tensor.scale, self.tensor.zero_point).transpose(self.axes)

    def from_codes(self, x: Array) -> Array:
        """Values (n, ...) of the model's dtype and shape for int8 codes (n, ...) of the tensor's shape."""
        x = x.transpose(np.argsort(self.axes))
        return codes.from_codes(x, self.dtype, self.tensor.scale, self.tensor.zero_point)


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, and the borders of the original model."""

    nodes: tuple[Node, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @cached_property
    def ops(self) -> dict[str, Op]:
        """The integer ops by name."""
        return ops()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every activation by name: the inputs, then each node's output."""
        return {p.tensor.name: p.tensor for p in self.inputs} | {n.output.name: n.output for n in self.nodes}

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return sum(self.ops[n.op].macs(n) for n in self.nodes)

    def alias(self, node: Node) -> bool:
        """Whether the node's output is its input's own bytes in C, so that no code runs."""
        return self.ops[node.op].alias(node)

    def view(self, node: Node) -> int | None:
        """Where the output begins in the input when it is a run of the input's own bytes in C; else None."""
        return self.ops[node.op].view(node)

    def codes(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """int8 codes (n, ...) of every tensor for a batch of model inputs, by the numpy reference of each op."""
        lacking = [p.name for p in self.inputs if p.name not in inputs]
        if lacking:
            raise PlanishError(
                f"input {listed(lacking)} is missing; the model takes {listed(p.name for p in self.inputs)}"
            )
        values: dict[str, Array] = {}
        for port in self.inputs:
            x = np.asarray(inputs[port.name])
            if x.shape[1:] != port.shape[1:]:
                raise PlanishError(f"input '{port.name}' has shape {x.shape}; (n, *{port.shape[1:]}) is accepted")
            values[port.tensor.name] = port.to_codes(x)
        for node in self.nodes:
            values[node.output.name] = self.ops[node.op].reference(node, *(values[t.name] for t in node.inputs))
        return values

    def reference(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs (n, ...) by name in the original model's dtype, by the numpy reference of each op."""
        values = self.codes(inputs)
        return {p.name: p.from_codes(values[p.tensor.name]) for p in self.outputs}
