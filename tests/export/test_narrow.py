"""Weights rounded again to 4 and 2 bits: their range, their error, and what stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from planish.export import narrow, qdq
from planish.kernels.op import Unsupported


@pytest.mark.parametrize("width", [4, 2])
def test_codes_fit_and_outputs_stay_near(tiny: Any, width: int) -> None:
    model, x = tiny("residual")
    graph = qdq.read(model)
    narrowed = narrow.narrow(graph, width)
    assert {narrow.bits(n) for n in narrowed.nodes if n.op in narrow.OPS} <= {2, width}
    for before, after in zip(graph.nodes, narrowed.nodes, strict=True):
        if before.op not in narrow.OPS:
            assert after is before
            continue
        step = after.constants["rescale"] / before.constants["rescale"]  # (out,)
        shape = (-1, *[1] * (before.constants["weight"].ndim - 1))
        error = after.constants["weight"] * step.reshape(shape) - before.constants["weight"]
        assert np.abs(error).max() <= 1.01 * np.abs(before.constants["weight"]).max()
        share = np.square(error).sum() / np.square(before.constants["weight"].astype(float)).sum()
        assert share < {4: 0.02, 2: 0.4}[width]
    want, got = (next(iter(g.reference({"x": x}).values())).astype(float) for g in (graph, narrowed))
    assert np.square(got - want).sum() < {4: 0.2, 2: 2.0}[width] * np.square(want).sum()


def test_only_the_named_layers(tiny: Any) -> None:
    graph = qdq.read(tiny("residual")[0])
    name = next(n.name for n in graph.nodes if n.op in narrow.OPS)
    narrowed = narrow.narrow(graph, 4, [name])
    changed = [a.name for a, b in zip(narrowed.nodes, graph.nodes, strict=True) if a is not b]
    assert changed == [name]


def test_dead_channels_keep_their_bias(tiny: Any) -> None:
    """A channel of zeros has nothing to gain: its bias, which may be as large as int32 allows, stays."""
    graph = qdq.read(tiny("residual")[0])
    node = next(n for n in graph.nodes if n.op in narrow.OPS)
    weight, bias = node.constants["weight"].copy(), node.constants["bias"].copy()
    weight[0], bias[0] = 0, 2**31 - 10**6
    made = narrow.node_in(
        type(node)(**{**vars(node), "constants": {**node.constants, "weight": weight, "bias": bias}}), 2
    )
    assert made.constants["bias"][0] == bias[0]
    assert not made.constants["weight"][0].any()


def test_weights_with_zero_points_are_refused(tiny: Any) -> None:
    graph = qdq.read(tiny("residual")[0])
    node = next(n for n in graph.nodes if n.op in narrow.OPS)
    zero = np.ones_like(node.constants["weight_zero_point"])
    shifted = type(node)(**{**vars(node), "constants": {**node.constants, "weight_zero_point": zero}})
    assert narrow.bits(shifted) == 8
    with pytest.raises(Unsupported, match="zero points"):
        narrow.node_in(shifted, 4)
