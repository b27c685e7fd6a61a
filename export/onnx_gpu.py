"""An ONNX file for ONNX Runtime's CUDA execution provider: what it has kernels for, and low-bit products in float16.

The tables are those of ONNX Runtime's docs/OperatorKernels.md, section CUDAExecutionProvider. A node without a kernel there runs on the CPU,
and its tensors are copied there and back in every call.

MatMulNBits has its fast kernels for float16 and bfloat16 only (4 and 8 bits, blocks of 32, 64 and 128, outputs a multiple of 64, of 32
for 8 bits; onnxruntime/contrib_ops/cuda/quantization/matmul_nbits.cc, CheckFpAIntBEligibility), behind the session option
`ep.cuda.fpa_intb_gemm`. So x is rounded to float16 before such a node and y is float16 behind it; what stands between stays float32.
Quantize/dequantize pairs are not fused there: a statically quantized model computes in float. TensorRT's execution provider fuses
them (format onnx_tensorrt).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..common.errors import listed
from ..kernels import matmul_nbits

OPTION = "ep.cuda.fpa_intb_gemm"
"""session option that turns the fast kernels of MatMulNBits on"""
TOLERANCE = 1e-2
"""of the largest output: products in float16, sums in another order than the CPU's"""
BLOCKS, OUTPUTS = (32, 64, 128), {4: 64, 8: 32}
"""blocks that they take, and the number that divides the outputs, by bits"""
LARGEST = float(np.finfo(np.float16).max)
PRESENT = frozenset(
    [
        "Abs",
        "Add",
        "Affine",
        "And",
        "ArgMax",
        "ArgMin",
        "Attention",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Ceil",
        "Clip",
        "Compress",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "ConvTranspose",
        "Cos",
        "CumSum",
        "DepthToSpace",
        "DequantizeLinear",
        "Div",
        "Dropout",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "EyeLike",
        "Flatten",
        "Floor",
        "GRU",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "GridSample",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "If",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LRN",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "Loop",
        "MatMul",
        "MatMulInteger",
        "Max",
        "MaxPool",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "QuantizeLinear",
        "RMSNormalization",
        "RNN",
        "RandomNormal",
        "RandomUniform",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Resize",
        "ReverseSequence",
        "RoiAlign",
        "RotaryEmbedding",
        "Round",
        "Scan",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "SequenceAt",
        "Shape",
        "Shrink",
        "Sigmoid",
        "Sign",
        "SimplifiedLayerNormalization",
        "Sin",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "TensorScatter",
        "ThresholdedRelu",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Upsample",
        "Where",
        "Xor",
    ]
)
"""ops of the standard with a kernel"""
CONTRIBUTED = frozenset(
    {"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "Gelu", "FastGelu", "FusedMatMul", "BiasGelu"}
)
"""the same of com.microsoft, as far as planish writes them"""
FLOATS = frozenset({"float", "float16", "double"})
WIDE = FLOATS | {"int32", "int64"}
CODES = frozenset({"float8e4m3fn", "float8e5m2", "int4", "int8", "uint4", "uint8"})
LIMITED: Mapping[str, frozenset[str]] = {
    "MatMulInteger": frozenset({"int8"}),
    "DequantizeLinear": CODES,
    "Pad": FLOATS | {"bool"},
    "MaxPool": FLOATS | {"int8", "uint8"},
    "AveragePool": FLOATS | {"bfloat16"},
    "Conv": FLOATS | {"bfloat16"},
    "MatMul": FLOATS | {"bfloat16"},
    "Gemm": FLOATS | {"bfloat16"},
    "Max": WIDE | {"bfloat16", "uint32", "uint64"},
    "Min": WIDE | {"bfloat16", "uint32", "uint64"},
    "Mod": WIDE | {"bfloat16", "uint32", "uint64"},
    "Equal": WIDE | {"bool", "uint32", "uint64"},
    "Less": WIDE | {"uint32", "uint64"},
    "LessOrEqual": WIDE | {"uint32", "uint64"},
    "Greater": WIDE | {"uint32", "uint64"},
    "GreaterOrEqual": WIDE | {"uint32", "uint64"},
    "Where": WIDE | {"bfloat16", "uint8"},
    "Clip": FLOATS | {"int64", "int8", "uint64", "uint8"},
    "Round": FLOATS,
    "Floor": FLOATS,
    "Tile": WIDE | {"bfloat16"},
    "ReduceMax": WIDE,
    "ReduceMean": FLOATS | {"int32"},
    "ReduceSum": WIDE | {"bfloat16"},
}
"""types of the first operand for which an op has a kernel, where these are not all"""
FIXED = {
    "Shape": "int64",
    "Size": "int64",
    "ArgMax": "int64",
    "ArgMin": "int64",
    "NonZero": "int64",
    "MatMulInteger": "int32",
    "ConvInteger": "int32",
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "IsNaN"), "bool"),
}
"""type of an op's output where it does not depend on the operands"""


def warnings(model: onnx.ModelProto) -> list[str]:
    """What is slow there, by layer."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in on_cpu(model).items():
        found[reason].append(name)
    lines = [
        f"{listed(names)}: {reason}; the CUDA execution provider leaves the node to the CPU and copies its tensors there and back"
        for reason, names in found.items()
    ]
    slow = [n.name for n in model.graph.node if n.op_type == matmul_nbits.OP and not _fast(n)]
    if slow:
        lines.append(
            f"{listed(slow)}: the fast kernels of MatMulNBits take 4 bits with outputs a multiple of 64, or 8 bits with one of 32, in blocks of "
            "32, 64 or 128; for these layers ONNX Runtime decodes the weight or uses a slower kernel"
        )
    decoded = [n.name for n in model.graph.node if n.op_type == "MatMulBnb4"]
    if decoded:
        lines.append(
            f"{listed(decoded)}: MatMulBnb4 decodes the whole weight in every call with more than one token; formats pt2 and tvm have "
            "fused kernels"
        )
    if any(n.op_type == "QuantizeLinear" for n in model.graph.node):
        lines.append(
            "the CUDA execution provider does not fuse quantize/dequantize pairs: statically quantized layers are computed in float, slower "
            "than unquantized; TensorRT's fuses them (format onnx_tensorrt)"
        )
    return lines


def on_cpu(model: onnx.ModelProto) -> dict[str, str]:
    """Why a node has no kernel there, by its name. A type that is not known counts as one that has."""
    types = element_types(model)
    found = {}
    for node in model.graph.node:
        known = PRESENT if node.domain in ("", "ai.onnx") else CONTRIBUTED
        if node.op_type not in known:
            found[node.name] = f"{node.op_type} has no CUDA kernel"
            continue
        kind = types.get(node.input[0], "") if node.input else ""
        if node.op_type == "Where":
            kind = types.get(node.input[1], "")
        if node.op_type == "QuantizeLinear":
            kind, accepted = types.get(node.output[0], ""), CODES
        else:
            accepted = LIMITED.get(node.op_type)
        if kind and accepted is not None and kind not in accepted:
            found[node.name] = f"{node.op_type} of {kind} has no CUDA kernel"
    return found


def element_types(model: onnx.ModelProto) -> dict[str, str]:
    """Type of every value by name, in ONNX's words, as far as the ops that planish writes tell it."""
    graph = model.graph
    types = {i.name: _word(i.data_type) for i in graph.initializer}
    types |= {i.name: _word(i.type.tensor_type.elem_type) for i in graph.input}
    for node in graph.node:
        first = types.get(node.input[0], "") if node.input else ""
        attributes = {a.name: a for a in node.attribute}
        kind = FIXED.get(node.op_type, first)
        if node.op_type == "Cast":
            kind = _word(attributes["to"].i)
        elif node.op_type == "Constant":
            kind = _word(attributes["value"].t.data_type) if "value" in attributes else ""
        elif node.op_type == "ConstantOfShape":
            kind = _word(attributes["value"].t.data_type) if "value" in attributes else "float"
        elif node.op_type == "QuantizeLinear":
            kind = types.get(node.input[2], "") if len(node.input) > 2 else "uint8"
        elif node.op_type in ("DequantizeLinear", "Where"):
            kind = types.get(node.input[1], "")
        elif node.op_type == "GatherBlockQuantized":
            kind = types.get(node.input[2], "")
        for place, name in enumerate(node.output):
            types[name] = kind
            if node.op_type == "TopK" and place == 1:
                types[name] = "int64"
            if node.op_type == "DynamicQuantizeLinear":
                types[name] = "float" if place == 1 else "uint8"
    return types


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its MatMulNBits in float16, as a copy. A node with a scale beyond float16 stays as it is."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    constants = {i.name: i for i in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        own = _float_constants(node, constants)
        if node.op_type != matmul_nbits.OP or own is None:
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        for place, values in own.items():
            name = f"{node.input[place]}.float16"
            if name not in constants:
                constants[name] = numpy_helper.from_array(values.astype(np.float16), name)
                graph.initializer.append(constants[name])
            node.input[place] = name
        node.input[0], node.output[0] = f"{y}.x16", f"{y}.y16"
        nodes += [
            helper.make_node("Cast", [x], [f"{y}.x16"], f"{node.name}.to_float16", to=TensorProto.FLOAT16),
            node,
            helper.make_node("Cast", [f"{y}.y16"], [y], f"{node.name}.to_float32", to=TensorProto.FLOAT),
        ]
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
    return without_unread(made)


def without_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, in place, without constants that no node reads."""
    graph = model.graph
    read = {name for n in graph.node for name in n.input} | {o.name for o in graph.output}
    for item in [i for i in graph.initializer if i.name not in read]:
        graph.initializer.remove(item)
    return model


def _float_constants(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> dict[int, np.ndarray] | None:
    """Float32 operands behind x by their place; None where one is computed, or too large for float16."""
    found = {}
    for place, name in enumerate(node.input):
        if place == 0 or not name:
            continue
        if name not in constants:
            return None
        if constants[name].data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(constants[name])
            if np.abs(values).max(initial=0) > LARGEST:
                return None
            found[place] = values
    return found


def _fast(node: onnx.NodeProto) -> bool:
    """Whether the fast kernels take a MatMulNBits."""
    bits, block, outputs, channels = (helper.get_node_attr_value(node, a) for a in ("bits", "block_size", "N", "K"))
    return bits in OUTPUTS and block in BLOCKS and outputs % OUTPUTS[bits] == 0 and channels % block == 0


def _word(data_type: int) -> str:
    return TensorProto.DataType.Name(data_type).lower()
