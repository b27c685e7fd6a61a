"""Reading a quantized ONNX model (quantize/dequantize pairs, QDQ) into the deployment graph.

The pattern is `dequantize -> op [-> relu or clip] -> quantize`: the importer walks the nodes once and keeps for every
ONNX tensor what it stands for: codes, dequantized codes, a constant, or the result of an op that is not quantized yet.
Ops that only move elements commute with quantization, so they run on the codes wherever they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from ..common.errors import PlanishError
from ..kernels import integer
from ..kernels.op import Constant, FloatOp, Node, Tensor, Unsupported, ops
from . import curves, fold, one_dimensional, rewrite, rows
from .graph import Array, Graph, Port

SAME_ORDER = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")
"""ops that keep the elements in their order: all are a Reshape to the output's shape"""
MOVES = (*SAME_ORDER, "Transpose", "Slice", "Split", "Gather", "Pad", "MaxPool")
"""ops whose output elements are input elements, so that codes and real values move alike"""
BORDER = ("QuantizeLinear", "DequantizeLinear")
SMALLEST, LARGEST = 2.0**-64, 2.0**64
"""scales of activations, so that float32 holds what is computed with them"""


@dataclass(frozen=True)
class Codes:
    """An integer ONNX tensor: codes."""

    tensor: Tensor
    unsigned: bool


@dataclass(frozen=True)
class Real:
    """A float ONNX tensor that is dequantized codes."""

    tensor: Tensor
    unsigned: bool


@dataclass(frozen=True)
class Move:
    """A data movement: ONNX type, name, attributes, constant inputs, and the shape that comes out."""

    type: str
    name: str
    output: str
    attributes: Mapping[str, Any]
    constants: tuple[Constant | None, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pending:
    """A float ONNX tensor that waits for its quantization: an op's result, or an input of the model (`node` is None)."""

    node: onnx.NodeProto | None
    type: str
    output: str
    """the ONNX tensor, or the model's input"""
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]
    inputs: tuple[Tensor | Constant | None, ...] = ()
    low: float = -np.inf
    high: float = np.inf
    moves: tuple[Move, ...] = ()


Known = Codes | Real | Pending | Constant


def read(model: onnx.ModelProto) -> Graph:
    """The deployment graph of a QDQ model of opset 13 or newer.

    Raises PlanishError for an op that no file of kernels/ takes (naming the node and listing the ops), for a float
    tensor that stays unquantized, and for dynamic shapes.
    """
    if not any(n.op_type in BORDER for n in model.graph.node):
        raise PlanishError(
            "the model is not quantized: it has no QuantizeLinear and DequantizeLinear; integer code needs both around "
            "every op (the recipe w8a8-static puts them there)"
        )
    return _Reader(one_dimensional.widen(rows.arrange(fold.fold(model)))).graph()


class _Reader:
    def __init__(self, folded: fold.Folded) -> None:
        self.folded = folded
        self.ops = ops()
        self.op_types = {t for op in self.ops.values() for t in op.onnx_types}
        self.known_types = sorted(self.op_types | set(MOVES) | set(BORDER) | set(curves.OPS))
        self.values: dict[str, Known] = {}
        self.ports: dict[str, Port] = {}
        self.nodes: list[Node] = []
        self.moved: dict[str, rewrite.Moved] = {}
        self.quantized: dict[tuple[str, float, int], Tensor] = {}
        self.names: set[str] = set()
        self.node_names: set[str] = set()

    def graph(self) -> Graph:
        for value in self.folded.inputs:
            if value.dtype == np.float32:
                self.values[value.name] = Pending(None, "input", value.name, value.shape, {})
            elif value.dtype not in (np.int8, np.uint8):
                raise PlanishError(
                    f"input '{value.name}' has dtype {value.dtype}; float32, int8 and uint8 are accepted"
                )
        for node in self.folded.nodes:
            if node.op_type not in self.known_types:
                raise PlanishError(
                    f"node '{fold.label(node)}' is a '{node.op_type}', which integer kernels do not cover; "
                    f"known: {', '.join(self.known_types)}"
                )
            self._visit(node)
        outputs = [self._output(value) for value in self.folded.outputs]
        inputs = [self._input(value) for value in self.folded.inputs]
        return rewrite.simplify(Graph(tuple(self.nodes), tuple(inputs), tuple(outputs)), self.moved)

    # --- borders of the model

    def _input(self, value: fold.Value) -> Port:
        if value.name not in self.ports:
            raise PlanishError(f"input '{value.name}' is never quantized; its first op must be QuantizeLinear")
        return self.ports[value.name]

    def _output(self, value: fold.Value) -> Port:
        found = self.values.get(value.name)
        axes = tuple(range(len(value.shape)))
        if isinstance(found, Real):
            return Port(value.name, value.shape, "float32", found.tensor, axes)
        if isinstance(found, Codes):
            return Port(value.name, value.shape, "uint8" if found.unsigned else "int8", found.tensor, axes)
        if isinstance(found, Pending):
            raise PlanishError(
                f"output '{value.name}' ({found.type}) is a float tensor that is not quantized; "
                "QuantizeLinear and DequantizeLinear must stand before it"
            )
        raise PlanishError(f"output '{value.name}' does not depend on the model's inputs")

    def _port(self, name: str, dtype: str, tensor: Tensor) -> None:
        """Make `tensor` the codes of the model's input `name`."""
        if name in self.ports and self.ports[name].tensor != tensor:
            raise PlanishError(f"input '{name}' is quantized in two ways; one scale and zero point is accepted")
        self.ports[name] = Port(name, tensor.shape, dtype, tensor, tuple(range(len(tensor.shape))))

    # --- one ONNX node

    def _visit(self, node: onnx.NodeProto) -> None:
        if node.op_type == "DequantizeLinear":
            self.values[node.output[0]] = self._dequantize(node)
            return
        if node.op_type == "QuantizeLinear":
            self.values[node.output[0]] = self._quantize(node)
            return
        operands = [self._operand(name) for name in node.input]
        first = operands[0] if operands else None
        if all(o is None or isinstance(o, Constant) for o in operands):
            self.values[node.output[0]] = self._constant(node, operands)
        elif node.op_type == "Split" and first is not None:
            self._split(node, first)
        elif (
            node.op_type in MOVES
            and isinstance(first, (Codes, Real, Pending))
            and self._moves_freely(node, first, operands)
        ):
            self.values[node.output[0]] = self._apply(first, self._move(node, first, operands))
        elif node.op_type in ("Relu", "Clip") and isinstance(first, Pending) and first.node is not None:
            low, high = _bounds(node, operands)
            kept = [float(np.clip(v, low, high)) for v in (first.low, first.high)]
            self.values[node.output[0]] = replace(first, low=kept[0], high=kept[1], output=node.output[0])
        elif (curve := self._curve(node, operands)) is not None:
            self.values[node.output[0]] = curve
        elif node.op_type == "Add" and (biased := self._bias(node, operands)) is not None:
            self.values[node.output[0]] = biased
        elif node.op_type == "Concat" and all(isinstance(o, Codes) for o in operands):
            self.values[node.output[0]] = self._concat_codes(node, [o for o in operands if isinstance(o, Codes)])
        else:
            self.values[node.output[0]] = self._float_op(node, operands)

    def _operand(self, name: str) -> Known | None:
        if not name:
            return None
        if name in self.folded.constants and name not in self.values:
            return Constant(name, self.folded.constants[name])
        return self._input_codes(name) if name not in self.values else self.values[name]

    def _input_codes(self, name: str) -> Known:
        raise PlanishError(f"input '{name}' holds codes but is used without DequantizeLinear, so its scale is unknown")

    def _parameters(self, node: onnx.NodeProto) -> tuple[Array, Array]:
        """Scale float32 and zero point of a QuantizeLinear or DequantizeLinear."""
        constants = self.folded.constants
        lacking = [n for n in node.input[1:] if n and n not in constants]
        if lacking:
            raise PlanishError(
                f"node '{fold.label(node)}' ({node.op_type}) has a scale or zero point that is not constant"
            )
        scale = np.asarray(constants[node.input[1]], np.float32)
        if len(node.input) > 2 and node.input[2]:
            return scale, constants[node.input[2]]
        kind = fold.attributes(node).get("output_dtype", 0)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind else np.uint8
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            dtype = constants[node.input[0]].dtype
        return scale, np.zeros(scale.shape, dtype)

    def _tensor_parameters(self, node: onnx.NodeProto) -> tuple[np.float32, int, bool]:
        """Scale, int8 zero point and whether the codes are unsigned, of an activation's quantization."""
        scale, zero = self._parameters(node)
        where = f"node '{fold.label(node)}' ({node.op_type})"
        if scale.size != 1 or zero.size != 1:
            raise PlanishError(f"{where} quantizes an activation per channel; one scale per tensor is accepted")
        if zero.dtype not in (np.int8, np.uint8):
            raise PlanishError(f"{where} has codes of type {zero.dtype}; activations of int8 and uint8 are accepted")
        unsigned = zero.dtype == np.uint8
        if not SMALLEST <= scale.item() <= LARGEST:
            raise PlanishError(f"{where} has the scale {scale.item()}; a number from 2^-64 to 2^64 is accepted")
        return np.float32(scale.item()), int(zero.item()) - (128 if unsigned else 0), unsigned

    def _dequantize(self, node: onnx.NodeProto) -> Known:
        name = node.input[0]
        if name in self.folded.constants and name not in self.values:
            scale, zero = self._parameters(node)
            return _quantized_constant(name, self.folded.constants[name], scale, zero, fold.attributes(node), node)
        scale, zero, unsigned = self._tensor_parameters(node)
        found = self.values.get(name)
        if found is None:  # an input of the model that already holds codes
            shape = self.folded.shapes[name]
            tensor = Tensor(self._unique(name), shape, scale, zero)
            self._port(name, "uint8" if unsigned else "int8", tensor)
            self.values[name] = found = Codes(tensor, unsigned)
        if not isinstance(found, Codes):
            raise PlanishError(f"node '{fold.label(node)}' dequantizes '{name}', which does not hold codes")
        if (found.tensor.scale, found.tensor.zero_point, found.unsigned) != (scale, zero, unsigned):
            raise PlanishError(
                f"node '{fold.label(node)}' dequantizes '{name}' with scale {scale} and zero point {zero}, but it was "
                f"quantized with {found.tensor.scale} and {found.tensor.zero_point}"
            )
        return Real(found.tensor, unsigned)

    def _quantize(self, node: onnx.NodeProto) -> Codes:
        name = node.input[0]
        scale, zero, unsigned = self._tensor_parameters(node)
        found = self._operand(name)
        if isinstance(found, Real) and (found.tensor.scale, found.tensor.zero_point) == (scale, zero):
            return Codes(found.tensor, unsigned)
        key = (name, float(scale), zero)
        if key not in self.quantized:
            if isinstance(found, Real):
                op = FloatOp(
                    "Identity",
                    fold.label(node),
                    {},
                    (found.tensor,),
                    self._new(name, found.tensor.shape, scale, zero),
                    -np.inf,
                    np.inf,
                )
                self.quantized[key] = self._emit(op)
            elif isinstance(found, Pending):
                self.quantized[key] = self._settle(found, name, scale, zero)
            else:
                raise PlanishError(f"node '{fold.label(node)}' quantizes '{name}', which is not a real activation")
        return Codes(self.quantized[key], unsigned)

    def _settle(self, pending: Pending, name: str, scale: np.float32, zero: int) -> Tensor:
        """Emit a pending op, now that its quantization is known, and the moves after it."""
        origin = self._new(pending.output if pending.moves else name, pending.shape, scale, zero)
        if pending.node is None:
            self._port(pending.output, "float32", origin)
            tensor = origin
        else:
            op = FloatOp(
                pending.type,
                fold.label(pending.node),
                pending.attributes,
                pending.inputs,
                origin,
                pending.low,
                pending.high,
            )
            tensor = self._emit(op) if pending.type != curves.TYPE else self._emit_curve(op, pending.attributes["real"])
        for move in pending.moves:
            tensor = self._emit_move(tensor, move)
        return tensor

    def _constant(self, node: onnx.NodeProto, operands: list[Known | None]) -> Constant:
        """A node whose inputs are constants, some of them quantized."""
        first = operands[0]
        if isinstance(first, Constant) and first.scale is not None and node.op_type in ("Transpose", *SAME_ORDER):
            others = [o.values if isinstance(o, Constant) else None for o in operands[1:]]
            if node.op_type == "Transpose":
                axes = fold.attributes(node).get("perm") or list(range(first.values.ndim))[::-1]
                return replace(
                    first,
                    values=first.values.transpose(axes),
                    axis=list(axes).index(first.axis) if first.values.ndim else 0,
                )
            if first.scale.size == 1:
                return replace(first, values=fold.evaluate(node, [first.values, *others], self.folded.opset)[0], axis=0)
        arrays = [_real(o) if isinstance(o, Constant) else None for o in operands]
        return Constant(node.output[0], fold.evaluate(node, arrays, self.folded.opset)[0])

    def _float_op(self, node: onnx.NodeProto, operands: list[Known | None]) -> Pending:
        inputs: list[Tensor | Constant | None] = []
        for name, operand in zip(node.input, operands, strict=True):
            if isinstance(operand, Pending):
                raise PlanishError(
                    f"node '{fold.label(node)}' ({node.op_type}) reads the float tensor '{name}' that is not quantized; "
                    "QuantizeLinear and DequantizeLinear must stand between the ops"
                )
            if isinstance(operand, Codes):
                raise PlanishError(
                    f"node '{fold.label(node)}' ({node.op_type}) works on integer codes; of such ops known are: "
                    f"{', '.join(MOVES)}, Concat"
                )
            inputs.append(operand.tensor if isinstance(operand, Real) else operand)
        shapes = [self.folded.shapes.get(n, ()) for n in node.input[:2]]
        attributes = _window(node, fold.attributes(node), shapes)
        kind = node.op_type
        if kind == "AveragePool" and tuple(attributes["kernel_shape"]) == shapes[0][2:] and not any(attributes["pads"]):
            # ONNX Runtime sums integers here, which rounds ties otherwise than its sum of real values
            kind, attributes = "GlobalAveragePool", {}
        pending = Pending(node, kind, node.output[0], self.folded.shapes[node.output[0]], attributes, tuple(inputs))
        return self._absorb_pad(pending) if node.op_type == "Conv" else pending

    def _absorb_pad(self, conv: Pending) -> Pending:
        """A Pad with zeros before a convolution becomes part of the convolution's own padding."""
        x = conv.inputs[0]
        moved = self.moved.get(x.name) if isinstance(x, Tensor) else None
        if moved is None or moved.type != "Pad" or moved.pads is None or moved.value != 0.0:
            return conv
        rank = len(moved.source.shape)
        begin, end = moved.pads[:rank], moved.pads[rank:]
        if any(begin[:2]) or any(end[:2]) or min(moved.pads) < 0:
            return conv
        pads = [a + b for a, b in zip(conv.attributes["pads"], [*begin[2:], *end[2:]], strict=True)]
        return replace(conv, inputs=(moved.source, *conv.inputs[1:]), attributes={**conv.attributes, "pads": pads})

    def _curve(self, node: onnx.NodeProto, operands: list[Known | None]) -> Pending | None:
        """An elementwise op that depends on one activation only, through others that are not quantized: a function of its code."""
        if node.op_type not in curves.OPS:
            return None
        tensor: Tensor | None = None
        values: list[Array | None] = []
        for operand in operands:
            if isinstance(operand, Constant) and operand.values.size == 1:
                values.append(_real(operand).reshape(()))
                continue
            if operand is None:
                values.append(None)
                continue
            found = self._code_function(operand)
            if found is None or (tensor is not None and tensor is not found[0]):
                return None
            tensor = found[0]
            values.append(found[1])
        plain = all(isinstance(o, Real) or (isinstance(o, Constant) and o.scale is not None) for o in operands)
        shape = self.folded.shapes[node.output[0]]
        if tensor is None or shape != tensor.shape or (plain and node.op_type in self.op_types):
            return None  # an op of kernels/ takes it as it is
        real = curves.evaluate(node, values, self.folded.opset)
        return Pending(node, curves.TYPE, node.output[0], shape, {"real": real}, (tensor,))

    def _code_function(self, operand: Known) -> tuple[Tensor, Array] | None:
        """The tensor and float32 (256,), when an operand is a function of the codes of one tensor."""
        if isinstance(operand, Real):
            return operand.tensor, integer.dequantize(integer.codes(), operand.tensor)
        if not isinstance(operand, Pending) or operand.moves or operand.node is None:
            return None
        if operand.type == curves.TYPE:
            x, real = operand.inputs[0], operand.attributes["real"]
        elif operand.type in curves.OPS and len(operand.inputs) == 1:
            x = operand.inputs[0]
            assert isinstance(x, Tensor)
            real = curves.evaluate(operand.node, [integer.dequantize(integer.codes(), x)], self.folded.opset)
        else:
            return None
        assert isinstance(x, Tensor)
        return x, np.clip(real, np.float32(operand.low), np.float32(operand.high))

    def _bias(self, node: onnx.NodeProto, operands: list[Known | None]) -> Pending | None:
        """MatMul, Gemm or Conv without a bias, then Add of a constant vector: the same op with a bias."""
        pendings = [o for o in operands if isinstance(o, Pending) and o.node is not None]
        constants = [o for o in operands if isinstance(o, Constant)]
        if len(pendings) != 1 or len(constants) != 1:
            return None
        pending, constant = pendings[0], constants[0]
        free = not pending.moves and pending.low == -np.inf and pending.high == np.inf
        if pending.type not in ("MatMul", "Gemm", "Conv") or not free or any(pending.inputs[2:]):
            return None
        axis = 1 if pending.type == "Conv" else len(pending.shape) - 1
        wanted = [1] * len(pending.shape)
        wanted[axis] = pending.shape[axis]
        aligned = (1,) * (len(wanted) - constant.values.ndim) + constant.values.shape
        if list(aligned) != wanted:
            return None
        bias = replace(constant, values=constant.values.reshape(-1), axis=0)
        return replace(pending, inputs=(*pending.inputs[:2], bias), output=node.output[0])

    def _concat_codes(self, node: onnx.NodeProto, operands: list[Codes]) -> Codes:
        first = operands[0]
        if any(
            (o.tensor.scale, o.tensor.zero_point) != (first.tensor.scale, first.tensor.zero_point) for o in operands
        ):
            raise PlanishError(f"node '{fold.label(node)}' joins codes of different scales; dequantize them first")
        output = self._new(
            node.output[0], self.folded.shapes[node.output[0]], first.tensor.scale, first.tensor.zero_point
        )
        inputs = tuple(o.tensor for o in operands)
        op = FloatOp("Concat", fold.label(node), fold.attributes(node), inputs, output, -np.inf, np.inf)
        return Codes(self._emit(op), first.unsigned)

    # --- moves

    def _moves_freely(self, node: onnx.NodeProto, first: Known, operands: list[Known | None]) -> bool:
        """Whether the op only moves elements: a Pad with a constant other than zero makes new ones."""
        if node.op_type == "Gather" and not isinstance(operands[1], Constant):
            raise PlanishError(f"node '{fold.label(node)}' (Gather) has computed indices; constant ones are accepted")
        if node.op_type != "Pad" or isinstance(first, Codes):
            return True
        value = operands[2] if len(operands) > 2 else None
        return value is None or (isinstance(value, Constant) and not np.any(_real(value)))

    def _move(self, node: onnx.NodeProto, first: Codes | Real | Pending, operands: list[Known | None]) -> Move:
        shape = self.folded.shapes[node.output[0]]
        constants = [o if isinstance(o, Constant) else None for o in operands[1:]]
        attributes = _window(node, fold.attributes(node), [self.folded.shapes.get(node.input[0], ())])
        kind = node.op_type
        if kind in SAME_ORDER:
            kind, constants, attributes = "Reshape", [Constant("shape", np.array(shape, np.int64))], {}
        elif kind == "Gather":
            kind, constants, attributes = "Slice", _gather(node, operands[1], self.folded.shapes[node.input[0]]), {}
        elif kind == "Pad" and isinstance(first, Codes) and attributes.get("mode", "constant") == "constant":
            # on codes the padding is a code, by default 0: hand on the real value that it stands for
            given = constants[1] if len(constants) > 1 else None
            code = int(given.values.item()) if given is not None else 0
            centred = code - (128 if first.unsigned else 0) - first.tensor.zero_point
            constants = [
                *constants[:1],
                Constant("value", np.asarray(np.float32(centred) * first.tensor.scale)),
                *constants[2:],
            ]
        return Move(kind, fold.label(node), node.output[0], attributes, tuple(constants), shape)

    def _split(self, node: onnx.NodeProto, first: Known) -> None:
        """Split is one Slice for each output."""
        if isinstance(first, Constant):
            raise PlanishError(f"node '{fold.label(node)}' splits a constant")
        shape = self.folded.shapes[node.input[0]]
        axis = fold.attributes(node).get("axis", 0) % len(shape)
        start = 0
        for index, name in enumerate(node.output):
            end = start + self.folded.shapes[name][axis]
            window = tuple(Constant("slice", np.array([v], np.int64)) for v in (start, end, axis, 1))
            move = Move("Slice", f"{fold.label(node)}_{index}", name, {}, window, self.folded.shapes[name])
            self.values[name] = self._apply(first, move)
            start = end

    def _apply(self, value: Codes | Real | Pending, move: Move) -> Known:
        if isinstance(value, Pending):
            return replace(value, moves=(*value.moves, move))
        return replace(value, tensor=self._emit_move(value.tensor, move))

    def _emit_move(self, x: Tensor, move: Move) -> Tensor:
        """The move as a node on codes; nothing where it changes nothing, one where it follows another of its kind."""
        source, constants, attributes = x, move.constants, dict(move.attributes)
        before = self.moved.get(x.name)
        axes: tuple[int, ...] | None = None
        if move.type == "Transpose":
            axes = tuple(attributes.get("perm") or range(len(x.shape))[::-1])
            if before is not None and before.axes is not None:
                source, axes = before.source, tuple(before.axes[a] for a in axes)
            if axes == tuple(range(len(axes))):
                return source
            attributes["perm"] = list(axes)
        elif move.type == "Reshape":
            if before is not None and before.type == "Reshape":
                source = before.source
            if source.shape == move.shape:
                return source
        pads = None
        value = 0.0
        if move.type == "Pad":
            pads, value = _pads(move, len(x.shape)), _pad_value(move)
            if pads is not None and not any(pads):
                return x
        elif move.type == "Slice" and x.shape == move.shape and _forward(constants):
            return x
        output = self._new(move.output, move.shape, x.scale, x.zero_point)
        op = FloatOp(move.type, move.name, attributes, (source, *constants), output, -np.inf, np.inf)
        self._emit(op)
        self.moved[output.name] = rewrite.Moved(move.type, source, axes, pads, value)
        return output

    # --- nodes of the deployment graph

    def _new(self, name: str, shape: tuple[int, ...], scale: np.float32, zero: int) -> Tensor:
        return Tensor(self._unique(name), shape, scale, zero)

    def _unique(self, name: str) -> str:
        return _unused(name, self.names)

    def _emit(self, op: FloatOp) -> Tensor:
        """Ask the ops of kernels/ in turn; the first that takes the node makes it."""
        reasons: list[str] = []
        for kind, candidate in self.ops.items():
            if op.type not in candidate.onnx_types:
                continue
            try:
                node = candidate.parse(op)
            except Unsupported as error:
                reasons.append(f"{kind}: {error}")
                continue
            if node is not None:
                self.nodes.append(replace(node, name=_unused(node.name, self.node_names)))
                return node.output
        if reasons:
            raise PlanishError(f"node '{op.name}' ({op.type}) is not covered: {'; '.join(reasons)}")
        raise PlanishError(
            f"no integer kernel takes node '{op.name}' ({op.type}); known: {', '.join(self.known_types)}"
        )

    def _emit_curve(self, op: FloatOp, real: Array) -> Tensor:
        x = op.inputs[0]
        assert isinstance(x, Tensor)
        node = curves.node(op, x, real)
        self.nodes.append(replace(node, name=_unused(node.name, self.node_names)))
        return node.output


def _unused(name: str, names: set[str]) -> str:
    unique, count = name, 1
    while unique in names:
        count += 1
        unique = f"{name}_{count}"
    names.add(unique)
    return unique


def _quantized_constant(
    name: str, codes: Array, scale: Array, zero: Array, attributes: Mapping[str, Any], node: onnx.NodeProto
) -> Constant:
    """Codes of a constant as int8 (int32 for a bias) with one scale, or one per index of an axis."""
    if attributes.get("block_size", 0):
        raise PlanishError(
            f"node '{fold.label(node)}' dequantizes '{name}' in blocks; one scale per channel is accepted"
        )
    if not np.isfinite(scale).all() or (scale < 0).any():
        raise PlanishError(f"node '{fold.label(node)}' dequantizes '{name}' with a scale that is no positive number")
    kind = str(codes.dtype)
    if kind in ("uint8", "int8", "int4", "uint4", "int2", "uint2"):
        shift = 128 if kind == "uint8" else 0
        codes = (codes.astype(np.int16) - shift).astype(np.int8)
        zero = zero.astype(np.int32) - shift
    elif kind != "int32":
        raise PlanishError(
            f"constant '{name}' has codes of type {kind}; int8, uint8, int4, uint4 and int32 are accepted"
        )
    axis = int(attributes.get("axis", 1)) % max(codes.ndim, 1) if scale.size > 1 else 0
    return Constant(name, codes, scale.reshape(-1), zero.astype(np.int32).reshape(-1), axis)


def _real(constant: Constant) -> Array:
    """A constant's real values, or its integers where it is not quantized."""
    if constant.scale is None or constant.zero_point is None:
        return constant.values
    along = [1] * constant.values.ndim
    if constant.scale.size > 1:
        along[constant.axis] = -1
    centred = constant.values.astype(np.int32) - constant.zero_point.reshape(along)
    return centred.astype(np.float32) * constant.scale.reshape(along)


def _bounds(node: onnx.NodeProto, operands: list[Known | None]) -> tuple[float, float]:
    """The interval that a Relu or Clip keeps."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [-np.inf, np.inf]
    for index, operand in enumerate(operands[1:3]):
        if isinstance(operand, Constant):
            bounds[index] = float(_real(operand).item())
        elif operand is not None:
            raise PlanishError(f"node '{fold.label(node)}' (Clip) has a bound that is not constant")
    return bounds[0], bounds[1]


def _window(node: onnx.NodeProto, attributes: dict[str, Any], shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Attributes of a convolution or pool with kernel_shape, strides, dilations and pads written out."""
    if node.op_type not in ("Conv", "MaxPool", "AveragePool"):
        return attributes
    found = dict(attributes)
    kernel = list(found.get("kernel_shape") or shapes[1][2:])
    rank = len(kernel)
    strides = list(found.get("strides") or [1] * rank)
    dilations = list(found.get("dilations") or [1] * rank)
    pads = list(found.get("pads") or [0] * 2 * rank)
    mode = found.pop("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        sizes = shapes[0][2:]
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(sizes, strides, spans, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = small + large if mode == "SAME_UPPER" else large + small
    return found | {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}


def _gather(node: onnx.NodeProto, indices: Known | None, shape: tuple[int, ...]) -> list[Constant | None]:
    """Gather of evenly spaced indices as the inputs of a Slice: starts, ends, axes, steps."""
    axis = fold.attributes(node).get("axis", 0) % len(shape)
    assert isinstance(indices, Constant)
    chosen = indices.values.reshape(-1) % shape[axis]
    steps = set(np.diff(chosen).tolist()) or {1}
    if indices.values.ndim > 1 or chosen.size == 0 or len(steps) > 1 or min(steps) < 1:
        raise PlanishError(
            f"node '{fold.label(node)}' (Gather): its indices are not evenly spaced and rising, as a Slice's are"
        )
    window = (int(chosen[0]), int(chosen[-1]) + 1, axis, steps.pop())
    return [Constant("slice", np.array([v], np.int64)) for v in window]


def _forward(constants: tuple[Constant | None, ...]) -> bool:
    """Whether a Slice walks forward on every axis."""
    steps = constants[3] if len(constants) > 3 else None
    return steps is None or bool((steps.values > 0).all())


def _pads(move: Move, rank: int) -> list[int] | None:
    """Pads of all axes (begins, then ends); None where they are not constant or the mode repeats elements."""
    given = move.constants[0] if move.constants else None
    if given is None or move.attributes.get("mode", "constant") != "constant":
        return None
    axes = move.constants[2] if len(move.constants) > 2 else None
    if axes is None:
        return [int(v) for v in given.values]
    pads = [0] * 2 * rank
    count = axes.values.size
    for index, axis in enumerate(int(a) % rank for a in axes.values):
        pads[axis], pads[rank + axis] = int(given.values[index]), int(given.values[count + index])
    return pads


def _pad_value(move: Move) -> float:
    value = move.constants[1] if len(move.constants) > 1 else None
    return 0.0 if value is None else float(_real(value).item())
