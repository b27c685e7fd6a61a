"""Convolutions and fully connected layers with SMLAD equal the integer reference, in the emulator and as plain C on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.export import c as c_format
from planish.export.artifact import Artifact
from planish.export.graph import Graph
from planish.export.narrow import node_in
from planish.kernels.c import version
from planish.kernels.op import Call, Node, Tensor, ops
from planish.runtimes.c import C
from planish.targets import target as targets

TARGET = "stm32f446"
Rng = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """A convolution."""

    channels: int
    outputs: int
    size: tuple[int, int] = (6, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    group: int = 1


POINT: dict[str, Any] = {"kernel": (1, 1), "pads": (0, 0, 0, 0)}
SHAPES = [
    # whole words of channels
    Shape(8, 4),
    Shape(4, 8, kernel=(1, 3), pads=(0, 2, 0, 0)),
    Shape(16, 4, size=(8, 8), stride=2, pads=(0, 0, 1, 1)),
    Shape(4, 12, size=(9, 9), dilation=2, pads=(2, 2, 2, 2)),
    Shape(12, 4, size=(3, 3), kernel=(3, 3), pads=(0, 0, 0, 0)),  # one pixel
    Shape(4, 4, size=(2, 2), kernel=(5, 5), pads=(2, 2, 2, 2)),  # a window wider than the input
    Shape(16, 8, group=2),
    Shape(8, 6, group=2),
    Shape(8, 16, size=(7, 7), **POINT),
    Shape(64, 5, size=(3, 5), **POINT),
    Shape(4, 20, size=(6, 6), stride=2, **POINT),
    Shape(4, 4, kernel=(1, 1), pads=(1, 0, 0, 1)),
    Shape(8, 8, group=2, size=(5, 5), **POINT),
    # others
    Shape(3, 8, size=(9, 8), stride=2, pads=(0, 0, 1, 1)),
    Shape(1, 4, size=(13, 6), kernel=(10, 4), stride=2, pads=(4, 1, 5, 1)),
    Shape(3, 7, size=(7, 9), dilation=2, pads=(2, 2, 2, 2)),
    Shape(1, 1, size=(5, 5), kernel=(5, 5), pads=(2, 2, 2, 2)),
    Shape(2, 3, size=(5, 4), kernel=(2, 1), pads=(0, 0, 1, 0)),
    Shape(9, 12, size=(5, 5), **POINT),
    Shape(6, 4, size=(4, 5), kernel=(3, 1), dilation=2, pads=(2, 0, 2, 0)),
]
LINEAR = [(64, 12, ()), (33, 7, ()), (1, 1, ()), (8, 128, ()), (300, 4, ()), (16, 8, (5,)), (20, 6, (4,)), (7, 8, (3,))]
"""inputs, outputs, rows"""


def nodes(bench: Any, width: int) -> Iterator[Node]:
    """A node for every shape, with weights of `width` bits."""
    rng = np.random.default_rng(width)
    low = itertools.cycle((-np.inf, 0.0))
    made = [
        bench.node_of("conv2d", bench.convolution(rng, s.channels, s.outputs, s.size, s.kernel, s.stride, s.dilation, s.pads, s.group, low=next(low)))
        for s in SHAPES
    ]  # fmt: skip
    made += [bench.node_of("fully_connected", bench.linear(rng, k, n, rows)) for k, n, rows in LINEAR]
    for i, node in enumerate(made):
        narrow = node if width == 8 else node_in(node, width)
        yield renamed(narrow, i)


def renamed(node: Node, number: int) -> Node:
    """With tensors of its own."""
    inputs = tuple(replace(t, name=f"{t.name}{number}") for t in node.inputs)
    return replace(node, name=f"n{number}", inputs=inputs, output=replace(node.output, name=f"y{number}"))


def call(node: Node) -> Call:
    """What the target runs; a DSP version it must be."""
    found = version.choose(ops(), node, targets.load(TARGET).features)
    assert found.kernel.startswith("dsp_"), node
    return found


def side_by_side(bench: Any, found: list[tuple[Node, ...]]) -> Graph:
    """Chains of nodes that share nothing; the graph's outputs are the last ones'."""
    graphs = [bench.graph_of(*chain) for chain in found]
    return Graph(
        tuple(n for chain in found for n in chain),
        tuple(g.inputs[0] for g in graphs),
        tuple(g.outputs[0] for g in graphs),
    )


def check(bench: Any, found: list[tuple[Node, ...]], folder: Path) -> None:
    """The chains in one firmware, on random codes and on the extremes, against the reference."""
    from planish.runtimes.emulator import Emulator

    for node in itertools.chain(*found):
        call(node)
    rng = np.random.default_rng(5)
    x = {
        c[0].inputs[0].name: np.concatenate(
            [bench.random_inputs(rng, c[0], 1)[0], *(np.full(c[0].inputs[0].shape, v, np.int8) for v in (-128, 127))]
        )
        for c in found
    }
    graph = side_by_side(bench, found)
    c_format.write_project(graph, "grid", targets.load(TARGET), {k: v[:1] for k, v in x.items()}, folder, [])
    artifact = Artifact(folder, {"format": "c", "target": TARGET})
    for runtime in (Emulator(), C()):
        with runtime.open(artifact, 1) as session:
            got = session.run(x)
        for chain in found:
            expected = x[chain[0].inputs[0].name]
            for node in chain:
                expected = ops()[node.op].reference(node, expected)
            what = [(n.op, n.inputs[0].shape, n.output.shape, dict(n.attributes)) for n in chain]
            np.testing.assert_array_equal(got[chain[-1].output.name], expected, err_msg=f"{type(runtime)}: {what}")


@pytest.mark.parametrize("width", [8, 4, 2])
def test_all_shapes_equal_the_reference(width: int, bench: Any, tmp_path: Path) -> None:
    found = list(nodes(bench, width))
    for node in found:
        assert f"_{width}" in call(node).sources[-1]
    check(bench, [(n,) for n in found], tmp_path)


@pytest.mark.parametrize("width", [8, 4, 2])
def test_sums_of_any_size_equal_the_reference(width: int, bench: Any, tmp_path: Path) -> None:
    """Weights, biases or factors beyond what the quick forms hold; among 8-bit weights also -128 beside a negative one."""
    found: list[Node] = []
    for i, node in enumerate(itertools.islice(nodes(bench, width), 0, None, 2)):
        weight, rescale = node.constants["weight"], node.constants["rescale"]
        changed = (
            {"rescale": rescale * np.float32(1e6)},
            {"bias": node.constants["bias"] + 9_000_000, "rescale": np.full_like(rescale, 1e-5)},
            {"weight": np.where(weight > 0, weight, -128).astype(np.int8)},
        )
        constants = changed[i % 3 if width == 8 else 0]
        found.append(renamed(replace(node, constants={**node.constants, **constants}), i))
    far = [n for n in found if call(n).defines["FAR"]]
    assert len(far) > len(found) // 2
    stored = 8 if width == 8 else 4
    assert all(call(n).defines["WEIGHT_BITS"] == stored for n in far)
    check(bench, [(n,) for n in found], tmp_path)


def test_many_inputs_keep_4_bits(bench: Any, tmp_path: Path) -> None:
    """Sums that 16 bits a number would not hold."""
    rng = np.random.default_rng(1)
    made = [
        bench.node_of("fully_connected", bench.linear(rng, 3000, 4)),
        bench.node_of("conv2d", bench.convolution(rng, 2400, 8, (2, 1), **POINT)),
    ]
    found = [renamed(node_in(n, 4), i) for i, n in enumerate(made)]
    assert [(call(n).defines["WEIGHT_BITS"], call(n).defines["FAR"]) for n in found] == [(4, 1)] * 2
    check(bench, [(n,) for n in found], tmp_path)


def test_dead_channels_do_not_make_a_layer_far(bench: Any) -> None:
    node = next(nodes(bench, 8))
    bias = node.constants["bias"].copy()
    bias[1] = -(1 << 30)
    dead = replace(node, constants={**node.constants, "bias": bias})
    assert not call(dead).defines["FAR"]
    x = bench.random_inputs(np.random.default_rng(0), dead, 1)
    assert len(np.unique(ops()["conv2d"].reference(dead, *x)[:, 1])) == 1


def test_outputs_may_lie_over_inputs(bench: Any, tmp_path: Path) -> None:
    """Every shape behind a layer that makes its input, which the planner then lets it overwrite as far as its overlap allows."""
    rng = np.random.default_rng(7)
    found: list[tuple[Node, ...]] = []
    for i, second in enumerate(nodes(bench, 8)):
        if second.op == "conv2d":
            _, channels, *size = second.inputs[0].shape
            first = bench.node_of("conv2d", bench.convolution(rng, 5, channels, tuple(size), **POINT))
            found.append(joined(first, second, 8, 8, i))
    assert all(call(c[1]).overlap is not None for c in found if c[1].attributes["groups"] == 1)
    check(bench, found, tmp_path)


@pytest.mark.parametrize(("bits", "width"), [(4, 8), (4, 4), (2, 8), (2, 2)])
def test_narrow_activations_equal_the_reference(bits: int, width: int, bench: Any, tmp_path: Path) -> None:
    """A layer whose output is packed, and a layer that reads it."""
    rng = np.random.default_rng(bits)
    shapes = [
        (Shape(8, 16), Shape(16, 4)),
        (Shape(4, 32, size=(5, 5)), Shape(32, 7, size=(5, 5), **POINT)),
        (Shape(3, 16, size=(7, 7), stride=2), Shape(16, 8, size=(4, 4), stride=2, pads=(0, 1, 1, 0))),
        (Shape(8, 32, size=(4, 4), **POINT), Shape(32, 8, size=(4, 4), group=2)),
    ]
    found: list[tuple[Node, ...]] = []
    for i, pair in enumerate(shapes):
        first, second = (
            bench.node_of("conv2d", bench.convolution(rng, s.channels, s.outputs, s.size, s.kernel, s.stride, s.dilation, s.pads, s.group))
            for s in pair
        )  # fmt: skip
        found.append(joined(first, second, bits, width, i))
    for k, n, last in ((16, 16, 5), (24, 7, 4)):
        first, second = (bench.node_of("fully_connected", bench.linear(rng, *s)) for s in ((k, n), (n, last)))
        found.append(joined(first, second, bits, width, k))
    rows = (bench.node_of("fully_connected", bench.linear(rng, *s)) for s in ((8, 16, (3,)), (16, 4, (3,))))
    found.append(joined(*rows, bits, width, 99))
    check(bench, found, tmp_path)


def joined(first: Node, second: Node, bits: int, width: int, number: int) -> tuple[Node, Node]:
    """Both nodes with a tensor of `bits` between them, the second's weights in `width` bits."""
    half = 1 << bits - 1
    between = Tensor(f"between{number}", first.output.shape, first.output.scale * np.float32(64 / half), -1, bits)
    factor = np.float32(half / 64)
    first = replace(
        renamed(first, number),
        output=between,
        attributes={**first.attributes, "low": -half, "high": half - 1},
        constants={**first.constants, "rescale": first.constants["rescale"] * factor},
    )
    second = replace(renamed(second, number), name=f"second{number}", inputs=(between,))
    return first, second if width == 8 else node_in(second, width)
