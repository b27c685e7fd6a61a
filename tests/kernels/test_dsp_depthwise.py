"""Depthwise convolution with SMLAD equals the reference: every kernel, stride, padding and width that it takes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.export.narrow import node_in
from planish.kernels.c import version
from planish.kernels.op import Node, ops
from planish.targets import target as targets

TARGET = "stm32f446"
KERNEL = "dsp_depthwise_conv2d"
NONE = (0, 0, 0, 0)
SHAPES: list[dict[str, Any]] = [
    {"c": 8, "size": (9, 8)},
    {"c": 4, "size": (25, 5)},  # turned: its columns are longer
    {"c": 12, "size": (6, 6), "pads": NONE},
    {"c": 4, "size": (3, 3)},
    {"c": 4, "size": (4, 1)},
    {"c": 4, "size": (5, 5), "pads": (2, 0, 0, 2)},
    {"c": 4, "size": (5, 6), "pads": (0, 2, 2, 0)},
    {"c": 4, "size": (5, 6), "pads": (3, 3, 3, 3)},  # windows that hold nothing but padding
    {"c": 7, "size": (7, 6)},
    {"c": 2, "size": (7, 9)},
    {"c": 8, "size": (9, 9), "stride": 2},
    {"c": 4, "size": (8, 8), "stride": 2, "pads": (0, 0, 1, 1)},
    {"c": 5, "size": (8, 7), "stride": 2},
    {"c": 4, "size": (9, 9), "kernel": (5, 5), "pads": (2, 2, 2, 2)},
    {"c": 4, "size": (10, 9), "kernel": (5, 5), "pads": (2, 2, 2, 2), "stride": 2},
    {"c": 4, "size": (12, 6), "kernel": (10, 4), "pads": (4, 1, 5, 2)},
    {"c": 6, "size": (12, 1), "kernel": (3, 1), "pads": (1, 0, 1, 0)},
    {"c": 4, "size": (1, 13), "kernel": (1, 2), "pads": NONE},
    {"c": 4, "size": (5, 6), "kernel": (1, 1), "pads": NONE},
    {"c": 4, "size": (4, 70)},  # a work row that is longer than the usual ones
]


def nodes(bench: Any, bits: int) -> list[Node]:
    """A node for every shape, with the extreme weights of `bits`; every third below a Relu6, every third of whole range."""
    rng = np.random.default_rng(7)
    found: list[Node] = []
    for i, shape in enumerate(SHAPES):
        c = shape["c"]
        arguments = {k: v for k, v in shape.items() if k not in ("c", "size")}
        bounds = {"low": 0.0, "high": 6.0} if i % 3 == 0 else {}
        node = bench.node_of(
            "depthwise_conv2d", bench.convolution(rng, c, c, shape["size"], group=c, **arguments, **bounds)
        )
        if i % 3 == 1:
            node = replace(node, attributes={**node.attributes, "low": -128, "high": 127})
        if bits < 8:
            node = node_in(node, bits)
        weight = node.constants["weight"].copy()
        weight.reshape(-1)[:2] = -(1 << bits - 1), (1 << bits - 1) - 1
        found.append(replace(node, constants={**node.constants, "weight": weight}))
    return found


def kernel(node: Node) -> str:
    """Which kernel the target's cores run."""
    return version.choose(ops(), node, targets.load(TARGET).features).kernel


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_equals_the_reference(bits: int, bench: Any, tmp_path: Path) -> None:
    found = nodes(bench, bits) if bits == 8 else nodes(bench, bits)[::3]  # widths differ in unpacking only
    assert {kernel(n) for n in found} == {KERNEL}
    bench.equal_reference(found, TARGET, tmp_path)


@pytest.mark.parametrize("stride", [(1, 2), (2, 1), (3, 1), (3, 2)])
def test_strides_that_differ(stride: tuple[int, int], bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    node = bench.node_of("depthwise_conv2d", bench.convolution(rng, 4, 4, (13, 9), group=4))
    size = tuple((s + 2 - 3) // step + 1 for s, step in zip((13, 9), stride, strict=True))
    output = replace(node.output, shape=(1, 4, *size))
    made = replace(node, output=output, attributes={**node.attributes, "stride": stride})
    assert kernel(made) == KERNEL
    bench.equal_reference([made], TARGET, tmp_path)


def test_clamps_from_zero_on(bench: Any, tmp_path: Path) -> None:
    """Codes from 0 to 127, which have an instruction of their own."""
    found = [replace(n, attributes={**n.attributes, "low": 0, "high": 127}) for n in nodes(bench, 8)[:2]]
    bench.equal_reference(found, TARGET, tmp_path)


def test_other_nodes_run_portable(bench: Any) -> None:
    rng = np.random.default_rng(1)
    for other in (
        bench.convolution(rng, 4, 8, (6, 6), group=4),  # multiplier 2
        bench.convolution(rng, 4, 4, (9, 9), group=4, dilation=2),
        bench.convolution(rng, 4, 4, (6, 6), group=4, unsigned=True, per_channel=False),  # weight zero points
        bench.convolution(rng, 4, 4, (9, 9), group=4, stride=3),
    ):
        assert kernel(bench.node_of("depthwise_conv2d", other)) == "depthwise_conv2d"


def test_output_lies_in_the_place_of_the_input(bench: Any, tmp_path: Path) -> None:
    """Stride 1: no memory but the work rows. Stride 2: a row of outputs more than the input."""
    rng = np.random.default_rng(1)
    for stride in (1, 2):
        node = bench.node_of("depthwise_conv2d", bench.convolution(rng, 8, 8, (24, 24), group=8, stride=stride))
        inputs = bench.random_inputs(rng, node, 1)
        call = version.choose(ops(), node, targets.load(TARGET).features)
        assert call.in_place == (0,) if stride == 1 else call.overlap == 12 * 8
        made = bench.on_device(node, [inputs], TARGET, tmp_path / str(stride))
        np.testing.assert_array_equal(made.codes[0], ops()[node.op].reference(node, *inputs))
        assert made.arena_bytes <= 24 * 24 * 8 + call.scratch + (0 if stride == 1 else 12 * 8)


def chain(bench: Any, widths: tuple[int, ...], stride: int) -> list[Node]:
    """Layers whose activations have these widths, the first one's input included; the second layer has the stride."""
    rng = np.random.default_rng(9)
    found: list[Node] = []
    size = (9, 10)
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        step = stride if i == 1 else 1
        node = bench.node_of("depthwise_conv2d", bench.convolution(rng, 8, 8, size, group=8, stride=step))
        x = replace(
            node.inputs[0], name=f"x{i}", bits=before, zero_point=int(rng.integers(-1 << before - 1, 1 << before - 1))
        )
        if found:
            x = found[-1].output
        least, most = -(1 << after - 1), (1 << after - 1) - 1
        zero_point = int(rng.integers(least // 2, 1))
        scale = node.constants["rescale"] * np.float32(2.0 ** (after - before))
        y = replace(node.output, name=f"x{i + 1}", bits=after, zero_point=zero_point)
        low = (least, 0, zero_point)[i % 3]
        found.append(
            replace(
                node,
                name=f"n{i}",
                inputs=(x,),
                output=y,
                attributes={**node.attributes, "low": low, "high": most},
                constants={**node.constants, "rescale": scale},
            )
        )
        size = y.shape[2:]
    return found


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [4, 2])
def test_narrow_activations(width: int, stride: int, bench: Any, tmp_path: Path) -> None:
    nodes = chain(bench, (8, width, width, width, 8), stride)
    assert {kernel(n) for n in nodes} == {KERNEL}
    samples = [bench.random_inputs(np.random.default_rng(s), nodes[0], 1) for s in range(2)]
    made = bench.on_device(tuple(nodes), samples, TARGET, tmp_path)
    for got, (codes,) in zip(made.codes, samples, strict=True):
        for n in nodes:
            codes = ops()[n.op].reference(n, codes)  # noqa: PLW2901
            assert len(np.unique(codes)) > 1
        np.testing.assert_array_equal(got, codes)
