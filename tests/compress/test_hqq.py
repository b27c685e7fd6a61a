"""HQQ: less error than covering grids and than the alternation with a fixed scale, weights of any size alike, zero points as stored."""

import pytest
import torch
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize import grids
from planish.compress.quantize.hqq import Hqq
from planish.targets import target
from torch import nn


def weight(kind):
    torch.manual_seed(0)
    normal = torch.randn(64, 256) * 0.02
    return normal if kind == "normal" else normal * torch.distributions.Chi2(4.0).sample((64, 256)).div(4).rsqrt()


def fixed_scale(w, bits, group=64, iterations=20):
    """The paper's alternation on the zero point alone, from the range of each group; errors in units of the weights."""
    x = w.reshape(-1, group)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero, beta, best, least = -low / scale, 10.0, x, float("inf")
    for _ in range(iterations):
        codes = torch.round(x / scale + zero).clamp(0, 2**bits - 1)
        real = (codes - zero) * scale
        if float((x - real).abs().mean()) >= least:
            break
        best, least = real, float((x - real).abs().mean())
        off = x - real
        error = off.sign() * (off.abs() - off.abs().pow(-0.3) / beta).clamp_min(0)
        zero = (codes - (x - error) / scale).mean(1, keepdim=True)
        beta *= 1.01
    return best.reshape(w.shape)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_it_errs_less_in_every_norm(bits, kind):
    w = weight(kind)
    found = Hqq(bits=bits).solve(w, 64)
    ours = (found.decode(found.encode(w)) - w).abs()
    covering = grids.fit(w, bits, 64, symmetric=False, clip=False)
    for other in (covering.decode(covering.encode(w)), fixed_scale(w, bits)):
        theirs = (other - w).abs()
        for power in (0.7, 1, 2):
            assert float(ours.pow(power).sum()) < float(theirs.pow(power).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_any_size_are_treated_alike(symmetric):
    w = weight("heavy tails")
    small, large = (Hqq(bits=3, symmetric=symmetric).solve(w * f, 64) for f in (1, 1024))
    assert torch.allclose(large.scale, small.scale * 1024, rtol=1e-5)
    assert torch.equal(large.encode(w * 1024), small.encode(w))


def test_symmetric_grids_have_no_zero_points():
    grid = Hqq(bits=4, symmetric=True).solve(weight("normal"), 64)
    assert (grid.zero == 8).all()
    plain = grids.fit(weight("normal"), 4, 64, symmetric=True, clip=False)
    errors = [float((g.decode(g.encode(weight("normal"))) - weight("normal")).norm()) for g in (grid, plain)]
    assert errors[0] < errors[1]


def test_constant_and_zero_groups_are_finite():
    w = weight("normal")
    w[0], w[1] = 0, 0.7
    w[2, :64] = -3e-30
    grid = Hqq(bits=4).solve(w, 64)
    restored = grid.decode(grid.encode(w))
    assert torch.isfinite(restored).all() and not restored[0].any()
    assert torch.allclose(restored[1], w[1], rtol=0.05)


def test_the_pass_stores_zero_points_between_codes():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    model = trace(module, {"x": torch.zeros(2, 128)}, "mlp")
    context = Context(model, None, target.load("host"), torch.Generator())
    result = Hqq(bits=4).apply(model, context)
    zeros = result.graph.get_buffer("0.weight_zero_point")
    assert zeros.dtype == torch.float32 and zeros.shape == (64, 2)
    assert result.receipt[0].reason == "hqq: int4, groups of 64, zero points between codes"
    x = torch.randn(32, 128)
    with torch.no_grad():
        assert float((result(x) - model(x)).norm() / model(x).norm()) < 0.1
