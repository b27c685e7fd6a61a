"""Properties of the integer contract's arithmetic, and what the ops refuse."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.kernels import integer
from planish.kernels import op as contract
from planish.kernels.op import Constant, FloatOp, Tensor, Unsupported, ops

X = Tensor("x", (1, 4, 6, 6), np.float32(0.05), 3)


def exact_float32(value: Fraction) -> np.float32:
    """The float32 nearest to a fraction, half to even, by comparing neighbours exactly."""
    guess = np.float32(float(value))
    around = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
    return min(around, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.int32)) & 1))


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, 4000).astype(np.float32)
    b = np.exp2(rng.uniform(-12, 12, 4000)).astype(np.float32)
    c = (rng.normal(0, 1, 4000) * np.exp2(rng.uniform(-40, 20, 4000))).astype(np.float32)
    a[:1000], b[:1000] = (
        3,
        np.float32(1 + 2**-23),
    )  # a product of 25 bits and a far smaller addend: rounds twice if careless
    c[:1000] = np.float32(2.0**-60) * rng.choice([-1, 1], 1000).astype(np.float32)
    got = integer.fma(a, b, c)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        assert result == exact_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))


def test_requantize_rounds_half_to_even_and_saturates() -> None:
    total = np.array([1, 3, 5, -1, -3, 1000, -1000])
    got = integer.requantize(total, np.float32(0.5), 10, -128, 127)
    assert got.tolist() == [10, 12, 12, 10, 8, 127, -128]


def test_clamp_codes_commute_with_quantization() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        y = Tensor("y", (1,), np.float32(rng.uniform(0.01, 0.2)), int(rng.integers(-128, 128)))
        low, high = sorted(rng.uniform(-10, 10, 2))
        real = rng.uniform(-15, 15, 500).astype(np.float32)
        first, last = integer.clamp_codes(y, low, high)
        clipped = np.clip(real, np.float32(low), np.float32(high))
        expected = np.clip(integer.quantize(clipped, y), -128, 127)
        np.testing.assert_array_equal(np.clip(integer.quantize(real, y), first, last), expected)


def test_clamp_codes_of_open_bounds_keep_everything() -> None:
    assert integer.clamp_codes(X, -np.inf, np.inf) == (-128, 127)
    assert integer.clamp_codes(X, 0.0, np.inf) == (3, 127)


def test_matmul_is_exact_beyond_float32() -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(-255, 256, (7, 5000)).astype(np.int16)
    w = rng.integers(-255, 256, (3, 5000)).astype(np.int16)
    x[0], w[0] = 255, 255
    np.testing.assert_array_equal(integer.matmul(x, w), x.astype(np.int64) @ w.astype(np.int64).T)


def test_rescale_table_is_none_when_nothing_changes() -> None:
    assert integer.rescale_table(X, replace(X, name="y")) is None
    assert integer.rescale_table(X, replace(X, zero_point=4)) is not None


def conv(x: Tensor = X, out: tuple[int, ...] = (1, 2, 4, 4), bias: Constant | None = None, **change: Any) -> FloatOp:
    w = Constant("w", np.full((2, 4, 3, 3), 100, np.int8), np.array([0.01], np.float32), np.zeros(1, np.int32))
    w = replace(w, **change.pop("weight", {}))
    y = Tensor("y", out, np.float32(0.1), 0)
    inputs = (x, w) if bias is None else (x, w, bias)
    return FloatOp("Conv", "c", change, inputs, y, -np.inf, np.inf)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (conv(weight={"scale": None}), "float"),
        (conv(weight={"values": np.zeros((2, 4, 3), np.int8)}), "dimensions"),
        (conv(out=(1, 2, 5, 5)), "window gives"),
        (conv(pads=[-1, 0, 0, 0]), "pads"),
        (conv(auto_pad="SAME"), "auto_pad"),
        (conv(x=replace(X, shape=(1, 5, 6, 6))), "do not fit 5 input channels"),
        (conv(weight={"scale": np.ones(4, np.float32), "zero_point": np.zeros(4, np.int32), "axis": 1}), "4 scales"),
        (conv(bias=Constant("b", np.full(2, 2**31 - 1, np.int32), np.float32([0.0005]), np.zeros(1, np.int32))), "32 bits"),
        (FloatOp("Add", "a", {}, (X, replace(X, shape=(1, 1, 6, 6))), X, -np.inf, np.inf), "one value per channel"),
        (FloatOp("Softmax", "s", {"axis": 0}, (X,), X, -np.inf, np.inf), "batch"),
        (FloatOp("Pad", "p", {"mode": "reflect"}, (X,), X, -np.inf, np.inf), "reflect"),
        (FloatOp("Transpose", "t", {"perm": [1, 0, 2, 3]}, (X,), X, -np.inf, np.inf), "batch"),
        (FloatOp("ReduceMean", "r", {"axes": [1]}, (X,), X, -np.inf, np.inf), "axes [1]"),
    ],
)  # fmt: skip
def test_refuses_with_a_reason(example: FloatOp, reason: str) -> None:
    takers = [o for o in ops().values() if example.type in o.onnx_types]
    reasons: list[str] = []
    for op in takers:
        try:
            assert op.parse(example) is None
        except Unsupported as error:
            reasons.append(str(error))
    assert len(reasons) == 1 and reason in reasons[0]


def test_bias_of_another_scale_keeps_its_real_value() -> None:
    """Codes at twice the scale of the products count twice; float biases are quantized, half to even."""
    scale = np.float32(X.scale * np.float32(0.01))
    conv2d = ops()["conv2d"]
    codes = Constant("b", np.array([7, -9], np.int32), np.array([2 * scale], np.float32), np.zeros(1, np.int32))
    real = Constant("b", np.array([2.5, -3.4], np.float32) * scale)
    for bias, expected in ((codes, [14, -18]), (real, [2, -3])):
        node = conv2d.parse(conv(bias=bias))
        assert node is not None and node.constants["bias"].tolist() == expected


def test_macs_count_every_tap() -> None:
    conv2d, depthwise, dense = ops()["conv2d"], ops()["depthwise_conv2d"], ops()["fully_connected"]
    node = conv2d.parse(conv())
    assert node is not None and conv2d.macs(node) == 2 * 16 * 4 * 9
    w = {"values": np.ones((8, 1, 3, 3), np.int8)}
    node = depthwise.parse(conv(out=(1, 8, 4, 4), weight=w, group=4))
    assert node is not None and depthwise.macs(node) == 8 * 16 * 9
    w = Constant("w", np.ones((20, 6), np.int8), np.ones(1, np.float32), np.zeros(1, np.int32))
    x, y = Tensor("x", (1, 3, 20), np.float32(1), 0), Tensor("y", (1, 3, 6), np.float32(1), 0)
    node = dense.parse(FloatOp("MatMul", "m", {}, (x, w), y, -np.inf, np.inf))
    assert node is not None and dense.macs(node) == 3 * 20 * 6


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_auto_pad_equals_explicit_pads(mode: str) -> None:
    """On an even size with stride 2, SAME_UPPER pads behind and SAME_LOWER before."""
    conv2d = ops()["conv2d"]
    pads = [0, 0, 1, 1] if mode == "SAME_UPPER" else [1, 1, 0, 0]
    automatic = conv2d.parse(conv(out=(1, 2, 3, 3), auto_pad=mode, strides=[2, 2]))
    explicit = conv2d.parse(conv(out=(1, 2, 3, 3), pads=pads, strides=[2, 2]))
    assert automatic is not None and explicit is not None
    assert automatic.attributes == explicit.attributes


def test_every_c_file_belongs_to_an_op(bench: Any) -> None:
    """No kernel file without an op that calls it, and no call of a file that is missing."""
    folder = Path(contract.__file__).parent / "c"
    used: set[str] = set()
    for name, op in ops().items():
        for example in bench.examples(name):
            node = bench.node_of(name, example)
            if not op.alias(node):
                used |= set(op.call(node).sources)
    assert used == {p.name for p in folder.glob("*.c")}
