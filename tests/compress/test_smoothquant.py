"""SmoothQuant: the float network stays, outliers move as equation 4 says, and W8A8 recovers from them."""

import pytest
import torch
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.smoothquant import SmoothQuant
from planish.targets import target
from torch import nn
from torch.nn import functional as F

WIDTH, OUTLIERS = 64, (3, 17, 40)


class Net(nn.Module):
    """Layer norm with a few large gains, two linears that read it, and one behind a GELU, where nothing can be folded."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one, self.two, self.out = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, 32)
        with torch.no_grad():
            self.norm.weight[list(OUTLIERS)] *= 50
            for layer in (self.one, self.two):
                layer.weight[:, list(OUTLIERS)] /= 50

    def forward(self, x):
        y = self.norm(x)
        return self.out(F.gelu(self.one(y) + self.two(y)))


def inputs(seed=1, rows=256):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trace(Net().eval(), {"x": torch.zeros(2, WIDTH)}, "net")


def run(model, *steps, x=None):
    data = Data({"x": (inputs() if x is None else x).numpy()}, None, "data")
    for step in steps:
        model = step.apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))
    return model


def error(model, original, x):
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())


def test_the_float_network_stays_and_the_norm_takes_the_factors(model):
    scaled = run(model, SmoothQuant())
    assert error(scaled, model, inputs(5)) < 1e-5
    x = inputs()
    peak = F.layer_norm(x, (WIDTH,), model.graph.get_parameter("norm.weight"), model.graph.get_parameter("norm.bias"))
    peak = peak.detach().abs().amax(0)
    largest = torch.cat([model.graph.get_parameter(f"{n}.weight").detach() for n in ("one", "two")]).abs().amax(0)
    factors = (peak / largest).sqrt()
    before, after = (m.graph.get_parameter("norm.weight").detach() for m in (model, scaled))
    few = run(model, SmoothQuant(samples=512))  # more than there are: all of them
    assert torch.allclose(few.graph.get_parameter("norm.weight").detach(), before / factors, rtol=1e-4)
    assert not torch.equal(before, after)
    assert [e.action for e in scaled.receipt] == ["folded"] * 3
    assert scaled.receipt[2].reason.endswith("a multiplication")


def test_alpha_says_where_the_outliers_go(model):
    def spread(scaled):
        weight = scaled.graph.get_parameter("one.weight").detach().abs().amax(0)
        other = scaled.graph.get_parameter("two.weight").detach().abs().amax(0)
        channels = torch.maximum(weight, other)
        return float(channels.max() / channels.min())

    assert spread(run(model, SmoothQuant(alpha=0.0))) == pytest.approx(1, rel=1e-4)
    assert spread(run(model, SmoothQuant(alpha=0.3))) < spread(run(model, SmoothQuant(alpha=0.9)))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_it_recovers_eight_bits_from_outliers(model, granularity):
    x = inputs(5, 512)
    plain = error(run(model, Dynamic(granularity=granularity)), model, x)
    smooth = error(run(model, SmoothQuant(), Dynamic(granularity=granularity)), model, x)
    assert smooth < plain / 3
    assert smooth < 0.03


def test_channels_that_are_always_zero_stay(model):
    dead = model.copy()
    with torch.no_grad():
        for name in ("norm.weight", "norm.bias"):
            dead.graph.get_parameter(name)[5] = 0
        for name in ("one.weight", "two.weight"):
            dead.graph.get_parameter(name)[:, 6] = 0
    scaled = run(dead, SmoothQuant())
    assert all(torch.isfinite(p).all() for p in scaled.graph.parameters())
    assert error(scaled, dead, inputs(5)) < 1e-5
