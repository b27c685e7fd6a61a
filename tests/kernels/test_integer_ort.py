"""The integer contract equals ONNX Runtime's fused integer kernels bit for bit (x86 with VNNI), op by op.

Every test also reads the optimized graph, so that a comparison with a float fallback cannot pass for one with integers.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.kernels.op import Constant, FloatOp, Tensor

FUSED = {
    "Add": "QLinearAdd",
    "AveragePool": "QLinearAveragePool",
    "Concat": "QLinearConcat",
    "Conv": "QLinearConv",
    "Gemm": "QGemm",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "LeakyRelu": "QLinearLeakyRelu",
    "MatMul": "QLinearMatMul",
    "Mul": "QLinearMul",
    "Sigmoid": "QLinearSigmoid",
    "Softmax": "QLinearSoftmax",
}
MOVES = {"MaxPool", "Slice", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Pad", "Identity"}
"""element by element quantize(dequantize(x)) however the runtime does it: exact"""
APPROXIMATED = {
    *("Sigmoid", "Tanh", "Erf", "Exp", "Gelu", "Elu", "Selu", "Softplus", "Softsign", "Mish"),
    *("ReduceMean", "LayerNormalization"),
}
"""float32 approximations or float sums in the runtime: within 1 code"""
UNKNOWN_TO_RUNTIME = {"Swish"}
NICE = (0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.25, 0.5, 1 / 3, 1 / 255, 6 / 255, 1 / 256, 0.0125)
"""scales whose ratios are simple fractions: many results lie on a rounding boundary, where the order of operations shows"""


@pytest.fixture(autouse=True)
def cpu() -> None:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    if platform.machine().lower() not in ("x86_64", "amd64") or not {"avx512_vnni", "avx_vnni"} & set(flags):
        pytest.skip("needs an x86 CPU with VNNI: ONNX Runtime's kernels round or saturate otherwise on other CPUs")


def compare(
    bench: Any, name: str, example: FloatOp, inputs: dict[str, np.ndarray], folder: Path
) -> tuple[np.ndarray, list[str]]:
    """Code differences, and the op types that ONNX Runtime ran. `inputs` by tensor name."""
    node = bench.node_of(name, example)
    distinct = dict.fromkeys(v.name for v in example.inputs if isinstance(v, Tensor))
    got, kinds = bench.onnxruntime_codes(example, [inputs[n] for n in distinct], folder)
    expected = bench.op(name).reference(node, *(inputs[t.name] for t in node.inputs))
    return got.reshape(expected.shape).astype(int) - expected, kinds


def draw(bench: Any, name: str, example: FloatOp, batch: int, seed: int) -> dict[str, np.ndarray]:
    node = bench.node_of(name, example)
    values = bench.random_inputs(np.random.default_rng(seed), node, batch)
    return {t.name: x for t, x in zip(node.inputs, values, strict=True)}


def test_random_quantizations(op_name: str, bench: Any, tmp_path: Path) -> None:
    compared = 0
    for seed in range(2):
        for i, example in enumerate(bench.examples(op_name, seed)):
            if not isinstance(example, FloatOp) or example.type in UNKNOWN_TO_RUNTIME:
                continue
            difference, kinds = compare(bench, op_name, example, draw(bench, op_name, example, 16, seed), tmp_path)
            bounded = np.isfinite(example.low) or np.isfinite(example.high)
            fused = FUSED.get(example.type)
            if fused is not None and not bounded:
                assert fused in kinds, f"{op_name} example {i} ran as {kinds}"
            exact = not bounded and example.type not in APPROXIMATED
            wrong = int((difference != 0).sum())
            assert wrong == 0 or not exact, f"{op_name} example {i} seed {seed}: {wrong} of {difference.size} differ"
            assert np.abs(difference).max() <= 1
            compared += difference.size
    assert compared > 0 or op_name in ("flatten", "paste")  # an alias; an op that only patches make, which ONNX has not


def test_moves_need_no_arithmetic(bench: Any, tmp_path: Path) -> None:
    """Movement of codes with one quantization stays on codes in the runtime too."""
    for name in ("max_pool", "slice", "transpose", "reshape"):
        for example in bench.examples(name):
            x, y = example.inputs[0], example.output
            if (x.scale, x.zero_point) == (y.scale, y.zero_point) and not np.isfinite(example.low):
                _, kinds = compare(bench, name, example, draw(bench, name, example, 2, 0), tmp_path)
                assert "DequantizeLinear" not in kinds


def nice(rng: np.random.Generator, name: str, *shape: int) -> Tensor:
    scale = np.float32(rng.choice(NICE) * rng.choice([1, 1, 2, 3]))
    return Tensor(name, shape, scale, int(rng.integers(-128, 128)))


@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_every_pair_of_codes(kind: str, bench: Any, tmp_path: Path) -> None:
    """All 65,536 pairs under scales that put many results on a rounding boundary."""
    rng = np.random.default_rng(3)
    codes = np.arange(-128, 128).astype(np.int8)
    pairs = {"a": np.repeat(codes, 256).reshape(1, -1), "b": np.tile(codes, 256).reshape(1, -1)}
    for _ in range(20):
        a, b, y = (nice(rng, n, 1, 65536) for n in ("a", "b", "y"))
        difference, kinds = compare(bench, kind.lower(), bench.made(kind, (a, b), y), pairs, tmp_path)
        assert FUSED[kind] in kinds
        assert not difference.any()


@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_broadcast_on_boundaries(kind: str, bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    big, channels, one = (1, 4, 16, 16), (1, 4, 1, 1), (1, 1, 1, 1)
    for shapes in ((big, channels), (channels, big), (big, one), (one, big)):
        for _ in range(20):
            a, b = (nice(rng, n, *s) for n, s in zip("ab", shapes, strict=True))
            example = bench.made(kind, (a, b), nice(rng, "y", *big))
            inputs = {t.name: rng.integers(-128, 128, t.shape).astype(np.int8) for t in (a, b)}
            difference, kinds = compare(bench, kind.lower(), example, inputs, tmp_path)
            assert FUSED[kind] in kinds
            assert not difference.any()


def test_pools_on_boundaries(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    x_codes = rng.integers(-128, 128, (8, 4, 12, 12)).astype(np.int8)
    for _ in range(20):
        x = nice(rng, "x", 1, 4, 12, 12)
        y = replace(nice(rng, "y", 1, 4, 1, 1), scale=np.float32(x.scale * rng.choice([0.1, 0.2, 0.25, 0.5])))
        example = bench.made("GlobalAveragePool", (x,), y)
        difference, kinds = compare(bench, "global_average_pool", example, {"x": x_codes}, tmp_path)
        assert FUSED["GlobalAveragePool"] in kinds
        assert not difference.any()
        for k, stride, pad in ((2, 2, 0), (3, 1, 1), (6, 6, 0)):
            n = (12 + 2 * pad - k) // stride + 1
            y = replace(nice(rng, "y", 1, 4, n, n), scale=np.float32(x.scale * rng.choice([0.25, 0.5, 1, 1 / 3])))
            window = {"kernel_shape": [k, k], "strides": [stride] * 2, "pads": [pad] * 4}
            example = bench.made("AveragePool", (x,), y, window)
            difference, kinds = compare(bench, "average_pool", example, {"x": x_codes}, tmp_path)
            assert FUSED["AveragePool"] in kinds
            assert not difference.any()


def test_sums_on_boundaries(bench: Any, tmp_path: Path) -> None:
    """Convolution and Gemm with scales that are powers of two: halves are frequent and must go to even."""
    rng = np.random.default_rng(6)
    for make, name in (
        (lambda: bench.convolution(rng, 8, 8, (6, 6)), "conv2d"),
        (lambda: bench.linear(rng, 24, 16), "fully_connected"),
    ):
        for _ in range(10):
            example = make()
            x, w, b = example.inputs
            x, w = replace(x, scale=np.float32(0.5)), replace(w, scale=np.full(len(w.scale), 2.0**-6, np.float32))
            b = replace(b, scale=x.scale * w.scale)
            y = replace(example.output, scale=np.float32(rng.choice([0.5, 1, 1.5, 2, 2.5])))
            example = replace(example, inputs=(x, w, b), output=y)
            difference, kinds = compare(bench, name, example, draw(bench, name, example, 16, 7), tmp_path)
            assert FUSED[example.type] in kinds
            assert not difference.any()


def test_concat_and_tables_on_every_code(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    codes = np.arange(-128, 128).astype(np.int8)[None]
    for _ in range(20):
        a, b = nice(rng, "a", 1, 256), nice(rng, "b", 1, 256)
        example = bench.made("Concat", (a, b), nice(rng, "y", 1, 512), {"axis": 1})
        difference, kinds = compare(bench, "concat", example, {"a": codes, "b": codes}, tmp_path)
        assert FUSED["Concat"] in kinds and not difference.any()
        for kind in ("LeakyRelu", "HardSwish", "HardSigmoid"):
            difference, _ = compare(
                bench, "lookup", bench.made(kind, (a,), nice(rng, "y", 1, 256)), {"a": codes}, tmp_path
            )
            assert not difference.any()
        for kind in ("Sigmoid", "Tanh"):
            x = replace(a, scale=np.float32(rng.uniform(0.01, 0.1)))
            y = Tensor(
                "y", (1, 256), np.float32(1 / 256 if kind == "Sigmoid" else 1 / 128), -128 if kind == "Sigmoid" else 0
            )
            difference, _ = compare(bench, "lookup", bench.made(kind, (x,), y), {"a": codes}, tmp_path)
            assert np.abs(difference).max() <= 1


def test_softmax_with_any_output_scale(bench: Any, tmp_path: Path) -> None:
    """Equal as long as the runtime's own product e / y_scale stays finite, which two elements with a fine scale exceed."""
    rng = np.random.default_rng(9)
    for scale in (1 / 256, 1 / 255, 0.0031, 0.0017):
        for _ in range(10):
            n = int(rng.integers(5, 60))
            x = nice(rng, "x", 1, n)
            example = bench.made(
                "Softmax", (x,), Tensor("y", (1, n), np.float32(scale), int(rng.choice([-128, -100, 0])))
            )
            inputs = {"x": rng.integers(-128, 128, (64, n)).astype(np.int8)}
            difference, kinds = compare(bench, "softmax", example, inputs, tmp_path)
            assert FUSED["Softmax"] in kinds
            assert not difference.any()


def test_softmax_of_two_is_right_where_the_runtime_overflows(bench: Any) -> None:
    x, y = Tensor("x", (1, 2), np.float32(0.05), 0), Tensor("y", (1, 2), np.float32(0.0025), -128)
    node = bench.node_of("softmax", bench.made("Softmax", (x,), y))
    codes = np.array([[0, 40], [10, 10]], np.int8)
    real = np.exp(codes * 0.05) / np.exp(codes * 0.05).sum(axis=1, keepdims=True)
    expected = np.clip(np.rint(real / 0.0025) - 128, -128, 127)
    assert np.abs(bench.op("softmax").reference(node, codes) - expected).max() <= 1


def test_float_bias_is_quantized_as_the_runtime_does(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    for _ in range(10):
        example = bench.convolution(rng, 8, 6, (7, 7), with_bias="float")
        assert isinstance(example.inputs[2], Constant) and example.inputs[2].scale is None
        difference, kinds = compare(bench, "conv2d", example, draw(bench, "conv2d", example, 8, 11), tmp_path)
        assert FUSED["Conv"] in kinds
        assert not difference.any()
