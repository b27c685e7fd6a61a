"""GPTQ: the paper's numbers, less output error than rounding to nearest, and the special cases in which it is known what must come out."""

import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import recipe
from planish.compress.blocks import Linear
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.moments import Moments
from planish.compress.passes import Context
from planish.compress.quantize import grids
from planish.compress.quantize.gptq import Gptq, upper_factor
from planish.compress.quantize.rtn import RoundToNearest
from planish.kernels.linear_wna16 import dequantize
from planish.targets import target
from torch import nn

INPUTS, OUT = 128, 48


def activations(rows=1024, seed=1):
    """Correlated, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS // 2, INPUTS, generator=torch.Generator().manual_seed(0))
    x = torch.randn(rows, INPUTS // 2, generator=generator) @ mix * 0.3 + torch.randn(rows, INPUTS, generator=generator)
    return x * torch.logspace(-1, 1, INPUTS)[torch.randperm(INPUTS, generator=torch.Generator().manual_seed(3))]


def weight(seed=2, out=OUT):
    return torch.randn(out, INPUTS, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments(x):
    found = Moments(INPUTS, products=True)
    found.add(x)
    return found


def restored(config, w, x):
    (made,) = config.replacements([Linear("layer", None, None, w, None)], moments(x), torch.Generator())
    return stored(made)


def stored(made):
    """The weight that a replacement's packed tensors stand for."""
    t, a = made.tensors, made.attributes
    return dequantize(t["codes"], t["scale"], t.get("zero_point"), a["bits"], a["group"])


def error(w, q, x):
    return float((x @ (q - w).T).norm() / (x @ w.T).norm())


def by_the_paper(w, hessian, damping, grid, group):
    """Frantar et al. 2022, algorithm 1, in float64: one column at a time, errors pushed along the Cholesky factor of the inverse."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w, q = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    for j in range(w.shape[1]):
        scale, zero = grid.scale[:, j // group].double(), grid.zero[:, j // group].double()
        q[:, j] = (((w[:, j] / scale).round() + zero).clamp(0, 2**grid.bits - 1) - zero) * scale
        w[:, j + 1 :] -= ((w[:, j] - q[:, j]) / upper[j, j])[:, None] * upper[j, j + 1 :]
    return q.float()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_it_gives_the_papers_numbers(bits):
    w, x = weight(), activations()
    hessian = moments(x).hessian()
    config = Gptq(bits=bits, group=32, act_order=False)
    grid, codes = config.compensated(w, upper_factor(hessian, 0.01, None, "layer"), None, 32)
    ours, paper = grid.decode(codes), by_the_paper(w, hessian, 0.01, grid, 32)
    assert error(w, ours, x) == pytest.approx(error(w, paper, x), rel=1e-3)
    assert float((ours != paper).float().mean()) < 0.02  # ties that float32 breaks the other way


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_errs_less_than_rounding_to_nearest(bits, symmetric):
    w, x, unseen = weight(), activations(), activations(seed=9)
    nearest = grids.fit(w, bits, 32, symmetric)
    plain = error(w, nearest.decode(nearest.encode(w)), unseen)
    common = {"bits": bits, "group": 32, "symmetric": symmetric}
    fixed = error(w, restored(Gptq(act_order=False, **common), w, x), unseen)
    following = error(w, restored(Gptq(act_order=False, static_groups=False, **common), w, x), unseen)
    ordered = error(w, restored(Gptq(**common), w, x), unseen)
    assert ordered < fixed < plain * 0.9
    assert following < plain * 0.9


def test_act_order_with_static_groups_is_plain_when_the_order_is_the_identity():
    w, x = weight(), activations()
    x = x[:, moments(x).hessian().diagonal().argsort(descending=True)]
    assert torch.equal(restored(Gptq(bits=3, group=32), w, x), restored(Gptq(bits=3, group=32, act_order=False), w, x))


@pytest.mark.parametrize("static", [True, False])
def test_with_huge_damping_it_is_rounding_to_nearest(static):
    w, x = weight(), activations()
    grid = grids.fit(w, 4, 32, True)
    config = Gptq(bits=4, group=32, damping=1e7, static_groups=static, act_order=static)
    assert float((restored(config, w, x) - grid.decode(grid.encode(w))).norm() / w.norm()) < 1e-3


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    w = weight()
    found = moments(activations())
    found.second = torch.diag(torch.rand(INPUTS, generator=torch.Generator().manual_seed(0)) + 0.5) * found.rows
    (made,) = Gptq(bits=4, group=32).replacements([Linear("layer", None, None, w, None)], found, torch.Generator())
    factor = upper_factor(found.hessian(), 0.01, None, "layer")
    grid = grids.fit(w, 4, 32, True, True, factor.diagonal() ** 2)
    assert torch.equal(stored(made), grid.decode(grid.encode(w)))


def test_the_block_has_no_influence():
    w, x = weight(), activations()
    errors = [error(w, restored(Gptq(bits=3, group=32, block=b), w, x), x) for b in (1, 24, 128, 4096)]
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-3)


def test_dead_inputs_are_rounded_to_nearest_and_harm_nothing():
    w, x = weight(), activations()
    x[:, 10:14] = 0
    q = restored(Gptq(bits=4, group=32), w, x)
    assert torch.isfinite(q).all()
    step = grids.fit(w, 4, 32, True, clip=False).scale.abs()[:, 0]
    assert ((q - w)[:, 10:14].abs() <= 2 * step[:, None]).all()
    nearest = grids.fit(w, 4, 32, True)
    assert error(w, q, x) < error(w, nearest.decode(nearest.encode(w)), x)
    assert torch.isfinite(restored(Gptq(bits=4, group=32), w, torch.zeros(16, INPUTS))).all()


def test_fewer_rows_than_inputs_are_enough():
    w, x = weight(), activations(rows=20)
    nearest = grids.fit(w, 4, 32, True)
    assert error(w, restored(Gptq(bits=4, group=32), w, x), x) < error(w, nearest.decode(nearest.encode(w)), x) * 0.5


def test_layers_that_read_one_tensor_are_rounded_as_each_would_be_alone():
    x = activations()
    found = moments(x)
    members = [Linear(f"l{i}", None, None, weight(i, out), None) for i, out in enumerate((16, 40, 8))]
    config = Gptq(bits=4, group=32)
    together = config.replacements(members, found, torch.Generator())
    for item, made in zip(members, together, strict=True):
        (alone,) = config.replacements([item], found, torch.Generator())
        assert float((stored(made) != stored(alone)).float().mean()) < 0.01  # products of another shape round elsewhere
        assert error(item.weight, stored(made), x) == pytest.approx(error(item.weight, stored(alone), x), rel=2e-3)


def test_a_hessian_that_no_damping_mends_is_refused():
    with pytest.raises(PlanishError, match="the Hessian of layer 'l' is not positive definite with damping 100"):
        upper_factor(torch.eye(4, dtype=torch.float64) - 1e9 * torch.ones(4, 4, dtype=torch.float64).triu(1) - 1e9 * torch.ones(4, 4, dtype=torch.float64).tril(-1), 0.01, None, "l")  # fmt: skip


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_pass_errs_less_in_the_networks_output(bits):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(INPUTS, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    model = trace(module, {"x": torch.zeros(2, INPUTS)}, "mlp")
    x, unseen = activations(128), activations(512, seed=9)
    context = Context(model, Data({"x": x.numpy()}, None, "d"), target.load("host"), torch.Generator().manual_seed(0))
    results = [step.apply(model, context) for step in (RoundToNearest(bits=bits), Gptq(bits=bits))]
    with torch.no_grad():
        errors = [float((r(unseen) - model(unseen)).norm() / model(unseen).norm()) for r in results]
    assert errors[1] < errors[0]
    assert [e.action for e in results[1].receipt] == ["quantized"] * 3


def test_faults_are_named():
    text = "name: x\npasses:\n  - quantize.gptq: {}\n"
    with pytest.raises(PlanishError, match="act_order needs static_groups"):
        recipe.parse(text.replace("{}", "{static_groups: false}"), "r.yaml")
    with pytest.raises(PlanishError, match="'damping'"):
        recipe.parse(text.replace("{}", "{damping: 0.0}"), "r.yaml")
