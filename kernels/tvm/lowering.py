"""`Lowering`: how one fused op of kernels/ becomes Relax and scheduled kernels. One file of this folder an op, named like it.

A lowering gets TVM's parts handed in (`Use.ir`), so that these files import without TVM. Weights stay packed: they are constants of
the module in their packed type, and a kernel decodes them in registers where it multiplies.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...common import plugins
from ...common.errors import PlanishError

OPAQUE = 8
"""TVM's number for a kernel that no pass fuses"""
OP, MACS = "planish.op", "planish.macs"
"""attributes of a kernel that a lowering made: the fused op, and its multiply-accumulates"""


@dataclass(frozen=True)
class VectorUnit:
    """What a schedule must know of a core."""

    lanes: int
    """float32 values in one vector register"""
    registers: int

    @property
    def accumulators(self) -> int:
        """Vector registers that may hold sums: a quarter stays free for weights, a broadcast input and the epilogue."""
        return self.registers * 3 // 4


@dataclass
class Use:
    """One use of a fused op in a graph on its way to Relax, and the means to write it there."""

    op: str
    name: str
    """layer name, for messages"""
    tensors: Mapping[str, Any]
    """Relax expression of each tensor argument by the schema's name; an absent optional one is missing"""
    attributes: Mapping[str, Any]
    """int, float, string and list arguments by name"""
    unit: VectorUnit
    ir: Any
    """TVM's namespaces: relax, te, tirx, Schedule, IRBuilder, script"""
    builder: Any
    """relax.BlockBuilder"""
    constants: list[np.ndarray] = field(default_factory=list)
    """every array that `constant` stored"""

    def shape(self, value: Any) -> tuple[int, ...]:
        """Shape of an expression, or of an argument by its name. Raises PlanishError where it is not fixed."""
        expression = self.tensors[value] if isinstance(value, str) else value
        dims = expression.ty.shape
        if dims is None or not all(isinstance(d, self.ir.tirx.IntImm) for d in dims):
            raise PlanishError(f"'{self.name}': {self.op} in the tvm format needs fixed shapes; found {dims}")
        return tuple(int(d) for d in dims)

    def array(self, argument: str) -> np.ndarray:
        """A tensor argument that must be a constant of the model."""
        value = self.tensors[argument]
        if not hasattr(value, "value") or not hasattr(value.value, "numpy"):
            raise PlanishError(f"'{self.name}': '{argument}' of {self.op} is computed; a constant is expected")
        return value.value.numpy()

    def optional(self, argument: str) -> np.ndarray | None:
        """The same for an argument that may be absent."""
        return self.array(argument) if argument in self.tensors else None

    def constant(self, values: np.ndarray) -> Any:
        """A constant of the module."""
        self.constants.append(values)
        return self.ir.relax.const(np.ascontiguousarray(values))

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable, which then knows its type."""
        return self.builder.emit(expression)

    def call(
        self, function: Any, operands: Sequence[Any], shapes: Sequence[tuple[int, ...]], macs: int = 0, what: str = ""
    ) -> list[Any]:
        """Call a finished kernel (inputs, then one float32 output of each of `shapes`); returns the outputs. `what` ends the kernel's name."""
        relax = self.ir.relax
        attributes = {"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": OPAQUE, OP: self.op, MACS: macs}
        kernel = function.without_attr("global_symbol").with_attrs(attributes)
        name = f"{self.op}_{what}" if what else self.op
        types = [relax.TensorType(s, "float32") for s in shapes]
        reference = self.builder.add_func(kernel, name)
        made = self.emit(
            relax.call_tir(reference, relax.Tuple(list(operands)), out_ty=types if len(types) > 1 else types[0])
        )
        if len(types) == 1:
            return [made]
        return [self.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]

    def reshape(self, value: Any, shape: Sequence[int]) -> Any:
        """The same values in another shape."""
        return value if self.shape(value) == tuple(shape) else self.emit(self.ir.relax.op.reshape(value, tuple(shape)))


class Lowering(abc.ABC):
    """The Relax form of one fused op."""

    @abc.abstractmethod
    def lower(self, use: Use) -> Sequence[Any]:
        """Relax expressions of the op's outputs, equal to the reference within float32 rounding unless the file says otherwise.

        Raises PlanishError for an argument that is computed where a constant is needed.
        """

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether the op with these attributes rounds activations to codes, so that the last bit of a float may move one."""
        return False


def lowerings() -> dict[str, Lowering]:
    """Every lowering by the name of its op."""
    return {name: kind() for name, kind in plugins.find(__package__ or "planish.kernels.tvm", Lowering).items()}
