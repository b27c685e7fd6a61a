"""Format `onnx_tensorrt`: an ONNX file that TensorRT takes, through ONNX Runtime's execution provider or its own parser.

What TensorRT has (NVIDIA TensorRT documentation, Working with Quantized Types: Quantization Schemes, Explicit Quantization) and how a model gets there:

- quantization is symmetric: no zero points but 0. A pair with another one gets the symmetric int8 scale that holds its range; codes of
  the signed type with zero point 128 keep their scale. Biases in int32 become floats;
- int4 is for weights alone, in blocks of 64 or 128 along one of the last two dimensions, with positive scales: linear_wna16 of 4 bits without
  zero points becomes a block-wise DequantizeLinear; other groups that are multiples of 64 repeat their scale. A block with a negative
  scale changes sign, and its codes -8 become 7;
- float8 (E4M3) with one scale a channel: linear_fp8 becomes DequantizeLinear and MatMul, without the rounding of activations token by
  token, for which TensorRT has no scheme;
- everything else that only compresses weights is decoded to float16, which is said: it is no smaller there than float16.

Products with such weights are float16, everything between them is float32 and TensorRT's to choose. `broken` names every node that breaks a rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ..common.errors import PlanishError
from ..common.progress import say
from ..kernels import fused as fused_ops
from ..kernels import packing
from ..kernels.tvm import lowering
from ..targets.target import Target
from . import fused, onnx_gpu, ort_session
from .format import Format, Source, Written
from .lowering import lowered
from .onnx import describe, onnx_opset

OPSET = 21
"""the first whose DequantizeLinear takes blocks and 4-bit codes"""
BLOCKS = (128, 64)
"""of int4, largest first"""
HALF = TensorProto.FLOAT16
QUANTIZED = {TensorProto.INT8: 127.0, TensorProto.FLOAT8E4M3FN: 448.0, TensorProto.INT4: 7.0}
"""types that TensorRT quantizes to"""
TOLERANCE = 2e-2
"""of the largest output: float16 products, and TensorRT's own choice of precision and order"""


class OnnxTensorrt(Format):
    """ONNX opset 21 for TensorRT 10 and newer: standard ops, symmetric int8 pairs, float8, blocks of int4."""

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Write model.onnx, checked by TensorRT's rules, by ONNX's checker and on ONNX Runtime's CPU."""
        if target.kind not in ("gpu", "host"):
            raise PlanishError(f"format 'onnx_tensorrt' is for NVIDIA GPUs; target '{target.name}' is a {target.kind}")
        model, notes = converted(source)
        faults = broken(model)
        if faults:
            said = "; ".join(f"'{name}': {reason}" for name, reason in list(faults.items())[:5])
            raise PlanishError(
                f"format 'onnx_tensorrt' cannot write {len(faults)} of {len(model.graph.node)} nodes: {said}"
            )
        onnx.checker.check_model(model)
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        answers = ort_session.run(ort_session.create(path, 1), source.golden_inputs)
        before = ort_session.run(ort_session.create(source.onnx.SerializeToString(), 1), source.golden_inputs)
        largest = max((float(np.abs(a.astype(np.float64)).max(initial=0)) for a in answers.values()), default=0.0)
        moved = max(
            (float(np.abs(answers[n].astype(np.float64) - before[n]).max(initial=0)) for n in answers), default=0.0
        )
        lines = [*notes, "not run on TensorRT when it was made: checked by its rules and on ONNX Runtime's CPU"]
        if moved > TOLERANCE * largest:
            lines.append(
                f"TensorRT's symmetric grids move an output by up to {moved / (largest or 1.0):.1%} of the largest one on the golden samples"
            )
        for line in lines:
            say(f"warning: {line}")
        return Written(
            inputs=[describe(i) for i in model.graph.input],
            outputs=[describe(o) for o in model.graph.output],
            details={"opset": onnx_opset(model), "moved": moved, "types": _types(model)},
            warnings=tuple(lines),
            max_error=TOLERANCE * (largest or 1.0),
            answers=answers,
        )


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the constants by type."""
    found: dict[str, int] = defaultdict(int)
    for item in model.graph.initializer:
        found[TensorProto.DataType.Name(item.data_type).lower()] += len(item.raw_data)
    return dict(sorted(found.items()))


def converted(source: Source) -> tuple[onnx.ModelProto, list[str]]:
    """(the model in TensorRT's terms, what the user should know)."""
    notes: list[tuple[str, str]] = []
    made = onnx.ModelProto()
    made.CopyFrom(source.fused or source.onnx)
    if source.fused is not None:
        _weights(made, notes)
        made = lowered(made)
    _pairs(made, notes)
    onnx_gpu.without_unread(made)
    versions = {o.domain: o.version for o in made.opset_import}
    del made.opset_import[:]
    made.opset_import.extend(helper.make_opsetid(d, v) for d, v in sorted(versions.items()) if d in ("", "ai.onnx") or any(n.domain == d for n in made.graph.node))  # fmt: skip
    return made, list(fused.together(notes))


def _weights(model: onnx.ModelProto, notes: list[tuple[str, str]]) -> None:
    """Replace fused linear ops that only compress weights by a decoded weight and a float16 product, in place."""
    fused_ops.ops()
    graph = model.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    rounds = lowering.lowerings()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        call = fused.call(node) if node.domain == fused.DOMAIN else None
        eight = node.op_type == "linear_fp8"
        if call is None or not node.op_type.startswith("linear_") or (rounds[node.op_type].rounds(call.attributes) and not eight):  # fmt: skip
            nodes.append(node)
            continue
        tensors = {k: constants[v] for k, v in call.tensors.items() if k != "x"}
        name, y = node.name or node.output[0], node.output[0]
        weight = _float8(call.attributes, tensors) or _int4(node.op_type, call.attributes, tensors)
        if weight is not None and not eight and (tensors["scale"] < 0).any():
            notes.append(
                (name, "TensorRT takes no negative scale; where one has the code -8, it becomes 7 of its opposite")
            )
        if weight is None:
            dense = _decoded(node.op_type, call.attributes, tensors)
            graph.initializer.append(numpy_helper.from_array(dense.astype(np.float16), f"{name}.weight_float16"))
            product = f"{name}.weight_float16"
            notes.append((name, f"{node.op_type} has no form in TensorRT; its weight is stored as float16"))
        else:
            codes, scale, attributes = weight
            codes.name = f"{name}.weight_turned"
            graph.initializer.extend(
                [codes, numpy_helper.from_array(scale.astype(np.float16), f"{name}.weight_turned_scale")]
            )
            product = f"{name}.weight"
            parts = [codes.name, f"{name}.weight_turned_scale"]
            nodes.append(helper.make_node("DequantizeLinear", parts, [product], f"{name}.dequantize", **attributes))
            if eight and str(call.attributes["activations"]) != "none":
                notes.append((name, "its activations stay float16: TensorRT has no float8 scale token by token"))
        bias = tensors.get("bias")
        last = y if bias is None else f"{y}.product"
        nodes += [
            helper.make_node("Cast", [node.input[0]], [f"{y}.x16"], f"{name}.to_float16", to=HALF),
            helper.make_node("MatMul", [f"{y}.x16", product], [f"{y}.y16"], name),
            helper.make_node("Cast", [f"{y}.y16"], [last], f"{name}.to_float32", to=TensorProto.FLOAT),
        ]
        if bias is not None:
            nodes.append(helper.make_node("Add", [last, call.tensors["bias"]], [y], f"{name}.bias"))
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


Stored = tuple[TensorProto, np.ndarray, dict[str, Any]]
"""codes (in, out), their scale, attributes of DequantizeLinear"""


def _int4(op: str, attributes: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Stored | None:
    """Blocks of int4 for linear_wna16 of 4 bits around 8; None for another grid or group."""
    if op != "linear_wna16" or int(attributes["bits"]) != 4:
        return None
    zero, group = tensors.get("zero_point"), int(attributes["group"])
    block = next((b for b in BLOCKS if group % b == 0), None)
    if block is None or (zero is not None and (zero != 8).any()):
        return None
    codes = packing.unpack(torch.from_numpy(tensors["codes"].copy()), 4, group).numpy()  # (out, in)
    sign = np.where(np.repeat(tensors["scale"], group, axis=1) < 0, -1, 1)  # (out, in)
    signed = np.minimum((codes.astype(np.int16) - 8) * sign, 7).T.reshape(-1).astype(np.int16)
    nibbles = np.append(signed, np.zeros(signed.size % 2, np.int16)).astype(np.uint8) & 15
    packed = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)
    scale = np.repeat(np.abs(tensors["scale"]), group // block, axis=1).T  # (in / block, out)
    tensor = TensorProto(data_type=TensorProto.INT4, dims=codes.T.shape, raw_data=packed.tobytes())
    return tensor, np.ascontiguousarray(scale), {"axis": 0, "block_size": block}


def _float8(attributes: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Stored | None:
    """A scale a channel for linear_fp8 in E4M3; None for another op or format."""
    if attributes.get("format") != "e4m3":
        return None
    turned = np.ascontiguousarray(tensors["codes"].T)  # (in, out)
    tensor = TensorProto(data_type=TensorProto.FLOAT8E4M3FN, dims=turned.shape, raw_data=turned.tobytes())
    return tensor, tensors["scale"], {"axis": 1}


def _decoded(op: str, attributes: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """W^T (in, out) float32 of an op that does not round x: its value at the identity."""
    call = fused.overload(op)
    given: dict[str, Any] = {k: torch.from_numpy(v.copy()) for k, v in tensors.items() if k != "bias"}
    given |= attributes
    if "activations" in given:
        given["activations"] = "none"
    channels = _channels(op, attributes, tensors)
    given["x"] = torch.eye(channels)
    return call(*(given.get(a.name) for a in call._schema.arguments)).numpy()


def _channels(op: str, attributes: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> int:
    """Columns of the weight."""
    if op == "linear_wna16":
        return tensors["scale"].shape[1] * int(attributes["group"])
    if op == "linear_codebook":
        return tensors["codes"].shape[1] * 2
    if op == "linear_fp8":
        return tensors["codes"].shape[1]
    raise PlanishError(f"format 'onnx_tensorrt' has no form for {op}; formats pt2, tvm and onnx run it")


def _pairs(model: onnx.ModelProto, notes: list[tuple[str, str]]) -> None:
    """Quantize/dequantize pairs on symmetric int8 grids, in place; biases in int32 become floats."""
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    grids: dict[tuple[str, str], tuple[str, str]] = {}
    added: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or _block(node):
            nodes.append(node)
            continue
        stored = constants.get(node.input[0])
        if stored is not None and stored.data_type == TensorProto.INT32:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            scale = _along(numpy_helper.to_array(constants[node.input[1]]), len(stored.dims), axis)
            added[node.output[0]] = numpy_helper.from_array(
                (numpy_helper.to_array(stored) * scale).astype(np.float32), node.output[0]
            )
            continue
        if len(node.input) < 3 or not node.input[2]:
            nodes.append(node)
            continue
        zero, scale = numpy_helper.to_array(constants[node.input[2]]), numpy_helper.to_array(constants[node.input[1]])
        if zero.dtype not in (np.uint8, np.int8):
            nodes.append(node)
            continue
        if stored is not None and node.op_type == "DequantizeLinear":
            shift = 128 if zero.dtype == np.uint8 else 0
            if (zero.astype(int) == shift).all():
                codes = (numpy_helper.to_array(stored).astype(np.int16) - shift).astype(np.int8)
                added[f"{node.input[0]}.int8"] = numpy_helper.from_array(codes, f"{node.input[0]}.int8")
                node.input[:] = [f"{node.input[0]}.int8", node.input[1]]
            nodes.append(node)
            continue
        key = (node.input[1], node.input[2])
        if key not in grids:
            low, high = np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max
            middle = zero.astype(int) == (low + high + 1) // 2
            reach = np.maximum(high - zero.astype(int), zero.astype(int) - low)
            symmetric = np.where(middle, scale, scale * reach / 127).astype(np.float32)
            grids[key] = (f"{node.input[1]}.symmetric.{len(grids)}", f"{node.input[2]}.symmetric.{len(grids)}")
            added[grids[key][0]] = numpy_helper.from_array(symmetric, grids[key][0])
            added[grids[key][1]] = numpy_helper.from_array(np.zeros(zero.shape, np.int8), grids[key][1])
            if not middle.all():
                notes.append(
                    (
                        node.input[0],
                        "its grid had a zero point; TensorRT's is symmetric, with steps up to twice as wide",
                    )
                )
        node.input[1], node.input[2] = grids[key]
        nodes.append(node)
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(added.values())


def _block(node: onnx.NodeProto) -> int:
    """Elements that share a scale; 0: those of a channel, or all."""
    return next((a.i for a in node.attribute if a.name == "block_size"), 0)


def _along(scale: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A scale shaped to multiply a tensor of the rank along the axis."""
    return (
        scale if scale.ndim == 0 or rank == 1 else scale.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    )


def broken(model: onnx.ModelProto) -> dict[str, str]:
    """Every node that breaks a rule of TensorRT's explicit quantization, and the rule."""
    constants = {i.name: i for i in model.graph.initializer}
    types = onnx_gpu.element_types(model)
    faults: dict[str, str] = {}
    for node in model.graph.node:
        name = node.name or node.output[0]
        if node.domain not in ("", "ai.onnx"):
            faults[name] = f"{node.domain}.{node.op_type} is no op of the ONNX standard"
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            fault = _fault(node, constants, types)
            if fault is not None:
                faults[name] = fault
        elif node.op_type in ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"):
            faults[name] = f"{node.op_type} is not supported; TensorRT takes QuantizeLinear and DequantizeLinear"
        elif node.op_type == "Cast" and any(a.name == "to" and a.i in (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2) for a in node.attribute):  # fmt: skip
            faults[name] = "a Cast to 8-bit floats is not supported; TensorRT takes QuantizeLinear"
    if onnx_opset(model) < OPSET:
        faults["(model)"] = f"opset {onnx_opset(model)}; {OPSET} or newer is needed"
    return faults


def _fault(node: onnx.NodeProto, constants: Mapping[str, TensorProto], types: Mapping[str, str]) -> str | None:
    """The rule that a QuantizeLinear or DequantizeLinear breaks."""
    accepted = {TensorProto.DataType.Name(t).lower() for t in QUANTIZED}
    codes = types.get(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0], "")
    if codes not in accepted:
        return f"codes of type {codes}; TensorRT quantizes to {', '.join(sorted(accepted))}"
    if len(node.input) > 2 and node.input[2]:
        zero = constants.get(node.input[2])
        if zero is None or np.asarray(numpy_helper.to_array(zero)).astype(np.float32).any():
            return "a zero point other than 0; TensorRT's quantization is symmetric"
    scale = constants.get(node.input[1])
    if scale is None:
        return "a computed scale; TensorRT takes constants"
    if scale.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return "a scale that is no float of 16 or 32 bits"
    if not (numpy_helper.to_array(scale).astype(np.float32) > 0).all():
        return "a scale that is not positive"
    block = _block(node)
    constant = node.op_type == "DequantizeLinear" and node.input[0] in constants
    if codes == "int4":
        if not constant:
            return "int4 activations; TensorRT has int4 for weights alone"
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        rank = len(constants[node.input[0]].dims)
        if block not in BLOCKS:
            return f"int4 in blocks of {block}; TensorRT takes {' and '.join(map(str, sorted(BLOCKS)))}"
        if axis % rank < rank - 2:
            return "int4 blocks along another than one of the last two dimensions"
    elif block:
        return f"blocks of {codes}; TensorRT has blocks for int4"
    elif len(scale.dims) and not constant and numpy_helper.to_array(scale).size > 1:
        return "a scale a channel for activations; TensorRT takes one for the tensor"
    return None
