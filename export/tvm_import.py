"""From ONNX to Relax: batch fixed, quantize/dequantize pairs turned into integers carried in float32, channels last.

TVM's own importer runs `dequantize -> convolution -> quantize` on rounded floats, so its codes depend on the order of additions.
Here a quantized tensor travels as float32 numbers that are whole: code minus zero point. Sums of products of whole numbers are
exact in float32 below 2^24 in any order, so a convolution or matrix product then obeys the integer contract
(kernels/integer.py): exact sum, one float32 multiply by float32(x_scale * w_scale / y_scale), round half to even, saturate.
Whether the bound holds is known from the weights, checked for every layer and recorded.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..common.errors import PlanishError, listed
from ..kernels import fused as fused_ops
from ..kernels import integer
from ..kernels.tvm import lowering
from ..kernels.tvm.lowering import VectorUnit
from . import _tvm_compat, fused, metadata, tvm_static

DOMAINS = ("", "ai.onnx", fused.DOMAIN)
BASELINE = VectorUnit(4, 16)
"""SSE, for which kernels of fused ops are laid out where nothing is said"""
EXACT = 2**24
"""whole numbers below it are exact in float32 (24 bit significand)"""
MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Identity", "Gather")
"""ops that only move or select values: they act on codes as on the numbers behind them"""


@dataclass(frozen=True)
class Layer:
    """How one ONNX node with a quantized input is computed, for the manifest."""

    node: str
    op: str
    arithmetic: Literal["exact integers in float32", "float32"]
    largest_sum: int | None = None
    """bound of |sum| over every input that the codes allow; exact when below 2^24"""


@dataclass(frozen=True)
class Scaled:
    """A tensor known as `whole numbers * factor`."""

    codes: str
    """name of the float32 tensor of whole numbers (code minus zero point, or a sum of products)"""
    factor: np.ndarray
    """float32, () or (channels,)"""
    largest: int
    """bound of |whole number|"""
    summed: bool = False
    """whether it is a sum of products: then requantization is one multiply by factor / scale"""
    constant: np.ndarray | None = None
    """the whole numbers themselves, float32, for a constant"""
    axis: int = 0
    """axis of `factor` when it has channels"""
    divisor: int = 1
    """what the sum is divided by to be a mean: part of the requantization's one factor"""
    rectified: bool = False
    """negative numbers count as zero (a ReLU that the next clip applies)"""


@dataclass
class Rewritten:
    """The float ONNX model that computes with whole numbers, and how each layer does it."""

    model: onnx.ModelProto
    layers: list[Layer] = field(default_factory=list)
    output_step: float = 0.0
    """largest scale among outputs that are dequantized codes; 0 when there is none"""


@dataclass(frozen=True)
class Imported:
    """A Relax module of fused kernels in plain loops."""

    module: Any
    layout: str
    """of the tensors between convolutions, for the manifest"""
    packed: list[tuple[str, np.ndarray]]
    """(layer, constant that its fused op reads)"""


def fix_batch(model: onnx.ModelProto, samples: Mapping[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """The model with batch 1 in place of a symbolic first dimension, and other symbolic dimensions as large as in `samples`.

    `samples` are (n, ...) arrays by input name. A state that they lack starts empty: it becomes a constant of zeros (of size 0
    where it grows). Raises PlanishError for a symbolic dimension whose size no sample tells.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    samples = samples or {}
    sizes, states = sizes_of(model, samples), metadata.get(model, metadata.STATES)
    constants = {t.name for t in fixed.graph.initializer}
    empty: list[onnx.ValueInfoProto] = []
    for value in fixed.graph.input:
        if value.name in constants:
            continue
        absent = value.name in states and value.name not in samples
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            size = 1 if index == 0 else sizes.get(dim.dim_param, 0 if absent else None)
            if size is None:
                raise PlanishError(
                    f"input '{value.name}' has a dynamic dimension {index} ('{dim.dim_param or '?'}'); the tvm format "
                    "compiles for fixed shapes: give samples of the size to compile for"
                )
            dim.Clear()
            dim.dim_value = size
        if absent:
            empty.append(value)
    for value in empty:
        _start_empty(fixed.graph, value)
    for value in fixed.graph.output:  # known again below, now with numbers
        value.type.tensor_type.ClearField("shape")
    return tvm_static.static(fixed)


def sizes_of(model: onnx.ModelProto, samples: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Size of each symbolic dimension besides the batch that samples (n, ...) by input name tell."""
    return {
        dim.dim_param: samples[value.name].shape[index]
        for value in model.graph.input
        if value.name in samples
        for index, dim in enumerate(value.type.tensor_type.shape.dim)
        if index and dim.dim_param
    }


def _start_empty(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> None:
    """Replace an input by a constant of zeros; one without elements is left out where it is concatenated."""
    kind = value.type.tensor_type
    shape = [d.dim_value for d in kind.shape.dim]
    graph.input.remove(value)
    graph.initializer.append(
        numpy_helper.from_array(np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type)), value.name)
    )
    if 0 in shape:
        for node in graph.node:
            if node.op_type == "Concat" and len(node.input) > 1:
                node.input[:] = [n for n in node.input if n != value.name]


def to_relax(
    model: onnx.ModelProto, unit: VectorUnit = BASELINE, kernels: Mapping[str, lowering.Lowering] | None = None
) -> Imported:
    """A Relax module for a model with fixed shapes, convolutions channels last; kernels of fused ops are laid out for `unit`.

    `kernels` are other lowerings of fused ops than a CPU's. PlanishError names a node of an unknown op.
    """
    ir = _tvm_compat.load()
    known, kernels = _known_ops(), lowering.lowerings() if kernels is None else kernels
    fused_ops.ops()  # their schemas
    for node in model.graph.node:
        if node.op_type not in (kernels if node.domain == fused.DOMAIN else known) or node.domain not in DOMAINS:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise PlanishError(
                f"node '{node.name or node.output[0]}': the tvm format does not know the op '{name}'; "
                f"it knows {', '.join(sorted(known | {'QuantizeLinear', 'DequantizeLinear'} | set(kernels)))}"
            )
    packed: list[tuple[str, np.ndarray]] = []
    try:
        module = _imported(model, kernels, unit, packed)
    except (ValueError, TypeError, KeyError, NotImplementedError, AssertionError, RuntimeError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise PlanishError(f"TVM cannot import this graph: {text[-1][:300]}") from error
    transform = ir.relax.transform
    layouts = {"relax.nn.conv2d": ["NHWC", "HWIO"]}
    module = _simplify(transform.DecomposeOpsForInference()(module))
    layout = "as in the ONNX file"
    if any(node.op_type == "Conv" for node in model.graph.node):
        try:
            module, layout = _simplify(transform.ConvertLayout(layouts)(module)), "channels last"
        except (
            RuntimeError
        ) as error:  # TVM 0.27 cannot follow some shapes of graph; the schedules work on either layout
            layout += f"; TVM cannot convert it: {str(error).strip().splitlines()[-1][:200]}"
    passes = [
        transform.FoldConstant(),
        transform.CanonicalizeBindings(),
        transform.LegalizeOps({"relax.round": _round_half_even}),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ]
    return Imported(ir.tvm.transform.Sequential(passes)(module), layout, packed)


def _imported(
    model: onnx.ModelProto,
    kernels: Mapping[str, lowering.Lowering],
    unit: VectorUnit,
    packed: list[tuple[str, np.ndarray]],
) -> Any:
    """TVM's own importer, with nodes of the domain `planish` given to their lowerings; their constants are added to `packed`."""
    ir = _tvm_compat.load()
    nodes = {n.name: n for n in model.graph.node if n.domain == fused.DOMAIN}

    class Importer(ir.onnx_frontend.ONNXGraphImporter):
        def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
            """Done before, with a message of ours."""

        def _convert_operator(self, op_name: str, inputs: list[Any], attrs: dict[str, Any], opset: int) -> Any:
            if op_name not in kernels:
                return super()._convert_operator(op_name, inputs, attrs, opset)
            call = fused.call(nodes[attrs["tvm_custom"]["name"]])
            tensors = {name: self._nodes[value] for name, value in call.tensors.items()}
            use = lowering.Use(op_name, call.name, tensors, call.attributes, unit, ir, self.bb)
            outputs = list(kernels[op_name].lower(use))
            packed.extend((call.name, a) for a in use.constants)
            return outputs[0] if len(outputs) == 1 else ir.relax.Tuple(outputs)

    versions = {o.domain: o.version for o in model.opset_import}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter(
            "ignore"
        )  # it says that names were made identifiers, and prints what it could not convert
        return Importer({}, "float32").from_onnx(model.graph, versions.get("", versions.get("ai.onnx", 1)))


def _simplify(module: Any) -> Any:
    """The module in a form that TVM's later passes handle well. Done before and after the conversion to channels last.

    - Single-value operands of elementwise ops get the other operand's rank, and the importer's ready-made kernels for Clip become
      ops again: the conversion follows only ops between operands of equal rank, and would transpose around everything else.
    - Constants that are only moved or selected are computed here: TVM's folding compiles a kernel for each, half a second a layer.
    """
    relax = _tvm_compat.load().relax
    constant = type(relax.const(0.0))
    elementwise = {f"relax.{n}" for n in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")}

    def single(value: Any, rank: int) -> Any:
        """A constant with one value, given `rank` dimensions; anything else as it is."""
        if not isinstance(value, constant) or len(value.ty.shape) >= rank or value.value.numpy().size != 1:
            return value
        return relax.const(value.value.numpy().reshape([1] * rank))

    @relax.expr_functor.mutator
    class Simplify(relax.PyExprMutator):
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            name = getattr(call.op, "name", "")
            folded = self.fold(name, call)
            if folded is not None:
                return relax.const(np.ascontiguousarray(folded))
            if name in elementwise:
                rank = max(len(a.ty.shape) for a in call.args)
                return relax.Call(call.op, [single(self.value(a), rank) for a in call.args], call.attrs)
            if name == "relax.call_tir":
                kernel, operands = call.args[0].name_hint, [self.value(a) for a in call.args[1].fields]
                op = next((n for n in ("maximum", "minimum") if kernel.startswith(n)), None)
                if op and len(operands) == 2 and isinstance(operands[1], constant):
                    return getattr(relax.op, op)(operands[0], single(operands[1], len(operands[0].ty.shape)))
            return call

        def value(self, expression: Any) -> Any:
            """The constant that a variable is bound to, else the expression."""
            bound = self.lookup_binding(expression) if isinstance(expression, relax.Var) else None
            return bound if isinstance(bound, constant) else expression

        def fold(self, name: str, call: Any) -> np.ndarray | None:
            """The result of moving or selecting constants; None for anything else."""
            if name not in ("relax.permute_dims", "relax.reshape", "relax.isnan", "relax.where"):
                return None
            values = [self.value(a) for a in call.args[: 1 if name == "relax.reshape" else None]]
            if not all(isinstance(v, constant) for v in values):
                return None
            arrays = [v.value.numpy() for v in values]
            if name == "relax.permute_dims":
                return arrays[0].transpose(None if call.attrs.axes is None else [int(a) for a in call.attrs.axes])
            if name == "relax.reshape":
                return arrays[0].reshape([int(d) for d in call.ty.shape])
            return np.isnan(*arrays) if name == "relax.isnan" else np.where(*arrays)

    mutator = Simplify(module)
    for variable, function in list(module.functions_items()):
        if isinstance(function, relax.Function):
            mutator.builder_.update_func(variable, mutator.visit_expr(function))
    return mutator.builder_.get()


def _known_ops() -> set[str]:
    return set(_tvm_compat.load().onnx_frontend._get_convert_map()) - {"QuantizeLinear", "DequantizeLinear"}


def _round_half_even(builder: Any, call: Any) -> Any:
    """ONNX's Round is half to even; TVM's own lowering rounds half away from zero."""
    ir = _tvm_compat.load()

    def compute(x: Any) -> Any:
        return ir.te.compute(x.shape, lambda *i: ir.tirx.nearbyint(x(*i)), name="round_half_even")

    return builder.call_te(compute, call.args[0], primfunc_name_hint="round_half_even")


def whole_numbers(model: onnx.ModelProto) -> Rewritten:
    """A model without QuantizeLinear and DequantizeLinear that computes the same with whole numbers in float32.

    `model` has fixed shapes with `value_info` (see `fix_batch`). A float model comes back as it is.
    """
    return _Rewriter(model).run()


class _Rewriter:
    """One pass over the nodes in order; a tensor is kept as `Scaled` for as long as possible and made a float on demand."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants: dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.scaled: dict[str, Scaled] = {}
        self.quantized: dict[str, tuple[Scaled, int, np.dtype[Any]]] = {}
        """codes by name of the QuantizeLinear output: (as whole numbers, zero point, dtype)"""
        self.made: set[str] = set()
        """float tensors that exist"""
        self.zeros: dict[str, int] = {}
        """zero points, counted in unsigned codes, of dequantized activations"""
        self.done: set[str] = set()
        """outputs of nodes that were computed together with an earlier one"""
        self.layers: list[Layer] = []
        self.uses: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.uses.setdefault(name, []).append(node)
        values = [*model.graph.value_info, *model.graph.output, *model.graph.input]
        self.shape = {v.name: [int(d.dim_value) for d in v.type.tensor_type.shape.dim] for v in values}
        self.rank = {name: len(shape) for name, shape in self.shape.items()}
        self.rank |= {n: a.ndim for n, a in self.constants.items()}

    def run(self) -> Rewritten:
        if not any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in self.model.graph.node):
            return Rewritten(self.model)
        for node in self.model.graph.node:
            if node.output[0] in self.done:
                continue
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant(node)
                self.rank[node.output[0]] = self.constants[node.output[0]].ndim
            elif node.op_type == "QuantizeLinear":
                self._quantize(node)
            elif node.op_type == "DequantizeLinear":
                self._dequantize(node)
            elif any(n in self.quantized for n in node.input):
                self._move_codes(node)
            elif not self._integer(node):
                self._float_node(node)
        for value in self.model.graph.output:
            self._output(value)
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input} | {o.name for o in model.graph.output}
        model.graph.initializer.extend(
            numpy_helper.from_array(a, n) for n, a in self.constants.items() if n in used and n not in self.made
        )
        ends = [self.scaled[o.name] for o in self.model.graph.output if o.name in self.scaled]
        step = max((float(e.factor.max()) for e in ends if not e.summed), default=0.0)
        return Rewritten(onnx.shape_inference.infer_shapes(model), self.layers, step)

    def _emit(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}.{op}", **attributes))
        return output

    def _store(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def _number(self, name: str, value: Any) -> str:
        """A scalar float32 constant."""
        return self._store(name, np.array(value, np.float32))

    def _broadcast(self, values: np.ndarray, rank: int, axis: int) -> np.ndarray:
        """A factor shaped to multiply a tensor of `rank` dimensions along `axis`."""
        if values.ndim == 0:
            return values
        shape = [1] * rank
        shape[axis] = -1
        return values.reshape(shape)

    def _float(self, name: str) -> str:
        """The tensor as plain float32 under its own name, emitted once if it is only known as whole numbers."""
        known = self.scaled.get(name)
        if known is None or name in self.made:
            return name
        self.made.add(name)
        if known.constant is not None:
            factor = self._broadcast(known.factor, known.constant.ndim, known.axis)
            self.constants[name] = (known.constant * factor).astype(np.float32)
            self.made.discard(name)
            del self.scaled[name]
            return name
        factor = self._broadcast(known.factor / np.float32(known.divisor), self.rank[name], known.axis)
        product = self._emit("Mul", [known.codes, self._store(f"{name}.factor", factor)], f"{name}.scaled")
        self._emit("Relu" if known.rectified else "Identity", [product], name)
        return name

    def _float_node(self, node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        quantized = [n for n in node.input if n in self.scaled]
        for index, name in enumerate(node.input):
            copy.input[index] = self._float(name) if name else name
        self.nodes.append(copy)
        if quantized:
            self.layers.append(Layer(node.name or node.output[0], node.op_type, "float32"))

    def _dequantize(self, node: onnx.NodeProto) -> None:
        name, out = node.input[0], node.output[0]
        scale = self._constant_input(node, 1).astype(np.float32)
        zero = self._zero(node)
        attributes = _attributes(node)
        if name in self.constants:
            self._dequantize_constant(out, self.constants[name], scale, zero, attributes)
            return
        if scale.size != 1 or attributes.get("block_size", 0):
            raise PlanishError(
                f"node '{node.name or out}': an activation has {scale.size} scales; the tvm format takes one a tensor"
            )
        z = int(zero.reshape(-1)[0])
        self.zeros[out] = z + _unsigned(zero.dtype)
        if name in self.quantized:
            known, made_zero, _ = self.quantized[name]
            if made_zero == z:
                self.scaled[out] = Scaled(known.codes, scale.reshape(()), known.largest)
                return
            codes = self._emit("Add", [known.codes, self._number(f"{out}.shift", made_zero - z)], f"{out}.codes")
            self.scaled[out] = Scaled(codes, scale.reshape(()), known.largest + abs(made_zero - z))
            return
        # codes that come from outside the graph
        cast = self._emit("Cast", [name], f"{out}.cast", to=onnx.TensorProto.FLOAT)
        codes = self._emit("Sub", [cast, self._number(f"{out}.zero", z)], f"{out}.codes")
        low, high = _limits(zero.dtype)
        self.scaled[out] = Scaled(codes, scale.reshape(()), max(abs(low - z), abs(high - z)))

    def _dequantize_constant(
        self, out: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, attributes: dict[str, Any]
    ) -> None:
        whole = codes.astype(np.int64)
        axis = attributes.get("axis", 1) % max(whole.ndim, 1)
        block = attributes.get("block_size", 0)
        zeros = zero.astype(np.int64)
        if block:  # one scale for every `block` values along `axis`: folded to floats
            size = whole.shape[axis]
            spread = np.repeat(scale, block, axis).take(np.arange(size), axis)
            shift = np.repeat(zeros, block, axis).take(np.arange(size), axis) if zeros.ndim else zeros
            self.constants[out] = ((whole - shift) * spread).astype(np.float32)
            return
        factor = scale.reshape(()) if scale.size == 1 else scale.reshape(-1)
        shift = zeros.reshape(()) if zeros.size == 1 else zeros.reshape(-1)
        whole = whole - self._broadcast(shift, whole.ndim, axis)
        largest = int(np.abs(whole).max(initial=0))
        self.rank[out] = whole.ndim
        self.scaled[out] = Scaled("", factor, largest, constant=whole.astype(np.float32), axis=axis)

    def _quantize(self, node: onnx.NodeProto) -> None:
        name, out = node.input[0], node.output[0]
        scale = self._constant_input(node, 1).astype(np.float32)
        zero = self._zero(node)
        if scale.size != 1:
            raise PlanishError(
                f"node '{node.name or out}': QuantizeLinear has {scale.size} scales; the tvm format takes one a tensor"
            )
        scale, z = scale.reshape(()), int(zero.reshape(-1)[0])
        low, high = (limit - z for limit in _limits(zero.dtype))
        known = self.scaled.get(name)
        bottom = low
        if name in self.constants and known is None:
            whole = np.clip(np.rint(self.constants[name] / scale), low, high)
            self.constants[out] = (whole + z).astype(zero.dtype)
            return
        same = known is not None and not known.summed and not known.rectified and known.factor.ndim == 0
        if known is not None and same and known.constant is None and known.factor == scale and known.largest <= high:
            self.quantized[out] = (known, z, zero.dtype)  # same grid: only the container changes
            return
        if known is not None and known.summed:
            bottom = max(low, 0) if known.rectified else low
            grid = np.float32(scale * np.float32(known.divisor))
            ratio = self._broadcast((known.factor / grid).astype(np.float32), self.rank[name], known.axis)
            steps = known.codes
            if not (ratio == 1).all():
                steps = self._emit("Mul", [steps, self._store(f"{out}.ratio", ratio)], f"{out}.steps")
        else:
            steps = self._emit("Div", [self._float(name), self._number(f"{out}.scale", scale)], f"{out}.steps")
        rounded = self._emit("Round", [steps], f"{out}.rounded")
        bounds = [self._number(f"{out}.low", bottom), self._number(f"{out}.high", high)]
        codes = self._emit("Clip", [rounded, *bounds], f"{out}.codes")
        largest = max(abs(bottom), abs(high))
        self.quantized[out] = (Scaled(codes, scale, largest), z, zero.dtype)

    def _move_codes(self, node: onnx.NodeProto) -> None:
        """An op between QuantizeLinear and DequantizeLinear: it may move codes, concatenate them, or pad with a code."""
        out = node.output[0]
        known, zero, dtype = next(self.quantized[n] for n in node.input if n in self.quantized)
        inputs, largest = [], known.largest
        for index, name in enumerate(node.input):
            if name in self.quantized:
                part, part_zero, _ = self.quantized[name]
                largest = max(largest, part.largest + abs(part_zero - zero))
                inputs.append(
                    part.codes
                    if part_zero == zero
                    else self._emit(
                        "Add", [part.codes, self._number(f"{out}.shift{index}", part_zero - zero)], f"{out}.part{index}"
                    )
                )
            elif node.op_type == "Pad" and index == 2 and name:
                code = int(self._constant_input(node, 2).reshape(-1)[0])
                largest = max(largest, abs(code - zero))
                inputs.append(self._number(f"{out}.border", code - zero))
            else:
                inputs.append(name)
        if node.op_type == "Pad" and not (len(node.input) > 2 and node.input[2]):  # ONNX pads with code 0
            largest = max(largest, abs(zero))
            inputs[2:3] = [self._number(f"{out}.border", -zero)]
        if node.op_type not in (*MOVES, "Pad", "Concat") or len(node.output) != 1:
            raise PlanishError(
                f"node '{node.name or out}': {node.op_type} on codes; between QuantizeLinear and DequantizeLinear the "
                f"tvm format knows {', '.join((*MOVES, 'Pad', 'Concat'))}"
            )
        copy = helper.make_node(node.op_type, inputs, [f"{out}.codes"], name=node.name)
        copy.attribute.extend(node.attribute)
        self.nodes.append(copy)
        self.quantized[out] = (replace(known, codes=f"{out}.codes", largest=largest), zero, dtype)

    def _integer(self, node: onnx.NodeProto) -> bool:
        """Whether the node was computed on whole numbers."""
        if not node.input or node.input[0] not in self.scaled:
            return False
        x = self.scaled[node.input[0]]
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            return self._product(node, x)
        if node.op_type == "Add":
            return self._sum(node)
        if node.op_type == "Relu" and x.summed and self._only_quantized(node.output[0]):
            self.scaled[node.output[0]] = replace(x, rectified=True)
            return True
        if x.summed or x.constant is not None or len(node.output) != 1:
            return False
        if node.op_type == "AveragePool" and not self._covers_all(node):
            return self._average(node)
        if node.op_type in ("AveragePool", "GlobalAveragePool", "ReduceMean"):
            return self._mean(node, x)
        if node.op_type not in MOVES:
            return False
        out = node.output[0]
        copy = helper.make_node(node.op_type, [x.codes, *map(self._float, node.input[1:])], [f"{out}.codes"])
        copy.name = node.name
        copy.attribute.extend(node.attribute)
        self.nodes.append(copy)
        self.scaled[out] = replace(x, codes=f"{out}.codes")
        self.zeros[out] = self.zeros[node.input[0]]
        return True

    def _covers_all(self, node: onnx.NodeProto) -> bool:
        """Whether an AveragePool's one window is the whole image: then it is a mean, and ONNX Runtime's result that of the mean."""
        attributes = _attributes(node)
        whole = list(attributes.get("kernel_shape", ())) == self.shape[node.input[0]][2:]
        return whole and not any(attributes.get("pads", ())) and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"

    def _mean(self, node: onnx.NodeProto, x: Scaled) -> bool:
        """Mean over the pixels of (n, channels, ...): the exact sum of whole numbers, the division left to the factor."""
        out, shape = node.output[0], self.shape[node.input[0]]
        attributes = _attributes(node)
        axes = list(range(2, len(shape)))
        if node.op_type == "ReduceMean":
            given = self.constants.get(node.input[1]) if len(node.input) > 1 else attributes.get("axes")
            if given is None or sorted(int(a) % len(shape) for a in given) != axes:
                return False
        pixels = math.prod(shape[a] for a in axes)
        names = [x.codes, self._store(f"{out}.axes", np.array(axes, np.int64))]
        total = self._emit("ReduceSum", names, f"{out}.sum", keepdims=attributes.get("keepdims", 1))
        largest = x.largest * pixels
        self.scaled[out] = Scaled(total, x.factor, largest, summed=True, divisor=pixels)
        kind = "exact integers in float32" if largest < EXACT else "float32"
        self.layers.append(Layer(node.name or out, node.op_type, kind, largest))
        return True

    def _product(self, node: onnx.NodeProto, x: Scaled) -> bool:
        """A convolution or matrix product of codes with constant codes, and int32 bias codes if there is a bias."""
        attributes = _attributes(node)
        weight = self.scaled.get(node.input[1])
        if x.summed or x.factor.ndim or weight is None or weight.constant is None:
            return False
        whole = weight.constant
        channel = 0 if node.op_type == "Conv" or attributes.get("transB", 0) else whole.ndim - 1
        plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
        if not plain or attributes.get("transA", 0) or (weight.factor.ndim and weight.axis != channel):
            return False
        factor = (x.factor * weight.factor).astype(np.float32)
        out = node.output[0]
        inputs = [x.codes, self._store(f"{out}.weights", whole)]
        reach = np.abs(whole.astype(np.int64)).sum(tuple(a for a in range(whole.ndim) if a != channel)) * x.largest
        if len(node.input) > 2 and node.input[2]:
            bias = self.scaled.get(node.input[2])
            if bias is None or bias.constant is None or not np.allclose(bias.factor, factor, rtol=1e-5, atol=0):
                return False
            inputs.append(self._store(f"{out}.bias", bias.constant))
            reach = reach + np.abs(bias.constant.astype(np.int64))
        largest = int(reach.max())
        copy = helper.make_node(node.op_type, inputs, [f"{out}.sum"], name=node.name)
        copy.attribute.extend(node.attribute)
        self.nodes.append(copy)
        axis = 1 if node.op_type == "Conv" else self.rank[out] - 1
        self.scaled[out] = Scaled(f"{out}.sum", factor, largest, summed=True, axis=axis)
        kind = "exact integers in float32" if largest < EXACT else "float32"
        self.layers.append(Layer(node.name or out, node.op_type, kind, largest))
        return True

    def _sum(self, node: onnx.NodeProto) -> bool:
        """Add of two quantized tensors whose sum is quantized, by the formula of kernels/add.py.

        The sums are written so that LLVM contracts each product and sum into the fused multiply-add that the formula asks for.
        """
        end = self._quantizer_after(node.output[0])
        sides = [self.scaled.get(n) for n in node.input]
        if end is None or any(s is None or s.summed or s.constant is not None or s.factor.ndim for s in sides):
            return False
        first, second = (s for s in sides if s is not None)
        out, (scale, zero) = node.output[0], self._grid(end[1])
        zeros = [self.zeros[n] for n in node.input]
        ratios = [(s.factor / scale).astype(np.float32) for s in (first, second)]
        shift = integer.fma(np.array(zeros[0], np.float32), ratios[0], ratios[1] * np.float32(zeros[1]))
        fixed = np.float32(zero) - np.float32(shift)
        codes = [
            self._emit("Add", [s.codes, self._number(f"{out}.zero{i}", zeros[i])], f"{out}.code{i}")
            for i, s in enumerate((first, second))
        ]
        terms = [
            self._emit("Mul", [codes[i], self._number(f"{out}.ratio{i}", ratios[i])], f"{out}.term{i}") for i in (0, 1)
        ]
        offset = self._emit("Add", [terms[1], self._number(f"{out}.fixed", fixed)], f"{out}.offset")
        self._saturate(self._emit("Add", [terms[0], offset], f"{out}.steps"), end)
        self.layers.append(Layer(node.name or out, "Add", "float32"))
        return True

    def _average(self, node: onnx.NodeProto) -> bool:
        """AveragePool of codes whose result is quantized, by the formula of kernels/average_pool.py: on real values."""
        end = self._quantizer_after(node.output[0])
        if end is None:
            return False
        out, (scale, zero) = node.output[0], self._grid(end[1])
        copy = helper.make_node("AveragePool", [self._float(node.input[0])], [f"{out}.mean"], name=node.name)
        copy.attribute.extend(node.attribute)
        self.nodes.append(copy)
        steps = self._emit("Div", [f"{out}.mean", self._number(f"{out}.scale", scale)], f"{out}.steps")
        self._saturate(self._emit("Add", [steps, self._number(f"{out}.zero", zero)], f"{out}.codes.real"), end)
        self.layers.append(Layer(node.name or out, "AveragePool", "float32"))
        return True

    def _saturate(self, value: str, end: tuple[onnx.NodeProto | None, onnx.NodeProto]) -> None:
        """Round and clip a value that counts in unsigned codes, and take the place of the Relu and QuantizeLinear in `end`."""
        relu, quantizer = end
        out = quantizer.output[0]
        scale, zero = self._grid(quantizer)
        dtype = self._zero(quantizer).dtype
        low, high = (limit + _unsigned(dtype) for limit in _limits(dtype))
        bottom = zero if relu is not None else low
        rounded = self._emit("Round", [value], f"{out}.rounded")
        bounds = [self._number(f"{out}.low", bottom), self._number(f"{out}.high", high)]
        clipped = self._emit("Clip", [rounded, *bounds], f"{out}.clipped")
        codes = self._emit("Sub", [clipped, self._number(f"{out}.zero", zero)], f"{out}.codes")
        known = Scaled(codes, scale, max(abs(bottom - zero), abs(high - zero)))
        self.quantized[out] = (known, zero - _unsigned(dtype), dtype)
        self.done |= {out} | ({relu.output[0]} if relu is not None else set())

    def _grid(self, quantizer: onnx.NodeProto) -> tuple[np.ndarray, int]:
        """Scale () of a QuantizeLinear and its zero point as counted in unsigned codes."""
        zero = self._zero(quantizer)
        scale = self._constant_input(quantizer, 1).astype(np.float32).reshape(())
        return scale, int(zero.reshape(-1)[0]) + _unsigned(zero.dtype)

    def _zero(self, node: onnx.NodeProto) -> np.ndarray:
        """The zero point of a QuantizeLinear or DequantizeLinear; ONNX's default is uint8 0."""
        return self._constant_input(node, 2) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)

    def _quantizer_after(self, name: str) -> tuple[onnx.NodeProto | None, onnx.NodeProto] | None:
        """The QuantizeLinear that alone consumes `name`, and the Relu between them if there is one."""
        relu = None
        uses = self.uses.get(name, [])
        if len(uses) == 1 and uses[0].op_type == "Relu":
            relu = uses[0]
            uses = self.uses.get(relu.output[0], [])
        if len(uses) != 1 or uses[0].op_type != "QuantizeLinear" or self._is_output(name):
            return None
        return relu, uses[0]

    def _only_quantized(self, name: str) -> bool:
        uses = self.uses.get(name, [])
        return bool(uses) and all(n.op_type == "QuantizeLinear" for n in uses) and not self._is_output(name)

    def _is_output(self, name: str) -> bool:
        return any(o.name == name for o in self.model.graph.output)

    def _output(self, value: onnx.ValueInfoProto) -> None:
        name = value.name
        if name in self.quantized:
            known, zero, dtype = self.quantized[name]
            shifted = self._emit("Add", [known.codes, self._number(f"{name}.zero", zero)], f"{name}.shifted")
            self._emit("Cast", [shifted], name, to=helper.np_dtype_to_tensor_dtype(dtype))
        else:
            self._float(name)

    def _constant_input(self, node: onnx.NodeProto, index: int) -> np.ndarray:
        name = node.input[index]
        if name not in self.constants:
            raise PlanishError(f"node '{node.name or node.output[0]}': {node.op_type} needs a constant '{name}'")
        return self.constants[name]


def _constant(node: onnx.NodeProto) -> np.ndarray:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    kinds: dict[str, Any] = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if attribute.name not in kinds:
        raise PlanishError(f"node '{node.name or node.output[0]}': a constant of kind {listed([attribute.name])}")
    return np.asarray(value, kinds[attribute.name])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _unsigned(dtype: np.dtype[Any]) -> int:
    """What turns a code of this type into the unsigned one: ONNX Runtime's formulas with a zero point count in uint8."""
    return -_limits(dtype)[0]


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Smallest and largest code of a quantized type."""
    if dtype.name in ("int4", "uint4"):
        return (-8, 7) if dtype.name == "int4" else (0, 15)
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)
