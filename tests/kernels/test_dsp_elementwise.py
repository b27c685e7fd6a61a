"""Add, mul and pools for cores with the DSP extension equal the reference on every pair of codes and every window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.kernels.c import version
from planish.kernels.c.dsp import add as dsp_add
from planish.kernels.op import Node, Tensor, ops
from planish.targets import target as targets

TARGET = "stm32f446"
OPS = ("add", "mul", "average_pool", "global_average_pool", "max_pool")


def kernel(node: Node) -> str:
    """Which kernel the target's cores run."""
    return version.choose(ops(), node, targets.load(TARGET).features).kernel


def four_channels(node: Node) -> Node:
    """The same pool over 8 channels, which are read by the word."""
    shapes = [(1, 8, *t.shape[2:]) for t in (node.inputs[0], node.output)]
    return replace(
        node, inputs=(replace(node.inputs[0], shape=shapes[0]),), output=replace(node.output, shape=shapes[1])
    )


@pytest.mark.parametrize("op", OPS)
def test_equals_the_reference(op: str, bench: Any, tmp_path: Path) -> None:
    nodes = [bench.node_of(op, e) for e in bench.examples(op)]
    if op.endswith("pool"):
        nodes += [four_channels(n) for n in nodes if n.output.shape[1] != 8]
    assert all(kernel(n).startswith(f"dsp_{op}") for n in nodes)
    bench.equal_reference(nodes, TARGET, tmp_path)


def addition(scales: tuple[float, float, float], zero_points: tuple[int, int, int], low: int = -128) -> Node:
    """a + b of half of all 65536 pairs of codes, (1, 128, 256)."""
    a, b, y = (Tensor(n, (1, 128, 256), np.float32(s), z) for n, s, z in zip("aby", scales, zero_points, strict=True))
    attributes = {"scales": (a.scale, b.scale), "zero_points": zero_points[:2], "low": low, "high": 127}
    return Node("add", "add", (a, b), y, {"swapped": False, "repeat": "same", **attributes})


@pytest.mark.parametrize(
    ("node", "found"),
    [
        (addition((0.0317229, 0.0531729, 0.0611379), (-3, 17, -128)), "dsp_add"),
        (addition((0.0251173, 0.0131729, 0.0211379), (-128, 5, 31), low=31), "dsp_add"),
        (addition((0.03, 0.05, 0.06), (-3, 17, 2)), "dsp_add_float"),  # sums right between two codes
        (addition((0.5, 0.25, 1.0), (0, 0, 0), low=0), "dsp_add_float"),
    ],
)
def test_add_on_every_pair_of_codes(node: Node, found: str, bench: Any, tmp_path: Path) -> None:
    assert kernel(node) == found
    codes = np.arange(-128, 128, dtype=np.int8)
    halves = [np.broadcast_arrays(c[None, :, None], codes[None, None, :]) for c in (codes[:128], codes[128:])]
    samples = [[np.ascontiguousarray(v) for v in pair] for pair in halves]  # of (1, 128, 256)
    made = bench.on_device(node, samples, TARGET, tmp_path)
    for got, sample in zip(made.codes, samples, strict=True):
        np.testing.assert_array_equal(got, ops()["add"].reference(node, *sample))


def test_integer_factors_are_found_for_ordinary_scales() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        a, b = np.exp(rng.uniform(-4, -2.5, 2))
        zero_points = tuple(int(z) for z in rng.integers(-128, 128, 3))
        node = addition((a, b, max(a, b) * rng.uniform(0.8, 1.7)), (zero_points[0], zero_points[1], zero_points[2]))
        assert dsp_add.search(node, dsp_add.SHIFT) is not None


def test_sum_lies_in_the_place_of_an_operand(bench: Any, tmp_path: Path) -> None:
    node = addition((0.0317229, 0.0531729, 0.0611379), (-3, 17, -128))
    call = version.choose(ops(), node, targets.load(TARGET).features)
    assert call.in_place == (0, 1)
    assert call.overlap == 0
    rng = np.random.default_rng(2)
    inputs = bench.random_inputs(rng, node, 1)
    made = bench.on_device(node, [inputs], TARGET, tmp_path)
    np.testing.assert_array_equal(made.codes[0], ops()["add"].reference(node, *inputs))
    assert made.arena_bytes == 2 * node.output.size


def between(bench: Any, rng: np.random.Generator, x: Tensor, y: Tensor) -> Node:
    """A layer that makes `y` of `x`, (1, 8, 5, 3), and uses all its codes."""
    node = bench.node_of("depthwise_conv2d", bench.convolution(rng, 8, 8, (5, 3), (1, 1), pads=(0, 0, 0, 0), group=8))
    bounds = {"low": -1 << y.bits - 1, "high": (1 << y.bits - 1) - 1}
    sums = 128.0 * np.abs(node.constants["weight"].reshape(-1).astype(np.int32)) * 2.0 ** (x.bits - y.bits)
    constants = {**node.constants, "bias": np.zeros(8, np.int32), "rescale": (200 / (sums + 1)).astype(np.float32)}
    return replace(
        node,
        name=f"{x.name}_{y.name}",
        inputs=(x,),
        output=y,
        attributes={**node.attributes, **bounds},
        constants=constants,
    )


@pytest.mark.parametrize("width", [4, 2])
def test_mean_of_narrow_activations(width: int, bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(width)
    wide = Tensor("x", (1, 8, 5, 3), np.float32(0.05), 3)
    narrow = Tensor("y", wide.shape, np.float32(0.05 * 2 ** (8 - width)), -1, width)
    first = between(bench, rng, wide, narrow)
    mean = Tensor("mean", (1, 8, 1, 1), np.float32(0.04), 2)
    pool = Node("global_average_pool", "pool", (narrow,), mean, {"low": -128, "high": 127})
    assert kernel(pool) == "dsp_global_average_pool"
    inputs = bench.random_inputs(rng, first, 1)
    made = bench.on_device((first, pool), [inputs], TARGET, tmp_path)
    codes = ops()[first.op].reference(first, *inputs)
    np.testing.assert_array_equal(made.codes[0], ops()[pool.op].reference(pool, codes))


@pytest.mark.parametrize("width", [4, 2])
def test_maximum_of_narrow_activations(width: int, bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(width)
    wide = Tensor("x", (1, 8, 5, 3), np.float32(0.05), 3)
    narrow = Tensor("y", wide.shape, np.float32(0.05 * 2 ** (8 - width)), -1, width)
    first = between(bench, rng, wide, narrow)
    window = {"kernel": (2, 2), "stride": (1, 1), "dilation": (1, 1), "pads": (1, 1, 0, 0)}
    largest = Tensor("largest", narrow.shape, narrow.scale, -1, width)
    pool = Node("max_pool", "pool", (narrow,), largest, window)
    assert kernel(pool) == "dsp_max_pool"
    last = between(bench, rng, largest, Tensor("out", wide.shape, np.float32(0.05), 0))
    inputs = bench.random_inputs(rng, first, 1)
    made = bench.on_device((first, pool, last), [inputs], TARGET, tmp_path)
    codes = inputs[0]
    for node in (first, pool, last):
        codes = ops()[node.op].reference(node, codes)
    np.testing.assert_array_equal(made.codes[0], codes)


@pytest.mark.parametrize("widths", [(4, 4, 4), (2, 2, 2), (4, 2, 8), (8, 8, 2), (2, 8, 4)])
def test_add_of_narrow_activations(widths: tuple[int, int, int], bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(sum(widths))

    def tensor(name: str, bits: int = 8) -> Tensor:
        scale = np.float32(rng.uniform(0.03, 0.06) * 2.0 ** (8 - bits))
        return Tensor(name, (1, 8, 5, 3), scale, int(rng.integers(-2, 2)), bits)

    a, b, y = (tensor(n, w) for n, w in zip("aby", widths, strict=True))
    bounds = {"low": -1 << y.bits - 1, "high": (1 << y.bits - 1) - 1}
    attributes = {"scales": (a.scale, b.scale), "zero_points": (a.zero_point, b.zero_point), **bounds}
    node = Node("add", "add", (a, b), y, {"swapped": False, "repeat": "same", **attributes})
    call = version.choose(ops(), node, targets.load(TARGET).features)
    assert call.kernel == "dsp_add_narrow"
    assert call.overlap == max(0, y.bytes - a.bytes)
    first, second = (between(bench, rng, tensor(f"in_{t.name}"), t) for t in (a, b))
    last = between(bench, rng, y, tensor("out"))
    inputs = [bench.random_inputs(rng, n, 1)[0] for n in (first, second)]
    made = bench.on_device((first, second, node, last), [inputs], TARGET, tmp_path)
    operands = [ops()[n.op].reference(n, x) for n, x in zip((first, second), inputs, strict=True)]
    total = ops()["add"].reference(node, *operands)
    assert len(np.unique(total)) > 2
    np.testing.assert_array_equal(made.codes[0], ops()[last.op].reference(last, total))
