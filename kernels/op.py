"""`Op`: one integer operation of the deployment graph. Each op is one file of this folder with one subclass.

The deployment graph holds activation tensors as int8 codes. A QDQ model may use uint8; `int8 = uint8 - 128` with the zero
point moved by the same 128 gives the same integers, so the importer (export/graph.py) converts once and every op
sees int8 only. Shapes and axes are the ones of the ONNX model (channels first). The C code keeps four-dimensional
tensors with channels last (NHWC); an op's `call` reorders its constants for that.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """An activation tensor of the deployment graph: int8 codes with one scale and one zero point."""

    name: str
    shape: tuple[int, ...]
    """as in the ONNX model, batch (always 1) included, e.g. (1, channels, height, width)"""
    scale: np.float32
    zero_point: int
    """in int8 terms, -128 to 127"""
    bits: int = 8
    """8, 4 or 2: codes lie in [-2^(bits-1), 2^(bits-1) - 1] and are stored packed in the order of memory, the first in the
    lowest bits of its byte"""

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))

    @property
    def bytes(self) -> int:
        """Bytes in the arena."""
        return -(-self.size * self.bits // 8)


@dataclass(frozen=True)
class Constant:
    """A constant operand: codes with their quantization, or a plain float array when `scale` is None."""

    name: str
    values: Array
    """int8 or int32 codes in the ONNX layout (uint8 already moved to int8), or float32 values"""
    scale: npt.NDArray[np.float32] | None = None
    """(channels,) or (1,)"""
    zero_point: npt.NDArray[np.int32] | None = None
    """same shape as scale"""
    axis: int = 0
    """dimension of `values` that `scale` runs along"""


@dataclass(frozen=True)
class FloatOp:
    """One ONNX node between dequantize and quantize, as the importer hands it to `Op.parse`."""

    type: str
    """ONNX op type, e.g. Conv"""
    name: str
    attributes: Mapping[str, Any]
    """ONNX attributes as Python values"""
    inputs: tuple[Tensor | Constant | None, ...]
    output: Tensor
    low: float
    """the real values that a following Relu or Clip keeps: [low, high]; -inf and inf where there is none"""
    high: float


@dataclass(frozen=True)
class Node:
    """One node of the deployment graph: an op, its activations, and everything constant about it."""

    op: str
    """name of the op's file in kernels/"""
    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)
    """e.g. weight int8 (out, in, kh, kw), bias int32 (out,), rescale float32 (out,)"""


@dataclass(frozen=True)
class Call:
    """One statement of the generated C: `planish_<kernel>(&<layer>, inputs..., output[, scratch])`."""

    kernel: str
    """the C kernel is `void planish_<kernel>(const planish_<kernel>_layer *, const int8_t *x, ..., int8_t *y)`"""
    sources: tuple[str, ...]
    """files that hold it, relative to kernels/c"""
    fields: Mapping[str, int | float | str]
    """scalar members of the layer struct, in the struct's order"""
    arrays: Mapping[str, Array]
    """pointer members of the layer struct: each becomes a const array in flash; float32, int32, int16, int8 or uint8"""
    comments: Mapping[str, str] = field(default_factory=dict)
    """for an array, its shape in words, e.g. 'out 16, kernel 3 x 3, in 8'"""
    scratch: int = 0
    """bytes of work memory that the kernel takes as a last argument `int8_t *scratch`; 0: no such argument"""
    input_array: bool = False
    """true when the kernel takes its inputs as one `const int8_t *const *x` (any number of inputs)"""
    template: str | None = None
    """a file, relative to kernels/c, that is compiled once for every different `defines` with PLANISH_KERNEL as the function's name;
    None: `planish_<kernel>` is in `sources`"""
    defines: Mapping[str, int] = field(default_factory=dict)
    """preprocessor constants of `template`: shapes and widths that the code is specialised for"""
    headers: tuple[str, ...] = ()
    """files, relative to kernels/c, that declare the layer struct where planish.h does not"""
    overlap: int | None = None
    """the output may lie over input 0 when it begins at least this many bytes (0 or more) before it: outputs are written in
    ascending order, and no byte is written that is read afterwards. None: it may not overlap it that way"""
    in_place: tuple[int, ...] = ()
    """inputs of the output's size at whose own place the output may lie"""
    updates: int | None = None
    """the input whose memory the output is, with a part of it written anew; it is no argument of the kernel"""
    first_read: int = 0
    """the first byte of input 0 that the kernel reads"""
    written: int | None = None
    """the end of what the kernel writes of its output; None: all of it"""


class Unsupported(Exception):
    """This op does not take this node; the message says why (an attribute, a shape, a zero point)."""


class Op(abc.ABC):
    """What an op computes, how ONNX spells it, and the C kernel that runs it. Stateless: all methods are static in spirit."""

    onnx_types: ClassVar[tuple[str, ...]]
    """ONNX op types that may become this op"""
    packed: ClassVar[bool] = False
    """whether `call` takes activations of 4 and 2 bits"""

    @abc.abstractmethod
    def parse(self, node: FloatOp) -> Node | None:
        """The deployment node, None when another op of the same ONNX type takes it. Raises Unsupported."""

    @abc.abstractmethod
    def reference(self, node: Node, *inputs: Array) -> Array:
        """The definition: int8 codes of the output for int8 codes of the inputs (shapes as in `node`, any batch)."""

    @abc.abstractmethod
    def macs(self, node: Node) -> int:
        """Multiply-accumulates for one sample."""

    @abc.abstractmethod
    def call(self, node: Node) -> Call:
        """The generated C for the node."""

    def alias(self, node: Node) -> bool:
        """Whether the output is the input's own bytes in the C layout, so that no code runs and no memory is needed."""
        return False

    def view(self, node: Node) -> int | None:
        """Where the output begins in the input when it is a run of the input's own bytes, so that no code runs; else None."""
        return 0 if self.alias(node) else None


def ops() -> dict[str, Op]:
    """Every op found in this folder: {'conv2d': Conv2d(), ...}."""
    from ..common import plugins

    return {name: kind() for name, kind in plugins.find(__package__ or "planish.kernels", Op).items()}


def activations(inputs: Sequence[Tensor | Constant | None]) -> tuple[Tensor, ...]:
    """The inputs that are activations."""
    return tuple(i for i in inputs if isinstance(i, Tensor))
