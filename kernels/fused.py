"""`Fused`: one low-bit operation, or a float one that ATen lacks, that is one node of a compressed program, `planish::<file name>`. One file an op.

An op's file defines its schema, its packing, and the reference in plain torch, which defines the numbers, and registers it with
`register` when it is imported. Its `Fused` subclass says how the node is written in ONNX. Faster or other forms are files of
their own: `tvm/<op>.py` holds the Relax lowering, `triton/<op>.py` the GPU kernel.

In every linear op the weight W is (out, in), y = x W^T + bias, x (..., in) and y (..., out) are float32.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from ..common import plugins
from .affine import LIBRARY


class Fused(abc.ABC):
    """The parts of a fused op that stages behind compression need."""

    domains: ClassVar[tuple[str, ...]] = ("",)
    """operator sets that the lowering uses: "" for ONNX's own, "com.microsoft" for ONNX Runtime's contributed ops"""

    @abc.abstractmethod
    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Write the op with nodes that ONNX Runtime has, equal to the reference within float32 rounding unless its file says
        otherwise, and return the names of the op's outputs. A weight must stay compressed after loading: nothing that
        constant folding would turn back to float.
        """

    def low_bit(self, call: Call) -> bool:
        """Whether this use of the op computes with codes; one that computes in float has its file here for its lowering alone."""
        return True

    def slow(self, call: Call) -> str | None:
        """Why ONNX Runtime computes this op slower than the same layer in float, None where it does not.

        The layer in float is a matrix product for a linear op, the scan without rounding for a scan. An op that computes in
        float itself has no such layer and gives None.
        """
        return None


@dataclass(frozen=True)
class Call:
    """One use of a fused op in an ONNX graph."""

    name: str
    """layer name, for names of nodes and messages"""
    tensors: Mapping[str, str]
    """name of the ONNX value of each tensor argument by the schema's argument name; an absent optional one is missing"""
    attributes: Mapping[str, Any]
    """int, float, bool, string and list arguments by name"""


@dataclass
class Builder:
    """Adds nodes and constants to an ONNX graph. Names of new values start with the layer's."""

    graph: onnx.GraphProto
    constants: dict[str, np.ndarray]
    """every initializer by name"""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    """what was added, in order"""
    taken: set[str] = field(default_factory=set)
    notes: list[tuple[str, str]] = field(default_factory=list)
    """(layer, what the user should know of its ONNX form before it is written: more bytes, less speed)"""

    def note(self, layer: str, text: str) -> None:
        """Say something about a layer; layers with the same text are reported together."""
        self.notes.append((layer, text))

    def constant(self, name: str, value: np.ndarray | onnx.TensorProto) -> str:
        """A new initializer; `name` is made unique. A TensorProto serves types that numpy lacks (4 bits, float8)."""
        name = self._unique(name)
        if isinstance(value, onnx.TensorProto):
            value.name = name
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        self.graph.initializer.append(tensor)
        self.constants[name] = numpy_helper.to_array(tensor)
        return name

    def value(self, name: str) -> np.ndarray:
        """The array of an initializer."""
        return self.constants[name]

    def add(
        self, op: str, inputs: Sequence[str], name: str, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> list[str]:
        """Append a node; returns the names of its outputs."""
        made = [self._unique(name if outputs == 1 else f"{name}.{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), made, name=made[0], domain=domain, **attributes))
        return made

    def one(self, op: str, inputs: Sequence[str], name: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with a single output and return its name."""
        return self.add(op, inputs, name, domain, 1, **attributes)[0]

    def _unique(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `planish::<schema>` with its reference and shape function: linear_x(Tensor x, ..., int bits) -> Tensor."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"planish::{name}", fake, lib=LIBRARY)


def linear_output(x: torch.Tensor, out: int) -> torch.Tensor:
    """The shape function of a linear op: (..., in) -> (..., out), float32."""
    return x.new_empty((*x.shape[:-1], out), dtype=torch.float32)


def ops() -> dict[str, Fused]:
    """Every fused op by name. Importing their files, which this does, defines them in torch.ops.planish."""
    return {name: kind() for name, kind in plugins.find(__package__ or "planish.kernels", Fused).items()}
