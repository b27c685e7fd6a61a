"""Round to nearest: grids cover or err less, what is stored is what is computed, and faults are one line."""

import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import recipe
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize import grids
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.rtn import RoundToNearest
from planish.targets import target
from torch import nn

GRIDS = [(bits, symmetric) for bits in (8, 4, 3, 2) for symmetric in (True, False)]


def weight(out=24, inputs=128, seed=0):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def network(inputs=96, hidden=64, outputs=10):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return trace(module, {"x": torch.zeros(2, inputs)}, "mlp")


def inputs(rows=256, columns=96):
    """Correlated, with channels of very different size, as a transformer's are."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(rows, columns // 4, generator=generator) @ mix + torch.randn(rows, columns, generator=generator)
    return x * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]


def run(step, model, x=None):
    data = None if x is None else Data({"x": x.numpy()}, None, "data")
    return step.apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))


def error(model, original, x):
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())


@pytest.mark.parametrize("bits, symmetric", GRIDS)
def test_a_grid_of_the_whole_range_errs_half_a_step_but_at_one_end(bits, symmetric):
    w = weight()
    grid = grids.fit(w, bits, 32, symmetric, clip=False)
    codes = grid.encode(w).reshape(24, 4, 32)
    off = (grid.decode(codes.reshape(w.shape)) - w).abs().reshape(24, 4, 32) / grid.scale.abs()[..., None]
    assert (off <= 1.0001).all()  # a rounded zero point may move the ends by half a step
    if symmetric:
        assert (off[codes < 2**bits - 1] <= 0.5001).all()
        largest = w.reshape(24, 4, 32).abs().argmax(-1, keepdim=True)
        assert not codes.gather(-1, largest).any()
        assert (off.gather(-1, largest) < 1e-5).all()


@pytest.mark.parametrize("bits, symmetric", GRIDS)
def test_the_clip_search_errs_no_more_than_covering(bits, symmetric):
    w = weight()
    w[:, 5] *= 8
    for importance in (None, torch.rand(128, generator=torch.Generator().manual_seed(2)) ** 4):
        plain, clipped = (grids.fit(w, bits, 32, symmetric, clip, importance) for clip in (False, True))
        cost = torch.ones(128) if importance is None else importance
        errors = [((g.decode(g.encode(w)) - w) ** 2 * cost).reshape(24, 4, 32).sum(-1) for g in (plain, clipped)]
        assert (errors[1] <= errors[0] * 1.0001).all()
        assert float(errors[1].sum()) < float(errors[0].sum()) * (0.95 if bits < 8 else 1)


@pytest.mark.parametrize("bits, symmetric", GRIDS)
def test_rounding_twice_is_rounding_once_and_zero_stays_zero(bits, symmetric):
    w = weight()
    w[3] = 0
    w[7, 32:64] = 0
    grid = grids.fit(w, bits, 32, symmetric)
    codes = grid.encode(w)
    assert int(codes.max()) < 2**bits
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    restored = grid.decode(codes)
    assert torch.isfinite(restored).all()
    assert not restored[3].any() and not restored[7, 32:64].any()


def test_more_bits_and_smaller_groups_err_less():
    w = weight(inputs=256)
    by_bits = [grids.fit(w, b, 64, True) for b in (2, 3, 4, 8)]
    errors = [float((g.decode(g.encode(w)) - w).norm()) for g in by_bits]
    assert errors == sorted(errors, reverse=True)
    by_group = [grids.fit(w, 4, g, True) for g in (256, 128, 64, 32, 16)]
    errors = [float((g.decode(g.encode(w)) - w).norm()) for g in by_group]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits, symmetric", GRIDS)
def test_the_receipt_says_what_the_graph_computes(bits, symmetric):
    model, x = network(), inputs()
    result = run(RoundToNearest(bits=bits, symmetric=symmetric, layers=("0",)), model)
    (entry,) = result.receipt
    assert entry.tensor == "0.weight" and entry.action == "quantized"
    assert entry.after_bytes == 64 * (96 * bits // 8 + 3 * (4 if symmetric else 5))
    original = model.graph.get_parameter("0.weight").detach()
    first = next(n for n in result.graph.graph.nodes if "linear_wna16" in str(n.target))
    with torch.no_grad():
        seen = []
        watch = torch.fx.Interpreter(result.graph)
        watch.run_node = lambda n: [v := torch.fx.Interpreter.run_node(watch, n), seen.append(v) if n is first else 0][
            0
        ]
        watch.run(torch.eye(96))
        restored = (seen[0] - model.graph.get_parameter("0.bias")).T
    assert float((restored - original).norm() / original.norm()) == pytest.approx(entry.error, rel=1e-3)
    assert error(result, model, x) < {8: 0.01, 4: 0.2, 3: 0.4, 2: 0.9}[bits]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_search_weighted_by_activations_errs_less_in_the_output(bits):
    model, x = network(), inputs()
    plain, weighted = (
        run(RoundToNearest(bits=bits, calibrated=c, layers=("0",), skip=()), model, x) for c in (False, True)
    )
    assert error(weighted, model, x) < error(plain, model, x)


def test_run_time_quantized_activations():
    model, x = network(), inputs()
    eight = error(run(Dynamic(), model), model, x)
    assert eight < 0.02
    by_token = error(run(Dynamic(bits=4, activations=4, group=32), model), model, x)
    by_group = error(run(Dynamic(bits=4, activations=4, group=32, granularity="group"), model), model, x)
    assert eight < by_group < by_token
    assert error(run(Dynamic(granularity="tensor"), model), model, x) < 0.05
    assert error(run(RoundToNearest(bits=4, activations=8), model), model, x) < 0.2


def test_same_input_same_bytes():
    model, x = network(), inputs()
    one, two = (run(RoundToNearest(calibrated=True), model, x).graph.state_dict() for _ in range(2))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_faults_are_named():
    model = network()
    with pytest.raises(PlanishError, match=r"layer '0': group 64 does not divide its 96 input channels"):
        run(RoundToNearest(group=64), model)
    with pytest.raises(PlanishError, match="calibrates on data; none was given"):
        run(RoundToNearest(calibrated=True), model)
    with pytest.raises(PlanishError, match=r"'nowhere\*' matches no linear layer; layers: '0', '2'"):
        run(RoundToNearest(layers=("nowhere*",)), model)
    broken = network().copy()
    with torch.no_grad():
        broken.graph.get_parameter("2.weight")[3, 4] = float("nan")
    with pytest.raises(PlanishError, match=r"layer '2': its weight has 1 NaN or Inf values, the first at \(3, 4\)"):
        run(RoundToNearest(), broken)
    text = "name: x\npasses:\n  - quantize.{}\n"
    for step, message in [
        ("rtn: {bits: 5}", "input should be 8, 4, 3 or 2"),
        ("rtn: {activations: 8, symmetric: false}", "need symmetric weights of 8 or 4 bits"),
        ("dynamic: {activations: 16}", "8 or 4 bits"),
        ("dynamic: {bits: 2}", "need symmetric weights of 8 or 4 bits"),
        ("rtn: {group: 0}", "at least one column"),
    ]:
        with pytest.raises(PlanishError, match=message):
            recipe.parse(text.format(step), "r.yaml")


def test_a_layer_that_the_user_skips_stays_as_it_is():
    model = network()
    result = run(RoundToNearest(skip=("2",)), model)
    assert {e.tensor: e.action for e in result.receipt} == {"0.weight": "quantized", "2.weight": "left"}
    assert torch.equal(result.graph.get_parameter("2.weight"), model.graph.get_parameter("2.weight"))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("clip", [False, True])
def test_an_all_zero_group_of_a_symmetric_grid_has_its_zero_in_the_middle(bits, clip):
    """The zero points of a symmetric grid are not stored, so every group must have the same."""
    w = weight()
    w[3] = 0
    w[7, 32:64] = 0
    assert (grids.fit(w, bits, 32, True, clip).zero == 2 ** (bits - 1)).all()
