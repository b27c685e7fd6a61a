"""An int8 `.tflite` model as ONNX with quantize/dequantize pairs (QDQ), so that everything that takes such ONNX takes it.

TFLite's tensors hold channels last, ONNX's convolutions want them first: every four-dimensional tensor is kept channels first, with a
Transpose where the file's own order shows (inputs, outputs, reshapes). In C those vanish again, since its memory order is
TFLite's. Codes count as uint8 inside (int8 + 128), which ONNX Runtime fuses; inputs and outputs keep the file's type.

The numbers are those of the integer contract (kernels/integer.py): the same int32 sums as TFLite's reference kernels, then one float32
multiply rounded half to even where TFLite multiplies with a 31-bit integer and rounds twice, halves away from zero. So a code may differ
by 1 where the exact product lies next to a rounding boundary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from ..common.errors import PlanishError
from . import tflite_file
from .tflite_file import Array, TfliteModel, TfliteOperator, TfliteTensor

OPSET, IR_VERSION = 21, 10
BATCH = "batch"
TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
SAME = 0
"""Padding.SAME of the schema"""
ONNX_TYPES = {"INT8": TensorProto.INT8, "UINT8": TensorProto.UINT8, "FLOAT32": TensorProto.FLOAT}
FUSED: Mapping[int, str] = {1: "RELU", 2: "RELU_N1_TO_1", 3: "RELU6"}
"""ActivationFunctionType of the schema, as the operator of the same function"""
CLIPS: Mapping[str, tuple[float, float]] = {
    "RELU": (0, math.inf),
    "RELU_N1_TO_1": (-1, 1),
    "RELU_0_TO_1": (0, 1),
    "RELU6": (0, 6),
}
ELEMENTWISE: Mapping[str, str] = {
    "LOGISTIC": "Sigmoid",
    "TANH": "Tanh",
    "HARD_SWISH": "HardSwish",
    "ELU": "Elu",
    "EXP": "Exp",
    "ABS": "Abs",
    "NEG": "Neg",
}
"""operators of one value that have a name in ONNX"""


@dataclass(frozen=True)
class Value:
    """What an activation of the file is in the ONNX graph."""

    real: str
    """float32 tensor of `shape`"""
    shape: tuple[int, ...]
    """channels first where it has four dimensions"""
    quantization: tuple[np.float32, int] | None
    """scale and zero point in uint8 codes; None for a float input of the model"""


def load(path: Path) -> onnx.ModelProto:
    """The QDQ model (opset 21, batch dynamic) of a fully quantized int8 or uint8 `.tflite` file.

    Raises PlanishError for a damaged file, for float and partly quantized models, for open dimensions besides the batch and for
    operators that are not known, naming operator or tensor.
    """
    return convert(tflite_file.read(path), str(path))


def convert(model: TfliteModel, source: str) -> onnx.ModelProto:
    """See `load`; `source` names the file in messages."""
    return _Converter(model, source).model()


class _Converter:
    """Builds the ONNX graph operator by operator. `op` is the one at hand."""

    def __init__(self, model: TfliteModel, source: str) -> None:
        self.tflite, self.source = model, source
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.values: dict[int, Value] = {}
        self.names: set[str] = set()
        self.label = ""
        self.where = ""
        self.op = TfliteOperator(0, "", (), (), {})

    def model(self) -> onnx.ModelProto:
        """The whole file."""
        inputs = [self._input(i) for i in self.tflite.inputs]
        for op in _live(self.tflite):
            self.op, self.label = op, f"{op.kind.lower()}_{op.index}"
            self.where = f"'{self.source}': {op.kind} (operator {op.index})"
            if op.kind not in OPERATORS:
                self.fail(f"is not covered; known are {', '.join(sorted(OPERATORS))}")
            OPERATORS[op.kind](self)
        outputs = [self._output(i) for i in self.tflite.outputs]
        constants = [numpy_helper.from_array(v, n) for n, v in self.constants.items()]
        graph = helper.make_graph(self.nodes, "tflite", inputs, outputs, constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        self._check_shapes(made)
        return made

    def fail(self, text: str) -> NoReturn:
        """Raise PlanishError about the operator or tensor at hand."""
        raise PlanishError(f"{self.where} {text}")

    # --- borders

    def _input(self, index: int) -> onnx.ValueInfoProto:
        tensor = self._border(index, "input")
        name = self.label
        real, quantization = name, None
        if tensor.dtype != "FLOAT32":
            scale, zero = self.quantization(tensor)
            kind = np.int8 if tensor.dtype == "INT8" else np.uint8
            real = self.emit("DequantizeLinear", [name, self.const(scale), self.const(kind(tensor.zero_point[0]))])  # pyright: ignore[reportOptionalSubscript] - quantization() has looked
            real = self._pair(real, scale, zero)
            quantization = scale, zero
        real = self.emit("Transpose", [real], perm=TO_FIRST) if len(tensor.shape) == 4 else real
        self.values[index] = Value(real, _first(tensor.shape), quantization)
        return helper.make_tensor_value_info(name, ONNX_TYPES[tensor.dtype], [BATCH, *tensor.shape[1:]])

    def _output(self, index: int) -> onnx.ValueInfoProto:
        tensor = self._border(index, "output")
        value = self.values.get(index)
        if value is None or value.quantization is None:
            self.fail("is made by no operator from quantized values")
        scale, zero = value.quantization
        shift = 128 if tensor.dtype == "INT8" else 0
        kind = np.int8 if shift else np.uint8
        given = [self.const(scale), self.const(kind(zero - shift))]
        real = self.last(value)
        if tensor.dtype == "FLOAT32":
            codes = self.emit("QuantizeLinear", [real, *given])
            self.emit("DequantizeLinear", [codes, *given], name=self.label)
        else:
            self.emit("QuantizeLinear", [real, *given], name=self.label)
        return helper.make_tensor_value_info(self.label, ONNX_TYPES[tensor.dtype], [BATCH, *tensor.shape[1:]])

    def _border(self, index: int, side: str) -> TfliteTensor:
        tensor = self.tflite.tensors[index]
        self.where = f"'{self.source}': {side} '{tensor.name}'"
        self.label = self.unique(_plain_name(tensor.name) or side)
        if tensor.dtype not in ONNX_TYPES:
            self.fail(f"has type {tensor.dtype}; {', '.join(ONNX_TYPES)} are accepted")
        self._check_static(tensor)
        return tensor

    def _check_static(self, tensor: TfliteTensor) -> None:
        """Refuse open dimensions and a batch other than 1."""
        about = "" if tensor.name in self.where else f": tensor '{tensor.name}'"
        if any(a > 0 for a in tensor.dynamic):
            axis = next(a for a in tensor.dynamic if a > 0)
            self.fail(f"{about} leaves dimension {axis} open; static shapes are accepted, with an open batch".lstrip())
        if not tensor.shape or tensor.shape[0] != 1 or 0 in tensor.shape:
            self.fail(f"{about} has the shape {tensor.shape}; a batch of 1 in front is accepted".lstrip())

    def _check_shapes(self, model: onnx.ModelProto) -> None:
        """Compare the shapes that the operators give with those that the file states."""
        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        for output in probe.graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            inferred = shape_inference.infer_shapes(probe, strict_mode=True, data_prop=True).graph
        except shape_inference.InferenceError as error:
            text = " ".join(str(error).split())
            raise PlanishError(f"'{self.source}': its operators do not fit their tensors: {text[:200]}") from None
        found = {
            v.name: v.type.tensor_type.shape.dim for v in [*inferred.value_info, *inferred.input, *inferred.output]
        }
        for index, value in self.values.items():
            dims = tuple(d.dim_value for d in found.get(value.real, ()))
            if len(dims) != len(value.shape) or dims[1:] != value.shape[1:]:
                tensor = self.tflite.tensors[index]
                raise PlanishError(
                    f"'{self.source}': tensor '{tensor.name}' is stated to have the shape {tensor.shape}, which its operator does not give"
                )

    # --- parts of the ONNX graph

    def emit(self, kind: str, inputs: Sequence[str], name: str | None = None, **attributes: Any) -> str:
        """Add a node named after the operator at hand; the name of its one output."""
        return self.emit_many(kind, inputs, 1, name, **attributes)[0]

    def emit_many(
        self, kind: str, inputs: Sequence[str], outputs: int, name: str | None = None, **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs."""
        if name is None:
            name = self.unique(self.label if self.label not in self.names else f"{self.label}_{kind.lower()}")
        made = [name] if outputs == 1 else [self.unique(f"{name}_{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=name, **attributes))
        return made

    def const(self, values: Any) -> str:
        """A constant of the ONNX graph."""
        name = self.unique(f"{self.label}_constant")
        self.constants[name] = np.asarray(values, order="C")
        return name

    def ints(self, values: Sequence[int]) -> str:
        """A constant list of int64."""
        return self.const(np.array(values, np.int64))

    def unique(self, name: str) -> str:
        """A name of the ONNX graph that is not taken."""
        found, count = name, 1
        while found in self.names:
            count += 1
            found = f"{name}_{count}"
        self.names.add(found)
        return found

    def _pair(self, real: str, scale: np.float32, zero: int) -> str:
        """Quantize to uint8 and back."""
        given = [self.const(scale), self.const(np.uint8(zero))]
        return self.emit("DequantizeLinear", [self.emit("QuantizeLinear", [real, *given]), *given])

    # --- what operators read

    def tensor(self, position: int) -> TfliteTensor:
        """The file's tensor that is input `position` of the operator."""
        index = self.op.inputs[position] if position < len(self.op.inputs) else -1
        if index < 0:
            self.fail(f"has no input {position}")
        return self.tflite.tensors[index]

    def value(self, position: int = 0) -> Value:
        """The activation that is input `position`."""
        tensor = self.tensor(position)
        found = self.values.get(self.op.inputs[position])
        if found is None:
            made = "is constant" if tensor.data is not None else "is made by no operator before it"
            self.fail(f"reads '{tensor.name}', which {made}; an activation is accepted there")
        return found

    def last(self, value: Value) -> str:
        """The activation in TFLite's order of axes."""
        return self.emit("Transpose", [value.real], perm=TO_LAST) if len(value.shape) == 4 else value.real

    def numbers(self, position: int) -> list[int]:
        """A constant integer operand: axes, paddings, a permutation, ..."""
        tensor = self.tensor(position)
        if tensor.data is None or tensor.data.dtype.kind not in "iu":
            self.fail(f"has the operand '{tensor.name}', which is not a constant of integers")
        return [int(v) for v in tensor.data.reshape(-1)]

    def axis(self, value: int, rank: int) -> int:
        """An axis in TFLite's order as an axis of the ONNX tensor."""
        if not -rank <= value < rank:
            self.fail(f"names axis {value} of a tensor with {rank} dimensions")
        return TO_LAST[value % rank] if rank == 4 else value % rank

    def quantization(self, tensor: TfliteTensor) -> tuple[np.float32, int]:
        """Scale and uint8 zero point of an INT8 or UINT8 tensor with one scale."""
        if tensor.scale is None or tensor.zero_point is None:
            self.fail(
                f"has the {tensor.dtype} tensor '{tensor.name}' without a scale; a fully quantized model is accepted"
            )
        if tensor.scale.size != 1:
            self.fail(f"has '{tensor.name}' quantized per channel; one scale is accepted there")
        zero = int(tensor.zero_point[0]) + (128 if tensor.dtype == "INT8" else 0)
        if not 0 <= zero <= 255:
            self.fail(f"has '{tensor.name}' with the zero point {tensor.zero_point[0]}, outside of {tensor.dtype}")
        return np.float32(tensor.scale[0]), zero

    # --- what operators write

    def finish(self, real: str, position: int = 0) -> None:
        """The operator's fused activation, then the quantization that the file gives its output."""
        index = self.op.outputs[position]
        tensor = self.tflite.tensors[index]
        self.check_integer(tensor)
        self._check_static(tensor)
        fused = self.op.options.get("FusedActivationFunction", 0)
        if fused:
            if fused not in FUSED:
                self.fail(f"has the fused activation {fused}; none, {', '.join(FUSED.values())} are accepted")
            real = self.clip(real, FUSED[fused])
        scale, zero = self.quantization(tensor)
        self.values[index] = Value(self._pair(real, scale, zero), _first(tensor.shape), (scale, zero))

    def clip(self, real: str, kind: str) -> str:
        """RELU and its kin."""
        low, high = CLIPS[kind]
        if math.isinf(high):
            return self.emit("Relu", [real])
        return self.emit("Clip", [real, self.const(np.float32(low)), self.const(np.float32(high))])

    def check_integer(self, tensor: TfliteTensor) -> None:
        """Refuse an activation that is not in 8 bits, saying what kind of model it is."""
        if tensor.dtype in ("INT8", "UINT8"):
            return
        wants = "accepted are models whose weights and activations are all int8 (full integer quantization)"
        if tensor.dtype != "FLOAT32":
            self.fail(f"gives '{tensor.name}' in {tensor.dtype}; {wants}")
        read = [self.tflite.tensors[i] for i in self.op.inputs if i >= 0]
        narrow = any(t.data is not None and t.dtype in ("INT8", "UINT8", "INT4") for t in read)
        what = "its weights are int8, its activations float (dynamic-range quantization)" if narrow else "a float model"
        self.fail(f"gives '{tensor.name}' in FLOAT32: {what}; {wants}")


def _live(model: TfliteModel) -> list[TfliteOperator]:
    """The operators that an output needs. A computed shape of a RESHAPE is not: the file states its result."""
    needed = set(model.outputs)
    found = []
    for op in reversed(model.operators):
        if needed.intersection(op.outputs):
            found.append(op)
            needed.update(op.inputs[:1] if op.kind == "RESHAPE" else op.inputs)
    return found[::-1]


def _first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of the file as the ONNX graph has it."""
    return tuple(shape[a] for a in TO_FIRST) if len(shape) == 4 else shape


def _plain_name(name: str) -> str:
    """'serving_default_input_1:0' -> 'input_1'."""
    return re.sub(r"\W", "_", re.sub(r":\d+$", "", name).removeprefix("serving_default_"), flags=re.ASCII)


# --- operators


def _convolution(c: _Converter) -> None:
    """CONV_2D with weight (out, kh, kw, in / groups), DEPTHWISE_CONV_2D with weight (1, kh, kw, out)."""
    x, weight = c.value(), c.tensor(1)
    depthwise = c.op.kind == "DEPTHWISE_CONV_2D"
    if len(x.shape) != 4 or len(weight.shape) != 4 or (depthwise and weight.shape[0] != 1):
        c.fail(f"has an input {x.shape} and a weight {weight.shape}; four dimensions each are accepted")
    channels = x.shape[1]
    order = (3, 0, 1, 2) if depthwise else TO_FIRST  # to (out, in / groups, kh, kw)
    outputs, depth, kh, kw = (weight.shape[a] for a in order)
    groups = channels // depth if depth else 0
    if not groups or groups * depth != channels or outputs % groups:
        c.fail(f"has a weight {weight.shape} that does not fit {channels} input channels")
    o = c.op.options
    stride, dilation = (o["StrideH"], o["StrideW"]), (o["DilationHFactor"], o["DilationWFactor"])
    inputs = [x.real, *_weights(c, x, weight, order)]
    y = c.emit(
        "Conv",
        inputs,
        group=groups,
        kernel_shape=(kh, kw),
        strides=stride,
        dilations=dilation,
        pads=_pads(c, x.shape[2:], (kh, kw), stride, dilation),
    )
    c.finish(y)


def _weights(c: _Converter, x: Value, weight: TfliteTensor, order: tuple[int, ...]) -> list[str]:
    """The dequantized weight, its axes in `order` (outputs first), and the bias if there is one."""
    c.check_integer(c.tflite.tensors[c.op.outputs[0]])
    if weight.data is None or weight.dtype not in ("INT8", "UINT8", "INT4"):
        text = "is computed" if weight.data is None else f"has type {weight.dtype}"
        c.fail(f"has the weight '{weight.name}', which {text}; a constant of INT8, UINT8 or INT4 is accepted")
    if x.quantization is None:
        c.fail("reads a float input; QUANTIZE is accepted there")
    scale, zero_point = weight.scale, weight.zero_point
    if scale is None or zero_point is None:
        c.fail(f"has the weight '{weight.name}' without a scale; a fully quantized model is accepted")
    if scale.size > 1 and weight.axis != order[0]:
        c.fail(f"has the weight '{weight.name}' with scales along dimension {weight.axis}; {order[0]} is accepted")
    kind = weight.data.dtype
    limits = np.iinfo(kind)
    if (zero_point < limits.min).any() or (zero_point > limits.max).any():
        c.fail(f"has the weight '{weight.name}' with a zero point outside of {weight.dtype}")
    codes = np.ascontiguousarray(weight.data.transpose(order))  # (out, ...)
    single = scale.size == 1
    given = [v[0] if single else v for v in (scale, zero_point.astype(kind))]
    axis = {} if single else {"axis": 0}
    made = [
        c.emit(
            "DequantizeLinear", [c.const(codes), *(c.const(v) for v in given)], c.unique(f"{c.label}_weight"), **axis
        )
    ]
    if len(c.op.inputs) > 2 and c.op.inputs[2] >= 0:
        bias = c.tensor(2)
        if bias.data is None or bias.dtype != "INT32" or bias.data.size != len(codes):
            c.fail(f"has the bias '{bias.name}' {bias.shape} ({bias.dtype}); {len(codes)} constant INT32 are accepted")
        # TFLite adds the integers to its sums, whatever scale the file gives them
        own = (x.quantization[0] * given[0]).astype(np.float32)
        if not np.isfinite(own).all() or (own <= 0).any():
            c.fail("has scales whose product is no positive float32")
        operands = [c.const(bias.data.reshape(-1)), c.const(own)]
        made.append(c.emit("DequantizeLinear", operands, c.unique(f"{c.label}_bias"), **axis))
    return made


def _pads(
    c: _Converter, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """ONNX pads (top, left, bottom, right); TFLite's SAME puts the odd one at the bottom or right."""
    if min(*kernel, *stride, *dilation) < 1:
        c.fail(
            f"has kernel {tuple(kernel)}, stride {tuple(stride)} and dilation {tuple(dilation)}; at least 1 is accepted"
        )
    if c.op.options["Padding"] != SAME:
        return [0, 0, 0, 0]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    total = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(sizes, stride, spans, strict=True)]
    return [t // 2 for t in total] + [t - t // 2 for t in total]


def _fully_connected(c: _Converter) -> None:
    """Weight (out, in); the input is read as rows of `in`."""
    x, weight = c.value(), c.tensor(1)
    if c.op.options["WeightsFormat"] or len(weight.shape) != 2:
        c.fail(
            f"has a weight {weight.shape} in format {c.op.options['WeightsFormat']}; (out, in) in format 0 is accepted"
        )
    outputs, depth = weight.shape
    size = math.prod(x.shape)
    if not depth or size % depth:
        c.fail(f"has a weight {weight.shape} that does not fit the input {x.shape}")
    rows = size // depth
    real = (
        x.real
        if x.shape == (1, depth)
        else c.emit("Reshape", [c.last(x), c.ints([-1, *([rows] if rows > 1 else []), depth])])
    )
    operands = _weights(c, x, weight, (0, 1))
    if rows == 1:
        y = c.emit("Gemm", [real, *operands], transB=1)
    else:
        turned = c.emit("Transpose", [operands[0]], perm=(1, 0))
        y = c.emit("MatMul", [real, turned])  # (1, rows, out)
        y = c.emit("Add", [y, operands[1]]) if len(operands) > 1 else y
    shape = c.tflite.tensors[c.op.outputs[0]].shape
    if shape != ((1, outputs) if rows == 1 else (1, rows, outputs)):
        y = _reshaped(c, y, shape)
    c.finish(y)


def _reshaped(c: _Converter, real: str, shape: tuple[int, ...]) -> str:
    """A tensor in TFLite's order under another shape of the file, as the ONNX graph keeps it."""
    y = c.emit("Reshape", [real, c.ints([-1, *shape[1:]])])
    return c.emit("Transpose", [y], perm=TO_FIRST) if len(shape) == 4 else y


def _reshape(c: _Converter) -> None:
    """RESHAPE, SQUEEZE, EXPAND_DIMS: the shape is the one that the file states for the output."""
    x, tensor = c.value(), c.tflite.tensors[c.op.outputs[0]]
    if math.prod(tensor.shape) != math.prod(x.shape):
        c.fail(f"makes {tensor.shape} of {math.prod(x.shape)} elements")
    c.finish(_reshaped(c, c.last(x), tensor.shape))


def _binary(kind: str) -> Callable[[_Converter], None]:
    def convert(c: _Converter) -> None:
        rank = len(c.tflite.tensors[c.op.outputs[0]].shape)
        c.finish(c.emit(kind, [_broadcast(c, i, rank) for i in range(2)]))

    return convert


def _broadcast(c: _Converter, position: int, rank: int) -> str:
    """Operand `position` with `rank` dimensions, which TFLite aligns at the last one."""
    tensor = c.tensor(position)
    if len(tensor.shape) > rank:
        c.fail(f"has the operand '{tensor.name}' {tensor.shape} with more dimensions than its output")
    shape = (1,) * (rank - len(tensor.shape)) + tensor.shape
    if c.op.inputs[position] in c.values or tensor.data is None:
        x = c.value(position)
        return x.real if len(x.shape) == rank else _reshaped(c, c.last(x), shape)
    c.check_integer(tensor)
    scale, zero = c.quantization(tensor)
    codes = tensor.data.astype(np.int16) + (128 if tensor.dtype == "INT8" else 0)
    codes = codes.astype(np.uint8).reshape(shape)
    codes = codes.transpose(TO_FIRST) if rank == 4 else codes
    return c.emit(
        "DequantizeLinear", [c.const(codes), c.const(scale), c.const(np.uint8(zero))], c.unique(f"{c.label}_operand")
    )


def _pool(kind: str) -> Callable[[_Converter], None]:
    def convert(c: _Converter) -> None:
        x, o = c.value(), c.op.options
        if len(x.shape) != 4:
            c.fail(f"has an input {x.shape}; four dimensions are accepted")
        kernel, stride = (o["FilterHeight"], o["FilterWidth"]), (o["StrideH"], o["StrideW"])
        pads = _pads(c, x.shape[2:], kernel, stride, (1, 1))
        c.finish(c.emit(kind, [x.real], kernel_shape=kernel, strides=stride, pads=pads))

    return convert


def _mean(c: _Converter) -> None:
    """The mean over height and width, or over the steps of (1, steps, channels)."""
    x = c.value()
    rank = len(x.shape)
    axes = sorted(a % rank if -rank <= a < rank else a for a in c.numbers(1))
    if (rank, axes) not in ((4, [1, 2]), (3, [1])):
        c.fail(f"runs over the axes {axes} of {rank}; [1, 2] of 4 and [1] of 3 are accepted")
    image = x.real if rank == 4 else _reshaped(c, x.real, (1, x.shape[1], 1, x.shape[2]))
    y = c.emit("GlobalAveragePool", [image])  # (1, c, 1, 1)
    shape = c.tflite.tensors[c.op.outputs[0]].shape
    c.finish(y if len(shape) == 4 else c.emit("Reshape", [y, c.ints([-1, *shape[1:]])]))


def _softmax(c: _Converter) -> None:
    """Along the last axis."""
    x = c.value()
    if c.op.options["Beta"] != 1:
        c.fail(f"has beta {c.op.options['Beta']}; 1 is accepted")
    c.finish(c.emit("Softmax", [x.real], axis=c.axis(-1, len(x.shape))))


def _clip(c: _Converter) -> None:
    """RELU and its kin, standing alone."""
    c.finish(c.clip(c.value().real, c.op.kind))


def _elementwise(c: _Converter) -> None:
    """See ELEMENTWISE."""
    c.finish(c.emit(ELEMENTWISE[c.op.kind], [c.value().real]))


def _leaky_relu(c: _Converter) -> None:
    """Below 0 multiplied by alpha."""
    c.finish(c.emit("LeakyRelu", [c.value().real], alpha=float(c.op.options["Alpha"])))


def _gelu(c: _Converter) -> None:
    """Exact, or by tanh."""
    c.finish(c.emit("Gelu", [c.value().real], approximate="tanh" if c.op.options["Approximate"] else "none"))


def _concatenation(c: _Converter) -> None:
    """Along any axis but the batch."""
    values = [c.value(i) for i in range(len(c.op.inputs))]
    c.finish(c.emit("Concat", [v.real for v in values], axis=c.axis(c.op.options["Axis"], len(values[0].shape))))


def _pad(c: _Converter) -> None:
    """PAD with zeros, PADV2 with a constant: paddings (rank, 2)."""
    x, given = c.value(), c.numbers(1)
    rank = len(x.shape)
    if len(given) != 2 * rank or min(given) < 0:
        c.fail(f"has the paddings {given} for {rank} dimensions; two for each, at least 0, are accepted")
    pads = [0] * 2 * rank
    for i in range(rank):
        axis = c.axis(i, rank)
        pads[axis], pads[rank + axis] = given[2 * i], given[2 * i + 1]
    operands = [x.real, c.ints(pads)]
    if c.op.kind == "PADV2":
        fill = c.tensor(2)
        if fill.data is None or fill.data.size != 1:
            c.fail(f"fills with '{fill.name}', which is not one constant")
        c.check_integer(fill)
        scale, zero = c.quantization(fill)
        code = int(fill.data.item()) + (128 if fill.dtype == "INT8" else 0)
        operands.append(c.const(np.float32(scale * (code - zero))))
    c.finish(c.emit("Pad", operands))


def _transpose(c: _Converter) -> None:
    """The batch stays in front."""
    x, order = c.value(), c.numbers(1)
    if sorted(order) != list(range(len(x.shape))) or order[0] != 0:
        c.fail(f"has the order {order} of {len(x.shape)} dimensions; one that starts with 0, the batch, is accepted")
    y = c.emit("Transpose", [c.last(x)], perm=order)
    c.finish(c.emit("Transpose", [y], perm=TO_FIRST) if len(x.shape) == 4 else y)


def _strided_slice(c: _Converter) -> None:
    """Constant bounds; a shrunk axis vanishes."""
    x, o = c.value(), c.op.options
    if o["EllipsisMask"] or o["NewAxisMask"]:
        c.fail("has an ellipsis or a new axis; plain bounds are accepted")
    begin, end, steps = (c.numbers(i) for i in (1, 2, 3))
    sizes = c.tensor(0).shape
    if not len(begin) == len(end) == len(steps) <= len(sizes) or 0 in steps:
        c.fail(f"has {len(begin)} begins, {len(end)} ends and the steps {steps} for the shape {sizes}")
    windows: dict[int, tuple[int, int, int]] = {}
    for i, (low, high, step, size) in enumerate(zip(begin, end, steps, sizes, strict=False)):
        if o["ShrinkAxisMask"] >> i & 1:
            at = low + size if low < 0 else low
            windows[i] = at, at + 1, 1
        else:
            bounds = (None if o["BeginMask"] >> i & 1 else low, None if o["EndMask"] >> i & 1 else high)
            windows[i] = slice(*bounds, step).indices(size)
    _sliced(c, x, windows)


def _slice(c: _Converter) -> None:
    """Begin and size of every axis; a size of -1 takes the rest."""
    x, sizes = c.value(), c.tensor(0).shape
    begin, count = c.numbers(1), c.numbers(2)
    if not len(begin) == len(count) == len(sizes):
        c.fail(f"has {len(begin)} begins and {len(count)} sizes for the shape {sizes}")
    _sliced(c, x, {i: (b, sizes[i] if n < 0 else b + n, 1) for i, (b, n) in enumerate(zip(begin, count, strict=True))})


def _sliced(c: _Converter, x: Value, windows: Mapping[int, tuple[int, int, int]]) -> None:
    """The windows (first, end, step) by TFLite's axis, then the shape that the file states."""
    sizes, rank = c.tensor(0).shape, len(x.shape)
    chosen = {i: w for i, w in windows.items() if w != (0, sizes[i], 1)}
    if any(not range(*w) for w in chosen.values()):
        c.fail(f"takes nothing of the shape {sizes}")
    y, shape = x.real, list(x.shape)
    if chosen:
        # an end before the first element is counted from the end, so that ONNX does not take -1 for the last
        ends = [e if e >= 0 else -sizes[i] - 1 for i, (_, e, _) in chosen.items()]
        axes = [c.axis(i, rank) for i in chosen]
        lists = [w[0] for w in chosen.values()], ends, axes, [w[2] for w in chosen.values()]
        y = c.emit("Slice", [y, *(c.ints(v) for v in lists)])
        for axis, window in zip(axes, chosen.values(), strict=True):
            shape[axis] = len(range(*window))
    wanted = c.tflite.tensors[c.op.outputs[0]].shape
    if tuple(shape) != _first(wanted):
        if math.prod(shape) != math.prod(wanted):
            c.fail(f"gives the shape {tuple(shape)}; the file states {wanted}")
        y = _reshaped(c, c.last(Value(y, tuple(shape), None)), wanted)
    c.finish(y)


def _split(c: _Converter) -> None:
    """SPLIT (axis, x) in equal parts, SPLIT_V (x, sizes, axis)."""
    x, axis = (c.value(1), c.numbers(0)) if c.op.kind == "SPLIT" else (c.value(0), c.numbers(2))
    at = c.axis(axis[0] if axis else 0, len(x.shape))
    sizes = [_first(c.tflite.tensors[i].shape)[at] for i in c.op.outputs]
    if sum(sizes) != x.shape[at]:
        c.fail(f"gives {sizes} of {x.shape[at]} elements along its axis")
    for i, name in enumerate(c.emit_many("Split", [x.real, c.ints(sizes)], len(sizes), axis=at)):
        c.finish(name, i)


def _quantize(c: _Converter) -> None:
    """A float input to codes, or codes to other codes."""
    c.finish(c.value().real)


def _dequantize(c: _Converter) -> None:
    """Codes to a float output."""
    x = c.value()
    if x.quantization is None:
        c.fail("reads no quantized activation")
    c.values[c.op.outputs[0]] = x


OPERATORS: Mapping[str, Callable[[_Converter], None]] = {
    "ADD": _binary("Add"),
    "MUL": _binary("Mul"),
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _convolution,
    "FULLY_CONNECTED": _fully_connected,
    "AVERAGE_POOL_2D": _pool("AveragePool"),
    "MAX_POOL_2D": _pool("MaxPool"),
    "MEAN": _mean,
    "RESHAPE": _reshape,
    "SQUEEZE": _reshape,
    "EXPAND_DIMS": _reshape,
    "SOFTMAX": _softmax,
    "LEAKY_RELU": _leaky_relu,
    "GELU": _gelu,
    "CONCATENATION": _concatenation,
    "PAD": _pad,
    "PADV2": _pad,
    "TRANSPOSE": _transpose,
    "STRIDED_SLICE": _strided_slice,
    "SLICE": _slice,
    "SPLIT": _split,
    "SPLIT_V": _split,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    **dict.fromkeys(CLIPS, _clip),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
}
"""what each operator of the file becomes"""
