"""Format `onnx`: one model.onnx for ONNX Runtime, quantize/dequantize pairs where the model is quantized.

Before writing, each MatMulNBits gets the accuracy level that its measured output error allows (accuracy.py), and what will be slower or
larger than it might be is printed. After writing, the file is loaded in ONNX Runtime and the graph that it really runs is read back: in
a statically quantized model a convolution or matrix product that stayed float and a weight that was folded back to float are
warnings; a weight of a fused low-bit op that was folded back is an error.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from ..common.errors import PlanishError, listed
from ..common.progress import say
from ..targets.target import Target
from . import accuracy, metadata, onnx_gpu, ort_session
from .accuracy import Choice
from .format import Format, Source, Written

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
"""ops that multiply floats"""


class Onnx(Format):
    """ONNX opset 21; runs on ONNX Runtime on x86, Arm and CUDA."""

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Write model.onnx and report how ONNX Runtime on this machine runs it."""
        path = folder / "model.onnx"
        model = onnx.ModelProto()
        model.CopyFrom(source.onnx)
        if target.kind == "gpu":
            return _for_cuda(onnx_gpu.in_half(model), source, path)
        choices = accuracy.choose(model, source.golden_inputs)
        warnings = [*metadata.get(model, metadata.NOTES), *_slow(choices)]
        for line in warnings:
            say(f"warning: {line}")
        path.write_bytes(model.SerializeToString(deterministic=True))
        runs = optimized(path)
        _refuse_folded(model, runs)
        if any(n.op_type == "QuantizeLinear" for n in model.graph.node):
            warnings += _stayed_float(source.fused or model, model, runs)
        counts = dict(sorted(Counter(n.op_type for n in runs.graph.node).items()))
        details: dict[str, Any] = {"opset": onnx_opset(model), "runtime_ops": counts}
        answers = None
        if choices:
            details["accuracy_levels"] = {
                c.node: {
                    "level": c.level,
                    "error": float(f"{c.error:.3g}"),
                    **({"reason": c.reason} if c.reason else {}),
                }
                for c in choices
            }
            answers = ort_session.run(ort_session.create(path, 1), source.golden_inputs)
        return Written(
            inputs=[describe(i) for i in model.graph.input],
            outputs=[describe(o) for o in model.graph.output],
            details=details,
            warnings=tuple(warnings),
            answers=answers,
        )


def _for_cuda(model: onnx.ModelProto, source: Source, path: Path) -> Written:
    """Write a graph for the CUDA execution provider; its answers are those of ONNX Runtime's CPU, which has the same ops."""
    warnings = [
        *metadata.get(model, metadata.NOTES),
        *onnx_gpu.warnings(model),
        "not run on a GPU when it was made: checked on ONNX Runtime's CPU",
    ]
    for line in warnings:
        say(f"warning: {line}")
    path.write_bytes(model.SerializeToString(deterministic=True))
    _refuse_folded(model, optimized(path))
    answers = ort_session.run(ort_session.create(path, 1), source.golden_inputs)
    largest = max((float(np.abs(a.astype(np.float64)).max(initial=0)) for a in answers.values()), default=0.0)
    low = [n.name for n in model.graph.node if n.op_type == "MatMulNBits"]
    return Written(
        inputs=[describe(i) for i in model.graph.input],
        outputs=[describe(o) for o in model.graph.output],
        details={
            "opset": onnx_opset(model),
            "provider": "CUDAExecutionProvider",
            **({"session_options": {onnx_gpu.OPTION: "1"}} if low else {}),
            "on_cpu": onnx_gpu.on_cpu(model),
        },
        warnings=tuple(warnings),
        max_error=onnx_gpu.TOLERANCE * (largest or 1.0),
        answers=answers,
    )


def onnx_opset(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operator set."""
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _slow(choices: Sequence[Choice]) -> list[str]:
    """Warnings about products that take longer than in float."""
    names = [c.node for c in choices if c.slow]
    if not names:
        return []
    exact = sum(c.slow and c.level == accuracy.FLOAT for c in choices)
    why = f", {exact} of them at accuracy level 0" if exact else ""
    return [
        f"{listed(names)}: with as many tokens at a time as the golden samples have, ONNX Runtime computes these {len(names)} "
        f"products no faster than in float{why}; quantize.dynamic with 8 bits is faster there"
    ]


def _stayed_float(before: onnx.ModelProto, model: onnx.ModelProto, runs: onnx.ModelProto) -> list[str]:
    """What a quantized model still computes in float, or holds in float after loading.

    `before` is `model` with fused ops as one node each: a product that the lowering of one wrote is its own business.
    """
    made = {o: n.op_type for n in before.graph.node for o in n.output}
    quantized = {n.name for n in before.graph.node if any(made.get(i) == "DequantizeLinear" for i in n.input)}
    weights = {i.name for i in before.graph.initializer if len(i.dims) > 1}
    skipped = {n.name for n in before.graph.node if n.op_type in HEAVY and n.input[1] in weights} - quantized
    floats = [n.name for n in runs.graph.node if n.op_type in HEAVY]
    warnings = []
    if unfused := [n for n in floats if n in quantized]:
        warnings.append(
            f"{listed(unfused)}: ONNX Runtime multiplies these in float, since it did not fuse their quantize/dequantize pairs"
        )
    if left := [n for n in floats if n in skipped]:
        warnings.append(f"{listed(left)}: not quantized, multiplied in float")
    widened = _widened(model, runs)
    restored = float_weight_bytes(runs) - float_weight_bytes(model) - widened
    if restored > 0.1 * weight_bytes(model):
        warnings.append(f"ONNX Runtime folds {restored} bytes of weights back to float when it loads the file")
    if widened > 0.1 * weight_bytes(model):
        warnings.append(
            f"weights stored in 16 bits take {widened} bytes as float32 once ONNX Runtime has loaded the file"
        )
    return warnings


def _refuse_folded(model: onnx.ModelProto, runs: onnx.ModelProto) -> None:
    """Raise PlanishError when low-bit weights of fused ops became float in the graph that runs.

    Codes that vanish while at least twice their bytes appear in float were decoded; codes that were moved or renamed leave as many.
    """
    if not metadata.get(model, metadata.LOW_BIT):
        return
    lost = narrow_bytes(model) - narrow_bytes(runs)
    restored = float_weight_bytes(runs) - float_weight_bytes(model) - _widened(model, runs)
    if lost > 0 and restored >= 2 * lost:
        left = {i.name for i in runs.graph.initializer}
        names = [i.name for i in model.graph.initializer if _narrow(i) and i.name not in left]
        raise PlanishError(
            f"ONNX Runtime decodes {lost} bytes of low-bit weights to {restored} bytes of float when it loads the file: {listed(names)}"
        )


def optimized(path: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs for the file on this machine, before it changes layouts (which renames nodes)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        with ort_session.plain_errors(f"cannot load '{path.name}'"):
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all constants."""
    return sum(_size(i) for i in model.graph.initializer)


def float_weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of constants in float32 with more than one dimension: the weights that are not compressed."""
    return sum(_size(i) for i in model.graph.initializer if i.data_type == TensorProto.FLOAT and len(i.dims) > 1)


def narrow_bytes(model: onnx.ModelProto) -> int:
    """Bytes of constants of at most 8 bits an element with more than one dimension: codes."""
    return sum(_size(i) for i in model.graph.initializer if _narrow(i))


def _narrow(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) > 1 and tensor.data_type != TensorProto.BOOL and _bits(tensor.data_type) <= 8


def _widened(model: onnx.ModelProto, runs: onnx.ModelProto) -> int:
    """Bytes in float of the constants stored in 16 bits that ONNX Runtime converts when it loads the file."""
    left = {i.name for i in runs.graph.initializer}
    return sum(
        2 * _size(i)
        for i in model.graph.initializer
        if len(i.dims) > 1 and _bits(i.data_type) == 16 and i.name not in left
    )


def _size(tensor: onnx.TensorProto) -> int:
    count = 1
    for d in tensor.dims:
        count *= d
    return (count * _bits(tensor.data_type) + 7) // 8


def _bits(data_type: int) -> int:
    if data_type in (TensorProto.INT4, TensorProto.UINT4):
        return 4
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8


def describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, shape (a dynamic dimension by its name) and dtype of an input or output."""
    tensor = value.type.tensor_type
    shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return {"name": value.name, "shape": shape, "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name}
