"""Convolutions and fully connected layers with SMLAD equal the integer reference, in the emulator and as plain C on this machine."""

from __future__ import annotations

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
from planish.kernels.c import overlap, version
from planish.kernels.op import Node, ops
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


POINT = {"kernel": (1, 1), "pads": (0, 0, 0, 0)}
SHAPES = [
    Shape(8, 4),
    Shape(4, 8, kernel=(1, 3), pads=(0, 2, 0, 0)),
    Shape(16, 4, size=(8, 8), stride=2, pads=(0, 0, 1, 1)),
    Shape(4, 12, size=(9, 9), dilation=2, pads=(2, 2, 2, 2)),
    Shape(12, 4, size=(3, 3), kernel=(3, 3), pads=(0, 0, 0, 0)),  # one pixel
    Shape(4, 4, size=(2, 2), kernel=(5, 5), pads=(2, 2, 2, 2)),  # a window wider than the input
    Shape(16, 8, group=2),
    Shape(8, 16, size=(7, 7), **POINT),
    Shape(64, 4, size=(3, 5), **POINT),
    Shape(4, 20, size=(6, 6), stride=2, **POINT),
    Shape(4, 4, kernel=(1, 1), pads=(1, 0, 0, 1)),
    Shape(8, 8, group=2, size=(5, 5), **POINT),
]


def nodes(bench: Any, rng: Rng, width: int) -> Iterator[Node]:
    """A node for every shape, with weights of `width` bits; extreme weights among them."""
    for i, s in enumerate(SHAPES):
        example = bench.convolution(
            rng,
            s.channels,
            s.outputs,
            s.size,
            s.kernel,
            s.stride,
            s.dilation,
            s.pads,
            s.group,
            low=0.0 if i % 2 else -np.inf,
        )
        node = bench.node_of("conv2d", example)
        node = node if width == 8 else node_in(node, width)
        yield renamed(node, i)


def renamed(node: Node, number: int) -> Node:
    """With tensors of its own."""
    inputs = tuple(replace(t, name=f"{t.name}{number}") for t in node.inputs)
    return replace(node, name=f"n{number}", inputs=inputs, output=replace(node.output, name=f"y{number}"))


def whole_range(node: Node) -> Node:
    """Without a clamp of its own."""
    return replace(node, attributes={**node.attributes, "low": -128, "high": 127})


def side_by_side(bench: Any, found: list[Node]) -> Graph:
    """Nodes that share nothing, all of whose outputs are the graph's."""
    graphs = [bench.graph_of(n) for n in found]
    return Graph(tuple(found), tuple(g.inputs[0] for g in graphs), tuple(g.outputs[0] for g in graphs))


def check(bench: Any, found: list[Node], folder: Path, runtimes: tuple[str, ...] = ("emulator", "c")) -> None:
    """The nodes in one firmware, on random codes and on the extremes, against the reference."""
    from planish import runtimes as _  # noqa: F401
    from planish.runtimes.c import C
    from planish.runtimes.emulator import Emulator

    graph = side_by_side(bench, found)
    rng = np.random.default_rng(5)
    x = {
        n.inputs[0].name: np.concatenate(
            [bench.random_inputs(rng, n, 1)[0], *(np.full(n.inputs[0].shape, v, np.int8) for v in (-128, 127))]
        )
        for n in found
    }
    c_format.write_project(graph, "grid", targets.load(TARGET), {k: v[:1] for k, v in x.items()}, folder, [])
    artifact = Artifact(folder, {"format": "c", "target": TARGET})
    for runtime in runtimes:
        with {"emulator": Emulator, "c": C}[runtime]().open(artifact, 1) as session:
            got = session.run(x)
        for n in found:
            expected = ops()[n.op].reference(n, x[n.inputs[0].name])
            np.testing.assert_array_equal(got[n.output.name], expected, err_msg=f"{runtime}: {n.inputs} {n.attributes}")


def takes(node: Node) -> bool:
    """Whether a DSP version takes it."""
    return version.choose(ops(), node, targets.load(TARGET).features).kernel.startswith("dsp_")


def test_convolutions_equal_the_reference(bench: Any, tmp_path: Path) -> None:
    found = [whole_range(n) for n in nodes(bench, np.random.default_rng(3), 8)]
    assert all(takes(n) for n in found)
    check(bench, found, tmp_path)
