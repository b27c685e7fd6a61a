"""MambaQuant: the figures of its method card, exact folds, states that may be carried, and the order of the methods."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import layers, mamba, mamba_graph
from planish.compress.data import Data
from planish.compress.model import Model, trace
from planish.compress.passes import Context
from planish.compress.quantize.mamba_rotations import MambaRotations, klt, klt_hadamard
from planish.compress.quantize.mambaquant import MambaQuant
from planish.export.lowering import to_onnx
from planish.kernels.hadamard import hadamard_matrix
from planish.targets import target as targets
from torch import nn
from torch.nn import functional as F

WIDTH, CHANNELS, STATES, RANK = 24, 48, 4, 4  # Hadamard matrices of order 24 and 48 come from a base of 12


# --- the method card: 256 correlated channels, 5 of them 20 times larger


def activations() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    n = 256
    x = torch.randn(4096, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)
    x[:, torch.randperm(n, generator=g)[:5]] *= 20
    return x - x.mean(0)


def spread(x: torch.Tensor) -> float:
    """Largest over smallest channel variance."""
    variance = x.var(0)
    return float(variance.max() / variance.min())


def peak(x: torch.Tensor) -> float:
    """Largest channel maximum over the median one."""
    each = x.abs().amax(0)
    return float(each.max() / each.median())


def test_klt_times_hadamard_equalizes_channels_and_no_other_product_does() -> None:
    """METHODS A6 (c): ratio of channel variances 568, 1.61, 1.53, 7.5e8, 1.000 and 19.6; largest over median peak 21.8, 1.29 and 1.24."""
    x = activations()
    second = x.T @ x
    g = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (256, 1), generator=g).double() * 2 - 1
    plain = hadamard_matrix(256)
    h, k = signs * plain, klt(second)
    kh = klt_hadamard(second, h)
    assert (kh @ kh.T - torch.eye(256)).abs().max() < 1e-12
    assert 500 < spread(x) < 650
    assert 1.3 < spread(x @ plain) < 2.2
    assert 1.3 < spread(x @ h) < 2.2
    assert spread(x @ k) > 1e7, "without H it is worse than nothing"
    assert spread(x @ kh) <= 1.001
    assert 15 < spread(x @ (h @ k)) < 30, "the wrong order loses the property"
    assert 20 < peak(x) < 28
    assert 1.2 < peak(x @ h) < 1.45
    assert 1.1 < peak(x @ kh) < peak(x @ h)


def test_klt_on_held_out_rows_is_close_but_not_equal() -> None:
    x = activations()
    kh = klt_hadamard(x[:2048].T @ x[:2048], hadamard_matrix(256))
    assert 1.001 < spread(x[2048:] @ kh) < spread(x[2048:] @ hadamard_matrix(256)) * 1.2


def test_swisilu_is_silu_of_the_scaled_gate() -> None:
    g = torch.Generator().manual_seed(0)
    z, s = torch.randn(1000, 64, generator=g, dtype=torch.float64) * 5, torch.rand(64, generator=g).double() * 10 + 0.01
    u = z / s
    assert (u * torch.sigmoid(s * u) - F.silu(z) / s).abs().max() <= 1e-12


# --- a Mamba of plain PyTorch


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * CHANNELS)
        self.conv1d = nn.Conv1d(CHANNELS, CHANNELS, 4, groups=CHANNELS)
        self.x_proj = nn.Linear(CHANNELS, RANK + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(RANK, CHANNELS)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, STATES + 1)).repeat(CHANNELS, 1))
        self.D = nn.Parameter(torch.rand(CHANNELS))
        self.out_proj = nn.Linear(CHANNELS, WIDTH)
        self.x_proj.weight.data *= 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = RmsNorm(), Mixer()


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm_f = RmsNorm()


class Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()
        self.lm_head = nn.Linear(WIDTH, 50, bias=False)
        if tied:
            self.lm_head.weight = self.backbone.embeddings.weight


@functools.cache
def traced(tied: bool = False) -> Model:
    wrapped = mamba.Streaming(Language(tied))
    inputs = wrapped.inputs()
    examples = {i.name: torch.zeros((2, *i.shape[1:]), dtype=i.dtype) for i in inputs}
    return dataclasses.replace(trace(wrapped, examples, "small mamba", inputs), names=wrapped.outputs())


def tokens(n: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(50, (n, length), generator=torch.Generator().manual_seed(seed))


def context(model: Model) -> Context:
    data = Data({"input_ids": tokens(8, 24).numpy()}, None, "calibration")
    return Context(model, data, targets.load("host"), torch.Generator().manual_seed(0))


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(*model.feeds({"input_ids": ids.numpy()}))[0]


def damaged(model: Model) -> Model:
    """Outliers in front of the convolutions, in B, and at the norms; the function stays."""
    model = model.copy()
    module = model.graph
    for block in mamba_graph.blocks(model):
        norm = mamba_graph.norm(block.in_proj.args[0])  # pyright: ignore[reportArgumentType]
        assert norm is not None
        factor = torch.ones(CHANNELS)
        factor[3], factor[17] = 50.0, 30.0
        in_proj, bias = layers.value(module, block.in_proj.args[1]), layers.value(module, block.in_proj.args[2])
        both = torch.cat([factor, torch.ones(CHANNELS)])
        in_proj, bias = in_proj * both[:, None], bias * both
        conv = layers.value(module, block.conv.args[1]) / factor[:, None, None]
        gain = torch.ones(WIDTH)
        gain[5] = 40.0
        layers.store(module, norm.node, 0, f"{block.name}.gain", layers.value(module, norm.gain) * gain)
        layers.store(module, block.in_proj, 1, f"{block.name}.in_proj.weight", in_proj / gain)
        layers.store(module, block.in_proj, 2, f"{block.name}.in_proj.bias", bias)
        layers.store(module, block.conv, 1, f"{block.name}.conv1d.weight", conv)
        x_proj = layers.value(module, block.x_proj.args[1]).clone()
        x_proj[RANK] *= 40
        x_proj[RANK + STATES] /= 40
        layers.store(module, block.x_proj, 1, f"{block.name}.x_proj.weight", x_proj)
    layers.drop_unused(module)
    return model


FOLDS: list[dict[str, Any]] = [{}, {"klt": False}, {"smooth": False}, {"rotate": False}]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", FOLDS)
def test_folds_leave_the_function_and_states_may_still_be_carried(fields: dict[str, Any], tied: bool) -> None:
    model = traced(tied)
    ids = tokens(2, 15, seed=5)
    expected = logits(model, ids)
    for start in (model, damaged(model)):
        folded = MambaRotations(**fields).apply(start, context(start))
        assert (logits(folded, ids) - expected).abs().max() <= 1e-4
        state: Any = [i.empty(2) for i in folded.inputs[1:]]
        found = []
        for part in ids.split([6, 1, 8], 1):
            with torch.no_grad():
                y, *state = folded(part, *state)
            found.append(y)
        assert (torch.cat(found, 1) - expected).abs().max() <= 1e-4
    assert torch.equal(logits(model, ids), expected), "the model given is not changed"


def test_folding_twice_gives_the_same_bytes() -> None:
    model = traced()
    first, second = (MambaRotations().apply(model, context(model)).graph.state_dict() for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_stream_that_cannot_be_rotated_is_named_and_smoothed_instead() -> None:
    model = traced().copy()
    graph = model.graph.graph
    norms = [n for n in graph.nodes if n.op == "call_function" and mamba_graph.norm(n)]
    found = mamba_graph.norm(norms[-1])
    assert found is not None
    with graph.inserting_before(norms[-1]):
        bent = graph.call_function(torch.ops.aten.tanh.default, (found.stream,))
    bent.meta["val"] = found.stream.meta["val"]
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((*output.args[0], bent),)
    expected = logits(model, tokens(1, 9))
    folded = MambaRotations().apply(model, context(model))
    assert any(e.tensor == "residual stream" and e.action == "left" and "tanh" in e.reason for e in folded.receipt)
    assert (logits(folded, tokens(1, 9)) - expected).abs().max() <= 1e-4


# --- quantized


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_outliers_ruin_nearest_rounding_more_than_hadamard_and_hadamard_more_than_mambaquant() -> None:
    model = damaged(traced())
    ids = tokens(8, 24, seed=7)
    expected = logits(model, ids)
    plain = {"smooth": False, "klt": False}
    errors = {
        name: distance(logits(MambaQuant(**fields).apply(model, context(model)), ids), expected)
        for name, fields in {"nearest": plain | {"rotate": False}, "hadamard": plain, "mambaquant": {}}.items()
    }
    assert errors["mambaquant"] < 0.5 * errors["hadamard"] < 0.5 * errors["nearest"], errors
    assert errors["mambaquant"] < 0.03, errors


@pytest.mark.parametrize("scan", [True, False])
def test_onnx_runtime_runs_the_quantized_model(scan: bool) -> None:
    model = traced()
    quantized = MambaQuant(scan=scan).apply(model, context(model))
    ids = tokens(2, 11, seed=9)
    proto = to_onnx(quantized)
    large = {i.name: i.data_type for i in proto.graph.initializer if np.prod(i.dims) >= CHANNELS * RANK}
    assert {n for n in large if n.endswith("weight_codes")}
    assert all(large[n] == 3 for n in large if ".mixer." in n and "weight" in n), large
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    states = {i.name: i.empty(2).numpy() for i in quantized.inputs[1:]}
    found = session.run(None, {"input_ids": ids.numpy(), **states})[0]
    expected = logits(quantized, ids)
    assert distance(torch.from_numpy(found), expected) < 0.02  # codes on a rounding boundary may fall to either side
    lines = {e.tensor: e.action for e in quantized.receipt}
    assert lines["lm_head.weight"] == "left"
    assert lines["backbone.layers.1.mixer.conv1d.weight"] == "quantized"
    assert scan == any(".state" in n for n in lines)


def test_wrong_models_are_refused() -> None:
    plain = trace(nn.Linear(4, 4), {"x": torch.zeros(2, 4)}, "plain")
    data = Data({"x": np.zeros((4, 4), np.float32)}, None, "d")
    given = Context(plain, data, targets.load("host"), torch.Generator())
    with pytest.raises(PlanishError, match="no Mamba block"):
        MambaQuant().apply(plain, given)
    model = traced()
    done = MambaQuant(rotate=False, smooth=False).apply(model, context(model))
    with pytest.raises(PlanishError, match="quantized already"):
        MambaQuant().apply(done, context(model))
    turned = MambaRotations(smooth=False).apply(model, context(model))
    with pytest.raises(PlanishError, match="rotate a block only once"):
        MambaRotations().apply(turned, context(model))
