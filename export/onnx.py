"""Format `onnx`: one model.onnx for ONNX Runtime, quantize/dequantize pairs where the model is quantized.

After writing, the file is loaded in ONNX Runtime and the graph that it really runs is read back: a convolution or
matrix product that stayed float in a quantized model, and a weight that was folded back to float, are warnings.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from ..targets.target import Target
from .format import Format, Source, Written

HEAVY = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
)
"""ops that compute in float, or leave a float result: the integers go no further"""


class Onnx(Format):
    """ONNX opset 21; runs on ONNX Runtime on x86, Arm and CUDA."""

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Write model.onnx and report how ONNX Runtime on this machine runs it."""
        path = folder / "model.onnx"
        path.write_bytes(source.onnx.SerializeToString(deterministic=True))
        quantized = any(n.op_type == "QuantizeLinear" for n in source.onnx.graph.node)
        fused = optimized(path)
        warnings = []
        if quantized:
            warnings += [
                f"'{n.name}' ({n.op_type}) gives float results: ONNX Runtime did not fuse its quantize/dequantize pairs"
                for n in fused.graph.node
                if n.op_type in HEAVY
            ]
            restored = float_weight_bytes(fused) - float_weight_bytes(source.onnx)
            if restored > 0.1 * weight_bytes(source.onnx):
                warnings.append(f"ONNX Runtime folds {restored} bytes of weights back to float when it loads the file")
        counts = dict(sorted(Counter(n.op_type for n in fused.graph.node).items()))
        return Written(
            inputs=[describe(i) for i in source.onnx.graph.input],
            outputs=[describe(o) for o in source.onnx.graph.output],
            details={"opset": source.onnx.opset_import[0].version, "runtime_ops": counts},
            warnings=tuple(warnings),
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
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all constants."""
    return sum(_size(i) for i in model.graph.initializer)


def float_weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of constants in float32 with more than one dimension: the weights that are not compressed."""
    return sum(_size(i) for i in model.graph.initializer if i.data_type == TensorProto.FLOAT and len(i.dims) > 1)


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
