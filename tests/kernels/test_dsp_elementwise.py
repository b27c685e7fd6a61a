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
        assert dsp_add.search(node) is not None


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
