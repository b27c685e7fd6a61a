"""Reading a `.tflite` file into plain tensors and operators.

The format is a FlatBuffer (schema: tensorflow/compiler/mlir/lite/schema/schema.fbs, version 3), read with the package `tflite`,
which the FlatBuffers compiler made from that schema. A FlatBuffer is read in place through offsets and its Python reader
verifies none of them, so everything that a damaged file can change is checked here: lengths before loops, indices
before use, bytes of a buffer against the shape of its tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import PlanishError, missing_extra

Array = npt.NDArray[Any]

DTYPES: Mapping[str, type[np.generic]] = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "UINT16": np.uint16,
    "INT32": np.int32,
    "UINT32": np.uint32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
"""element types whose constants are read; INT4 is unpacked to int8"""

OPTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ADD": ("AddOptions", ("FusedActivationFunction",)),
    "MUL": ("MulOptions", ("FusedActivationFunction",)),
    "CONV_2D": (
        "Conv2DOptions",
        ("Padding", "StrideH", "StrideW", "DilationHFactor", "DilationWFactor", "FusedActivationFunction"),
    ),
    "DEPTHWISE_CONV_2D": (
        "DepthwiseConv2DOptions",
        ("Padding", "StrideH", "StrideW", "DilationHFactor", "DilationWFactor", "FusedActivationFunction"),
    ),
    "FULLY_CONNECTED": ("FullyConnectedOptions", ("FusedActivationFunction", "WeightsFormat", "KeepNumDims")),
    "AVERAGE_POOL_2D": (
        "Pool2DOptions",
        ("Padding", "StrideH", "StrideW", "FilterHeight", "FilterWidth", "FusedActivationFunction"),
    ),
    "MAX_POOL_2D": (
        "Pool2DOptions",
        ("Padding", "StrideH", "StrideW", "FilterHeight", "FilterWidth", "FusedActivationFunction"),
    ),
    "MEAN": ("ReducerOptions", ("KeepDims",)),
    "SOFTMAX": ("SoftmaxOptions", ("Beta",)),
    "CONCATENATION": ("ConcatenationOptions", ("Axis", "FusedActivationFunction")),
    "STRIDED_SLICE": (
        "StridedSliceOptions",
        ("BeginMask", "EndMask", "EllipsisMask", "NewAxisMask", "ShrinkAxisMask"),
    ),
    "LEAKY_RELU": ("LeakyReluOptions", ("Alpha",)),
    "GELU": ("GeluOptions", ("Approximate",)),
}
"""for each operator that has any: the table of its options, and the fields that are read"""


MOST_DIMENSIONS = 8
"""of a tensor, as TFLite has it"""
LONGEST_NAME = 160
"""bytes of a name that are kept"""


@dataclass(frozen=True)
class TfliteTensor:
    """One tensor of the file, in TFLite's order of axes (channels last)."""

    name: str
    shape: tuple[int, ...]
    dynamic: tuple[int, ...]
    """axes whose size the file leaves open"""
    dtype: str
    """name in the schema, e.g. INT8"""
    scale: npt.NDArray[np.float32] | None
    """(1,) or (channels,); None where the tensor is not quantized"""
    zero_point: npt.NDArray[np.int64] | None
    """as many as scales"""
    axis: int
    """dimension that the scales run along"""
    data: Array | None
    """(shape) values of a constant; None of an activation"""


@dataclass(frozen=True)
class TfliteOperator:
    """One operator, in execution order."""

    index: int
    kind: str
    """builtin name in the schema, e.g. CONV_2D, or the name of a custom operator"""
    inputs: tuple[int, ...]
    """indices of tensors, -1 for one that is left out"""
    outputs: tuple[int, ...]
    options: Mapping[str, Any]
    """fields named in OPTIONS"""

    @property
    def label(self) -> str:
        """For messages: 'CONV_2D number 4'."""
        return f"{self.kind} number {self.index}"


@dataclass(frozen=True)
class TfliteModel:
    """The main graph of a file."""

    tensors: tuple[TfliteTensor, ...]
    operators: tuple[TfliteOperator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read(path: Path) -> TfliteModel:
    """The main graph of a `.tflite` file. Raises PlanishError for a missing or damaged file, Missing without the package."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PlanishError(f"model '{path}' does not exist") from None
    schema = _schema()
    if len(content) < 8 or content[4:8] != b"TFL3":
        raise PlanishError(f"'{path}' is no .tflite file: its identifier 'TFL3' is missing")
    try:
        return _Reader(schema, content).model()
    except _Damaged as error:
        raise PlanishError(f"'{path}' is a damaged .tflite file: {error}") from None
    except (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError) as error:
        # what the generated reader raises when an offset leads out of the file or to another table
        text = " ".join(str(error).split()) or type(error).__name__
        raise PlanishError(f"'{path}' is a damaged .tflite file: {text[:150]}") from None


class _Damaged(Exception):
    """A part of the file contradicts another; the message says which."""


def _schema() -> ModuleType:
    try:
        import tflite
    except ImportError:
        raise missing_extra("tflite", "mcu", "reading a .tflite file") from None
    return tflite


class _Reader:
    def __init__(self, schema: ModuleType, content: bytes) -> None:
        self.schema, self.content = schema, content
        self.types = _names(schema.TensorType)
        self.codes = _names(schema.BuiltinOperator)

    def model(self) -> TfliteModel:
        root = self.schema.Model.GetRootAs(self.content, 0)
        if root.Version() != 3:
            raise _Damaged(f"it has schema version {root.Version()}; 3 is accepted")
        if not root.SubgraphsLength():
            raise _Damaged("it has no graph")
        self.root = root
        graph = root.Subgraphs(0)
        tensors = tuple(self._tensor(graph.Tensors(i)) for i in range(self._length(graph.TensorsLength())))
        operators = tuple(
            self._operator(i, graph.Operators(i), len(tensors)) for i in range(self._length(graph.OperatorsLength()))
        )
        inputs, outputs = (self._indices(v, len(tensors), 0) for v in (graph.InputsAsNumpy(), graph.OutputsAsNumpy()))
        if not inputs or not outputs:
            raise _Damaged("its graph has no inputs or no outputs")
        return TfliteModel(tensors, operators, inputs, outputs)

    def _length(self, count: int) -> int:
        """Elements of a vector of tables, which take at least 4 bytes each."""
        if count > len(self.content) // 4:
            raise _Damaged(f"a list of {count} entries does not fit its {len(self.content)} bytes")
        return count

    def _indices(self, values: Any, tensors: int, least: int) -> tuple[int, ...]:
        found = tuple(int(v) for v in _array(values))
        wrong = [v for v in found if not least <= v < tensors]
        if wrong:
            raise _Damaged(f"it names tensor {wrong[0]}; it has {tensors}")
        return found

    def _tensor(self, table: Any) -> TfliteTensor:
        name = _text(table.Name())
        shape = tuple(int(d) for d in _array(table.ShapeAsNumpy()))
        if len(shape) > MOST_DIMENSIONS or any(d < 0 for d in shape):
            raise _Damaged(f"tensor '{name}' has {len(shape)} dimensions, which begin with {shape[:MOST_DIMENSIONS]}")
        signature = [int(d) for d in _array(table.ShapeSignatureAsNumpy())]
        dtype = self.types.get(table.Type(), str(table.Type()))
        if table.Sparsity() is not None:
            raise PlanishError(f"tensor '{name}' of the .tflite file is stored sparse; dense tensors are accepted")
        scale, zero_point, axis = self._quantization(table.Quantization(), name, shape)
        data = self._data(table.Buffer(), name, shape, dtype)
        open_axes = tuple(i for i, d in enumerate(signature) if d < 0)
        return TfliteTensor(name, shape, open_axes, dtype, scale, zero_point, axis, data)

    def _quantization(
        self, table: Any, name: str, shape: tuple[int, ...]
    ) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.int64] | None, int]:
        if table is None or not table.ScaleLength():
            return None, None, 0
        scale = _array(table.ScaleAsNumpy()).astype(np.float32)
        zero_point = _array(table.ZeroPointAsNumpy()).astype(np.int64)
        axis = int(table.QuantizedDimension())
        if zero_point.size not in (0, 1, scale.size):
            raise _Damaged(f"tensor '{name}' has {scale.size} scales and {zero_point.size} zero points")
        zero_point = np.broadcast_to(zero_point if zero_point.size else np.zeros(1, np.int64), scale.shape)
        if scale.size > 1 and not (0 <= axis < len(shape) and shape[axis] == scale.size):
            raise _Damaged(f"tensor '{name}' of shape {shape} has {scale.size} scales along dimension {axis}")
        if not np.isfinite(scale).all() or (scale <= 0).any():
            raise _Damaged(f"tensor '{name}' has a scale that is no positive number")
        return scale, zero_point, axis

    def _data(self, index: int, name: str, shape: tuple[int, ...], dtype: str) -> Array | None:
        """Values of a constant. Buffer 0 is empty by convention, and an activation's buffer has no bytes."""
        if index >= self.root.BuffersLength():
            raise _Damaged(f"tensor '{name}' names buffer {index}; it has {self.root.BuffersLength()}")
        table = self.root.Buffers(index)
        if table.Offset() > 1:  # files above 2 GiB keep their data behind the FlatBuffer
            content = self.content[table.Offset() : table.Offset() + table.Size()]
            raw = np.frombuffer(content, np.uint8)
        else:
            raw = _array(table.DataAsNumpy())
        if not raw.size:
            return None
        count = math.prod(shape)
        if dtype == "INT4":
            if raw.size != -(-count // 2):
                raise _Damaged(f"tensor '{name}' of shape {shape} (INT4) has {raw.size} bytes")
            low = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[:count].astype(np.int8)
            return np.where(low > 7, low - 16, low).astype(np.int8).reshape(shape)
        kind = DTYPES.get(dtype)
        if kind is None:
            return None  # a type that no accepted operator reads
        if raw.size != count * np.dtype(kind).itemsize:
            raise _Damaged(f"tensor '{name}' of shape {shape} ({dtype}) has {raw.size} bytes")
        return np.frombuffer(raw.tobytes(), kind).reshape(shape)

    def _operator(self, index: int, table: Any, tensors: int) -> TfliteOperator:
        if table.OpcodeIndex() >= self.root.OperatorCodesLength():
            raise _Damaged(
                f"operator {index} names code {table.OpcodeIndex()}; it has {self.root.OperatorCodesLength()}"
            )
        code = self.root.OperatorCodes(table.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())  # the old field holds a byte, the new one an int
        kind = self.codes.get(number, f"operator {number}")
        if kind == "CUSTOM":
            kind = _text(code.CustomCode()) or kind
        inputs = self._indices(table.InputsAsNumpy(), tensors, -1)
        outputs = self._indices(table.OutputsAsNumpy(), tensors, 0)
        if not outputs:
            raise _Damaged(f"operator {index} ({kind}) has no output")
        return TfliteOperator(index, kind, inputs, outputs, self._options(table, kind, index))

    def _options(self, table: Any, kind: str, index: int) -> dict[str, Any]:
        if kind not in OPTIONS:
            return {}
        type_name, fields = OPTIONS[kind]
        options = getattr(self.schema, type_name)()
        found = table.BuiltinOptions()
        if found is None or table.BuiltinOptionsType() != getattr(self.schema.BuiltinOptions, type_name):
            raise _Damaged(f"operator {index} ({kind}) has no {type_name}")
        options.Init(found.Bytes, found.Pos)
        return {field: getattr(options, field)() for field in fields}


def _text(raw: bytes | None) -> str:
    """A name, short and printable enough for a message."""
    text = (raw or b"")[:LONGEST_NAME].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def _array(values: Any) -> Array:
    """A FlatBuffer vector as an array; the generated reader gives 0 for one that is absent."""
    return values if isinstance(values, np.ndarray) else np.zeros(0, np.int64)


def _names(enumeration: Any) -> dict[int, str]:
    return {v: k for k, v in vars(enumeration).items() if isinstance(v, int) and not k.startswith("_")}
