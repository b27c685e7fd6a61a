"""The matrix product with SMLAD equals the reference for every way in which its operands may lie, in the emulator and as plain C here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.export.graph import Graph, Port
from planish.export.views import fold_moves
from planish.kernels.c import version
from planish.kernels.op import FloatOp, Node, Tensor, ops
from planish.targets import target as targets

TARGET = "stm32f446"


def product(a: tuple[int, ...], b: tuple[int, ...], seed: int, low: float = -np.inf) -> Node:
    rng = np.random.default_rng(seed)
    left, right = (
        Tensor(n, s, np.float32(rng.uniform(0.01, 0.1)), int(rng.integers(-128, 128))) for n, s in (("a", a), ("b", b))
    )
    spread = float(left.scale * right.scale) * 75 * 75 * np.sqrt(a[-1]) / 60
    y = Tensor("y", (*a[:-1], b[-1]), np.float32(spread * rng.uniform(0.5, 2)), int(rng.integers(-60, 60)))
    node = ops()["matmul"].parse(FloatOp("MatMul", "product", {}, (left, right), y, low, np.inf))
    assert node is not None
    return node


def heads(tokens: int, count: int, size: int, seed: int) -> tuple[Node, Node]:
    """Scores and mix of attention on (1, tokens, count * size) tensors as `export/views.py` leaves them."""
    rng = np.random.default_rng(seed)
    width = (1, tokens, count * size)

    def tensor(name: str, *shape: int) -> Tensor:
        return Tensor(name, shape, np.float32(rng.uniform(0.02, 0.05)), int(rng.integers(-128, 128)))

    q, k, v = (tensor(n, *width) for n in "qkv")
    nodes: list[Node] = []

    def run(kind: str, inputs: tuple[Any, ...], output: Tensor, **attributes: Any) -> Tensor:
        op = {"Reshape": "reshape", "Transpose": "transpose", "MatMul": "matmul"}[kind]
        node = ops()[op].parse(FloatOp(kind, output.name, attributes, inputs, output, -np.inf, np.inf))
        assert node is not None
        nodes.append(node)
        return output

    def like(x: Tensor, name: str, *shape: int) -> Tensor:
        return replace(x, name=name, shape=shape)

    def split(x: Tensor, perm: list[int], *shape: int) -> Tensor:
        parted = run("Reshape", (x,), like(x, f"{x.name}_parted", 1, tokens, count, size))
        return run("Transpose", (parted,), like(x, f"{x.name}_turned", 1, *shape), perm=perm)

    left, right = split(q, [0, 2, 1, 3], count, tokens, size), split(k, [0, 2, 3, 1], count, size, tokens)
    scores = run("MatMul", (left, right), tensor("scores", 1, count, tokens, tokens))
    flat = run("Reshape", (scores,), like(scores, "flat", 1, count * tokens, tokens))
    back = run("Reshape", (flat,), like(scores, "back", 1, count, tokens, tokens))
    mixed = run("MatMul", (back, split(v, [0, 2, 1, 3], count, tokens, size)), tensor("mixed", 1, count, tokens, size))
    turned = run("Transpose", (mixed,), like(mixed, "turned", 1, tokens, count, size), perm=[0, 2, 1, 3])
    joined = run("Reshape", (turned,), like(mixed, "joined", *width))

    def port(t: Tensor) -> Port:
        return Port(t.name, t.shape, "int8", t, tuple(range(len(t.shape))))

    graph = fold_moves(Graph(tuple(nodes), tuple(port(t) for t in (q, k, v)), (port(flat), port(joined))))
    first, second = (n for n in graph.nodes if n.op == "matmul")
    return first, second


SHAPES = [
    ((1, 5, 7), (1, 7, 6)),
    ((1, 4, 8), (1, 8, 8)),
    ((1, 8, 4), (1, 4, 5)),
    ((1, 1, 1), (1, 1, 1)),
    ((1, 3, 33), (1, 33, 9)),
    ((1, 6, 130), (1, 130, 12)),  # columns in several turns
    ((1, 4, 6, 16), (1, 4, 16, 6)),  # heads innermost
    ((1, 2, 5, 8), (1, 1, 8, 4)),  # one matrix for all
    ((1, 2, 3, 4, 5), (1, 2, 3, 5, 2)),
]
HEADS = [(16, 4, 16), (9, 2, 8), (7, 3, 5), (32, 4, 12), (1, 2, 4)]


def test_every_shape(bench: Any, tmp_path: Path) -> None:
    nodes = [product(a, b, i) for i, (a, b) in enumerate(SHAPES)] + [product((1, 4, 8), (1, 8, 8), 50, 0.0)]
    features = targets.load(TARGET).features
    assert {version.choose(ops(), n, features).kernel for n in nodes} == {"dsp_matmul"}
    bench.equal_reference(nodes, TARGET, tmp_path)


@pytest.mark.parametrize("target", [TARGET, "rp2040"])
def test_attention(target: str, bench: Any, tmp_path: Path) -> None:
    """Operands and results that lie in the tensors of all heads."""
    nodes = [n for i, h in enumerate(HEADS) for n in heads(*h, seed=i)]
    assert all(n.inputs[1].name in "kv" for n in nodes)
    bench.equal_reference(nodes, target, tmp_path, ("emulator",))


def test_it_is_fast(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for node in heads(32, 4, 16, 1):
        samples = [[rng.integers(-128, 128, t.shape).astype(np.int8) for t in node.inputs]]
        done = bench.on_device(node, samples, TARGET, tmp_path / node.name)
        np.testing.assert_array_equal(done.codes[0], ops()["matmul"].reference(node, *samples[0]))
        assert done.instructions < 2.7 * ops()["matmul"].macs(node)
