"""Unified Normalization: folded into the next layers it is exact, whatever format they take; and what must not be folded is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress.data import Data
from planish.compress.fold_affine import fold_affine
from planish.compress.model import Model, trace
from planish.compress.passes import Context
from planish.compress.prune.semi_structured import SemiStructured
from planish.compress.quantize.awq import Awq
from planish.compress.quantize.rtn import RoundToNearest
from planish.compress.quantize.static import Static
from planish.compress.rewrite.unified_norm import EPS, Unified
from planish.compress.rewrite.unified_norm import UnifiedNorm as Rewrite
from planish.targets import target
from torch import nn
from torch.nn import functional as F

WIDTH = 16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class UnifiedNorm(nn.Module):
    """Inference form of Yang et al. 2022: a running second moment for each channel, no mean."""

    def __init__(self, form: str = "divide", seed: int = 0) -> None:
        super().__init__()
        self.form, self.eps = form, 1e-5
        self.gamma, self.beta = (
            nn.Parameter(1 + 0.3 * drawn(WIDTH, seed=seed)),
            nn.Parameter(drawn(WIDTH, seed=seed + 1)),
        )
        self.register_buffer("rv", drawn(WIDTH, seed=seed + 2).square() * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "divide":
            return self.gamma * x / torch.sqrt(self.rv + self.eps) + self.beta
        if self.form == "multiply":
            return x * (self.gamma * torch.rsqrt(self.rv + self.eps)) + self.beta
        return self.beta + (x - 0.5) * self.gamma.view(1, 1, -1)


class PreNorm(nn.Module):
    """A residual block whose norm feeds three layers, and one behind it that feeds one, without bias."""

    def __init__(self, form: str = "divide") -> None:
        super().__init__()
        self.first, self.second = UnifiedNorm(form), UnifiedNorm(form, 5)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + self.down(torch.relu(self.up(self.second(x))))


def traced(module: nn.Module, shape: tuple[int, ...] = (2, 5, WIDTH)) -> Model:
    torch.manual_seed(0)
    for p in module.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return trace(module, {"x": torch.zeros(shape)}, "net")


def kinds(model: Model) -> list[str]:
    return [str(n.target) for n in model.graph.graph.nodes if n.op == "call_function"]


def elementwise(model: Model) -> int:
    return sum(
        any(k.startswith(f"aten.{o}") for o in ("mul", "div", "add", "sub", "sqrt", "rsqrt")) for k in kinds(model)
    )


def context(model: Model, x: torch.Tensor) -> Context:
    data = Data({"x": x.numpy()}, None, "data")
    return Context(model, data, target.load("host"), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["divide", "multiply", "shift"])
def test_a_network_with_unified_norms_has_none_afterwards_and_computes_the_same(form: str) -> None:
    model, x = traced(PreNorm(form)), drawn(4, 5, WIDTH, seed=9)
    folded = fold_affine(model)
    assert elementwise(folded) == 2  # the residual sums
    assert {e.tensor: e.action for e in folded.receipt} == {"first": "folded", "second": "folded"}
    assert [e.reason for e in folded.receipt] == [
        "constants of each channel into q, k, v",
        "constants of each channel into up",
    ]
    assert not any("gamma" in n or "rv" in n for n, _ in folded.graph.named_parameters())
    want = model(x)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(folded(x), want, rtol=1e-5, atol=1e-5)
    assert elementwise(model) > 2  # the model given is as it was


def test_weights_are_those_of_float64_rounded_once() -> None:
    module = nn.Sequential(UnifiedNorm(), nn.Linear(WIDTH, 8))
    model = traced(module, (2, WIDTH))
    norm, layer = module[0], module[1]
    assert isinstance(norm, UnifiedNorm) and isinstance(layer, nn.Linear)
    a = norm.gamma.double() / (norm.rv.double() + norm.eps).sqrt()
    tensors = dict(fold_affine(model).graph.named_parameters())
    assert torch.equal(tensors["1.weight"], (layer.weight.double() * a).float())
    assert torch.equal(tensors["1.bias"], (layer.bias.double() + layer.weight.double() @ norm.beta.double()).float())


@pytest.mark.parametrize("step", [RoundToNearest(bits=8), SemiStructured(score="wanda"), Awq(), Static()])
def test_every_pass_folds_before_it_works(step: Any) -> None:
    model, x = traced(PreNorm()), drawn(16, 5, WIDTH, seed=9)
    made = step.apply(model, context(model, x))
    assert [e.tensor for e in made.receipt if e.reason.startswith("constants of each channel")] == ["first", "second"]
    assert not any(k.startswith(("aten.div", "aten.sqrt")) for k in kinds(made))


def test_what_an_earlier_pass_scaled_stays_scaled() -> None:
    """AWQ without a norm to fold into inserts a multiplication; the pass behind must not undo it."""
    model, x = traced(PreNorm()), drawn(16, 5, WIDTH, seed=9) * torch.logspace(-1, 1, WIDTH)
    scaled = Awq(bits=4).apply(model, context(model, x))
    made = RoundToNearest(bits=4).apply(scaled, context(scaled, x))
    count = [sum(k.startswith("aten.mul") for k in kinds(m)) for m in (scaled, made)]
    assert count[0] == count[1] > 0


class Computed(nn.Module):
    """RMSNorm written out: its gain is no constant of the layer behind it alone, it belongs to a norm that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(1 + drawn(WIDTH).abs()), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)))


class Observed(nn.Module):
    """The norm's result has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = UnifiedNorm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y + self.layer(y)


class Positions(nn.Module):
    """A constant that varies along the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(drawn(5, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.table)


@pytest.mark.parametrize("module", [Computed(), Observed(), Positions()])
def test_what_cannot_or_should_not_be_folded_stays(module: nn.Module) -> None:
    model = traced(module)
    folded = fold_affine(model)
    assert not folded.receipt and kinds(folded) == kinds(model)


class Image(nn.Module):
    """Pixels normalized by fixed means and deviations in front of a convolution, and a batch norm in front of another."""

    def __init__(self, padding: int, shift: float) -> None:
        super().__init__()
        self.mean, self.deviation = (
            nn.Buffer(v) for v in (shift * drawn(1, 4, 1, 1), drawn(4, 1, 1, seed=1).abs() + 0.5)
        )
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=padding, groups=2), nn.Conv2d(8, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first((x - self.mean) / self.deviation))
        return self.second(self.norm(x))


@pytest.mark.parametrize(("padding", "shift", "folds"), [(0, 1.0, True), (1, 0.0, True), (1, 1.0, False)])
def test_convolutions_take_scales_and_without_padding_shifts(padding: int, shift: float, folds: bool) -> None:
    module = Image(padding, shift)
    with torch.no_grad():
        module.norm(drawn(8, 8, 6, 6) * 2 + 1)
        module.norm.weight.uniform_(0.5, 1.5)
        module.norm.bias.normal_()
    model, x = traced(module.eval(), (2, 4, 6, 6)), drawn(3, 4, 6, 6, seed=3)
    folded = fold_affine(model)
    reasons = [e.reason for e in folded.receipt]
    assert reasons == ["constants of each channel into first"] * folds + ["constants of each channel into second"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_weight_that_two_layers_share_keeps_its_value_for_the_other() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = UnifiedNorm(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(self.norm(x))))

    model, x = traced(Tied()), drawn(2, 5, WIDTH, seed=4)
    folded = fold_affine(model)
    assert len(folded.receipt) == 1
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_folding_is_deterministic() -> None:
    model = traced(PreNorm())
    first, second = (dict(fold_affine(model).graph.named_parameters()) for _ in range(2))
    assert all(np.array_equal(first[n].detach().numpy(), second[n].detach().numpy()) for n in first)


def unified(window: int = 4, smooth_after: int = 10**9, filter_outliers: bool = False) -> Unified:
    torch.manual_seed(0)
    moment = drawn(WIDTH, seed=2).square() + 0.1
    return Unified(1 + 0.3 * drawn(WIDTH), drawn(WIDTH, seed=1), moment, window, smooth_after, filter_outliers)


def test_without_smoothing_the_gradient_is_that_of_the_batch_statistics() -> None:
    norm, x, weight = unified(), drawn(3, 5, WIDTH, seed=3).requires_grad_(), drawn(3, 5, WIDTH, seed=4)
    (norm(x) * weight).sum().backward()
    gamma, beta, twin = (v.detach().clone().requires_grad_() for v in (norm.gamma, norm.beta, x))
    plain = gamma * twin / (twin.square().mean((0, 1)) + EPS).sqrt() + beta
    (plain * weight).sum().backward()
    for ours, want in ((x.grad, twin.grad), (norm.gamma.grad, gamma.grad), (norm.beta.grad, beta.grad)):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_statistics_are_the_cards() -> None:
    norm, batches = unified(2, 2), [drawn(40, WIDTH, seed=s) * (1 + s) for s in range(4)]
    moments, rv = [b.square().mean(0) for b in batches], norm.rv.clone()
    for step, x in enumerate(batches):
        found = moments[step] if step < 2 else (moments[step] * moments[step - 1]).sqrt()
        rv = 0.9 * rv + 0.1 * found
        y = norm(x)
        torch.testing.assert_close(y, norm.gamma * x / (found + EPS).sqrt() + norm.beta, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.rv, rv, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # inference: constants
        want = norm.gamma * batches[0] / (rv + EPS).sqrt() + norm.beta
        torch.testing.assert_close(norm(batches[0]), want, rtol=1e-4, atol=1e-5)


def test_a_step_with_outliers_is_not_smoothed() -> None:
    norm, calm = unified(4, 0, True), drawn(64, WIDTH, seed=5)
    for _ in range(8):
        norm(calm)
    before = norm.rv.clone()
    wild = calm.clone()
    wild[:, 3] *= 100
    y = norm(wild)
    own = wild.square().mean(0)
    torch.testing.assert_close(y, norm.gamma * wild / (own + EPS).sqrt() + norm.beta, rtol=1e-4, atol=1e-5)
    slot = (int(norm.steps) - 1) % 4
    torch.testing.assert_close(norm.moments[slot], before)


class Normed(nn.Module):
    """Two residual blocks behind norms of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.relu(self.up(self.first(x))))
        return self.head((x + self.mix(self.second(x))).mean(1))


def test_a_network_loses_its_norms_and_is_trained_to_answer_as_before() -> None:
    model, x = traced(Normed()), drawn(160, 5, WIDTH, seed=6) * torch.linspace(0.3, 3, WIDTH)
    step = Rewrite(epochs=6, batch=32, learning_rate=0.02, loss="mse", smooth_after=8, precision="float32")
    made = step.apply(model, context(model, x))
    assert not any("norm" in k for k in kinds(made)) and {e.tensor for e in made.receipt} >= {"first", "second"}
    assert not any("unified" in n for n, _ in [*made.graph.named_parameters(), *made.graph.named_buffers()])
    with torch.no_grad():
        want, got = model(x), made(x)
    assert isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)
    assert float((got - want).norm() / (want - want.mean(0)).norm()) < 0.5
    made.program()  # can be stored
    folded = RoundToNearest(bits=8).apply(made, context(made, x))
    assert elementwise(folded) == 2  # the residual sums
    again = step.apply(model, context(model, x))
    assert all(torch.equal(a, b) for a, b in zip(made.graph.parameters(), again.graph.parameters(), strict=True))


def test_faults_of_the_rewriting_are_named() -> None:
    model, x = traced(Computed()), drawn(8, 5, WIDTH)
    with pytest.raises(
        PlanishError, match=r"rewrite\.unified_norm: '\*' matches no layer norm or RMS norm \(norms that"
    ):
        Rewrite().apply(model, context(model, x))
    with pytest.raises(PlanishError, match="it needs data"):
        Rewrite().apply(model, Context(model, None, target.load("host"), torch.Generator()))
    wide = traced(nn.Sequential(nn.LayerNorm([5, WIDTH]), nn.Linear(WIDTH, 4)))
    with pytest.raises(PlanishError, match=r"norm '0' is over dimensions \[5, 16\]"):
        Rewrite().apply(wide, context(wide, x))
