"""MVE kernels on the emulated Cortex-M55: the codes of the reference for ragged shapes, and no fall back to portable C."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.export import narrow
from planish.export.artifact import Artifact
from planish.export.graph import Graph, Port
from planish.kernels.op import Node, Tensor
from planish.targets import target as targets

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed"),
]
TARGET = "corstone-300"
INF = float("inf")


def renamed(node: Node, index: int) -> Node:
    """The node with tensors of its own, so that several nodes make one graph of separate networks."""

    def name(t: Tensor) -> Tensor:
        return replace(t, name=f"{t.name}_{index}")

    return replace(node, name=f"n{index}", inputs=tuple(map(name, node.inputs)), output=name(node.output))


def run(nodes: list[Node], folder: Path, samples: int = 3, extremes: bool = True) -> None:
    """All nodes in one firmware: every kernel is an MVE one, every code is the reference's."""
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    pytest.importorskip("elftools", reason="pyelftools is not installed (extra 'mcu')")
    from planish.export import c as c_format
    from planish.runtimes.emulator import Emulator

    nodes = [renamed(n, i) for i, n in enumerate(nodes)]

    def port(t: Tensor) -> Port:
        return Port(t.name, t.shape, "int8", t, tuple(range(len(t.shape))))

    inputs = tuple(port(t) for n in nodes for t in n.inputs)
    graph = Graph(tuple(nodes), inputs, tuple(port(n.output) for n in nodes))
    rng = np.random.default_rng(5)
    x = {p.name: rng.integers(-128, 128, (samples, *p.shape[1:])).astype(np.int8) for p in inputs}
    if extremes:
        for values in x.values():
            values[1] = np.where(rng.random(values[1].shape) < 0.5, -128, 127)
            values[2] = -128
    facts, _, _ = c_format.write_project(
        graph, "many", targets.load(TARGET), {k: v[:1] for k, v in x.items()}, folder, []
    )
    kernels = {layer["name"]: layer["kernel"] for layer in facts["layers"]}
    assert [k for k in kernels.values() if not k.startswith("mve_")] == []
    _on_the_host(folder, facts)
    with Emulator().open(Artifact(folder, {"format": "c", "target": TARGET}), 1) as session:
        got = session.run(x)
    for node in nodes:
        expected = graph.ops[node.op].reference(node, *(x[t.name] for t in node.inputs))
        wrong = np.argwhere(got[node.output.name] != expected)
        shapes = [t.shape for t in node.inputs]
        assert not len(wrong), (
            f"{node.name}: {shapes}, {dict(node.attributes)}: {len(wrong)} of {expected.size}, {wrong[:3]}"
        )


def _on_the_host(folder: Path, facts: dict[str, Any]) -> None:
    """The form without instructions gives the same codes (the project's own test), and nothing for the sanitizers to find."""
    if shutil.which("clang") is None:
        return
    flags = ["-std=c99", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I.", "-Ikernels"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [*facts["sources"], f"{facts['name']}_test.c"]
    done = subprocess.run(
        ["clang", *flags, *sources, "-o", "t"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:2000]
    done = subprocess.run(["./t"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


def convolutions(bench: Any) -> list[Node]:
    rng = np.random.default_rng(1)
    grid: list[dict[str, Any]] = [
        dict(c=16, o=16, size=(8, 8)),
        dict(c=3, o=16, size=(9, 7)),
        dict(c=3, o=8, size=(12, 12), stride=2, pads=(0, 0, 1, 1)),
        dict(c=1, o=12, size=(20, 10), kernel=(10, 4), stride=2, pads=(4, 1, 5, 1)),
        dict(c=16, o=5, size=(7, 6), low=0.0, high=6.0),
        dict(c=5, o=3, size=(9, 9), dilation=2, pads=(2, 2, 2, 2), with_bias="none"),
        dict(c=7, o=6, size=(5, 5), kernel=(5, 5), pads=(2, 2, 2, 2)),
        dict(c=1, o=1, size=(5, 6), pads=(0, 0, 0, 0), per_channel=False),
        dict(c=4, o=9, size=(6, 1), kernel=(3, 1), pads=(1, 0, 1, 0)),
        dict(c=64, o=4, size=(4, 4), pads=(3, 3, 3, 3)),
        dict(c=33, o=4, size=(5, 4), kernel=(2, 3), pads=(0, 1, 0, 1), low=0.0),
        *(
            dict(c=c, o=o, size=size, kernel=(1, 1), pads=(0, 0, 0, 0), stride=stride)
            for c, o, size, stride in (
                (8, 16, (6, 6), 1), (16, 32, (5, 5), 1), (32, 32, (4, 4), 1), (64, 64, (5, 5), 1), (128, 12, (3, 3), 1), (1, 4, (3, 5), 1),
                (3, 4, (4, 4), 1), (8, 7, (5, 5), 1), (12, 8, (7, 3), 1), (24, 8, (5, 5), 2), (16, 32, (9, 8), 2), (40, 10, (1, 1), 1),
                (17, 1, (4, 5), 1), (9, 4, (7, 7), 3), (31, 4, (2, 2), 1), (48, 20, (3, 1), 1), (256, 4, (3, 3), 1),
            )
        ),
        dict(c=7, o=4, size=(6, 5), kernel=(1, 1), pads=(1, 0, 0, 1)),
    ]  # fmt: skip
    return [bench.node_of("conv2d", bench.convolution(rng, **g)) for g in grid]


@pytest.mark.parametrize("width", [8, 4, 2])
def test_conv2d(width: int, bench: Any, tmp_path: Path) -> None:
    nodes = convolutions(bench)
    run([n if width == 8 else narrow.node_in(n, width) for n in nodes], tmp_path)


def depthwise(bench: Any) -> list[Node]:
    rng = np.random.default_rng(2)
    grid: list[dict[str, Any]] = [
        dict(c=16, size=(8, 8)),
        dict(c=8, size=(9, 7), low=0.0, high=6.0),
        dict(c=40, size=(7, 5)),
        dict(c=64, size=(25, 5)),
        dict(c=3, size=(2, 2), pads=(1, 1, 1, 1)),
        dict(c=17, size=(6, 12), low=0.0),
        dict(c=4, size=(3, 3)),
        dict(c=2, size=(5, 4), pads=(0, 0, 0, 0)),
        dict(c=5, size=(4, 40), pads=(2, 2, 2, 2)),
        dict(c=6, size=(6, 6), kernel=(2, 2), pads=(0, 0, 1, 1)),
        dict(c=6, size=(6, 7), kernel=(3, 1), pads=(1, 0, 1, 0)),
        dict(c=6, size=(6, 7), kernel=(1, 3), pads=(0, 1, 0, 1)),
        dict(c=16, size=(8, 8), stride=2, pads=(0, 0, 1, 1)),
        dict(c=7, size=(9, 11), stride=2),
        dict(c=24, size=(6, 3), stride=2, low=0.0, high=3.0),
        dict(c=20, size=(9, 9), stride=3),
        dict(c=8, size=(1, 9)),
        dict(c=8, size=(9, 1)),
        dict(c=8, size=(7, 6), kernel=(4, 4), pads=(1, 2, 2, 1)),
        dict(c=9, size=(12, 8), kernel=(4, 2), stride=2, pads=(3, 1, 3, 1)),
    ]
    return [bench.node_of("depthwise_conv2d", bench.convolution(rng, o=g["c"], group=g["c"], **g)) for g in grid]


@pytest.mark.parametrize("width", [8, 4])
def test_depthwise_conv2d(width: int, bench: Any, tmp_path: Path) -> None:
    nodes = depthwise(bench)
    run([n if width == 8 else narrow.node_in(n, width) for n in nodes], tmp_path)


def linear(bench: Any) -> list[Node]:
    rng = np.random.default_rng(3)
    shapes = [
        (64, 10, ()),
        (33, 7, ()),
        (1, 1, ()),
        (640, 8, ()),
        (16, 6, (5,)),
        (8, 128, ()),
        (128, 12, (2,)),
        (15, 4, ()),
        (300, 3, (7,)),
    ]
    nodes = [bench.node_of("fully_connected", bench.linear(rng, k, n, rows)) for k, n, rows in shapes]
    return [
        *nodes,
        replace(nodes[0], attributes={"low": -50, "high": 90}),
        replace(nodes[5], attributes={"low": 3, "high": 127}),
    ]


@pytest.mark.parametrize("width", [8, 4, 2])
def test_fully_connected(width: int, bench: Any, tmp_path: Path) -> None:
    nodes = linear(bench)
    run([n if width == 8 else narrow.node_in(n, width) for n in nodes], tmp_path)


def test_add(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    nodes: list[Node] = []
    for shape, small, low, high in (
        ((1, 5, 9, 7), None, -INF, INF),
        ((1, 16, 4, 4), None, 0.0, INF),
        ((1, 5, 3, 7), None, 0.0, 1.0),
        ((1, 7, 5, 3), (1, 7, 1, 1), -INF, INF),
        ((1, 41), None, -INF, INF),
        ((1, 3), None, -INF, INF),
    ):
        a, b = (
            Tensor(n, s, np.float32(rng.uniform(0.01, 0.03)), int(rng.integers(-128, 128)))
            for n, s in (("a", shape), ("b", small or shape))
        )
        y = Tensor("y", shape, np.float32(0.0275), int(rng.integers(-40, 40)))
        nodes.append(bench.node_of("add", bench.made("Add", (a, b), y, {}, low, high)))
    run(nodes, tmp_path)


def test_other_ops(bench: Any, tmp_path: Path) -> None:
    names = ("max_pool", "global_average_pool", "mul")
    nodes = [bench.node_of(name, example) for name in names for example in bench.examples(name)]

    def single(node: Node) -> bool:
        """A product with one value: the version before takes it."""
        return node.op == "mul" and (node.constants["operand"].size if node.constants else node.inputs[1].size) == 1

    run([n for n in nodes if not single(n)], tmp_path)


def test_outputs_over_inputs(bench: Any, tmp_path: Path) -> None:
    """A chain in an arena that is too small for any layer's input and output beside each other."""
    rng = np.random.default_rng(6)
    layers: list[tuple[str, dict[str, Any]]] = [
        ("conv2d", dict(c=3, o=8, size=(24, 22), stride=2, pads=(1, 1, 1, 1))),
        ("depthwise_conv2d", dict(c=8, o=8, size=(12, 11), group=8)),
        ("conv2d", dict(c=8, o=16, size=(12, 11), kernel=(1, 1), pads=(0, 0, 0, 0))),
        ("conv2d", dict(c=16, o=16, size=(12, 11))),
        ("depthwise_conv2d", dict(c=16, o=16, size=(12, 11), group=16)),
        ("conv2d", dict(c=16, o=36, size=(12, 11), kernel=(1, 1), pads=(0, 0, 0, 0))),
        ("depthwise_conv2d", dict(c=36, o=36, size=(12, 11), group=36, pads=(0, 0, 2, 2))),
        ("conv2d", dict(c=36, o=18, size=(12, 11), kernel=(1, 1), pads=(0, 0, 0, 0))),
        ("conv2d", dict(c=18, o=24, size=(12, 11), kernel=(1, 1), pads=(0, 0, 0, 0))),
        ("depthwise_conv2d", dict(c=24, o=24, size=(12, 11), group=24, stride=2)),
        ("conv2d", dict(c=24, o=48, size=(6, 6), kernel=(1, 1), pads=(0, 0, 0, 0))),
        ("conv2d", dict(c=48, o=20, size=(6, 6), kernel=(1, 1), pads=(0, 0, 0, 0))),
    ]
    nodes: list[Node] = []
    for index, (op, shape) in enumerate(layers):
        node = bench.node_of(op, bench.convolution(rng, **shape))
        x = nodes[-1].output if nodes else node.inputs[0]
        output = replace(node.output, name=f"t{index}", scale=np.float32(0.05), zero_point=int(rng.integers(-20, 20)))
        # sums spread over the codes, whatever the layer before gave
        factor = np.full_like(node.constants["rescale"], 1.2 / np.sqrt(node.constants["weight"][0].size) / 75)
        nodes.append(
            replace(node, name=f"n{index}", inputs=(x,), output=output, constants={**node.constants, "rescale": factor})
        )
    samples = [[rng.integers(-128, 128, nodes[0].inputs[0].shape).astype(np.int8)] for _ in range(2)]
    found = bench.on_device(tuple(nodes), samples, TARGET, tmp_path)
    beside = max(n.inputs[0].size + n.output.size for n in nodes)
    assert found.arena_bytes < 0.8 * beside
    for sample, codes in zip(samples, found.codes, strict=True):
        expected = sample[0]
        for node in nodes:
            expected = bench.op(node.op).reference(node, expected)
        assert len(np.unique(expected)) > 20
        np.testing.assert_array_equal(codes, expected)
