"""AWQ: the float network stays, and what rounding then costs in the output is no more than without it."""

import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import recipe
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.awq import Awq
from planish.compress.quantize.gptq import Gptq
from planish.compress.quantize.rtn import RoundToNearest
from planish.targets import target
from torch import nn
from torch.nn import functional as F

WIDTH = 64


class Gated(nn.Module):
    """Layer norm and SwiGLU, whose input channels differ in size as a language model's do, and a head."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 16)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 1.2, WIDTH)[torch.randperm(WIDTH)])
            for layer in (self.gate, self.up):
                layer.weight.div_(self.norm.weight.sqrt())

    def forward(self, x):
        y = self.norm(x)
        return self.lm_head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def inputs(seed=1, rows=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trace(Gated().eval(), {"x": torch.zeros(2, WIDTH)}, "gated")


def run(model, *steps):
    data = Data({"x": inputs().numpy()}, None, "data")
    for step in steps:
        model = step.apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))
    return model


def error(model, original, x):
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())


def test_the_float_network_stays(model):
    scaled = run(model, Awq())
    assert error(scaled, model, inputs(5)) < 1e-5
    assert {e.tensor for e in scaled.receipt} == {"gate.weight", "up.weight", "down.weight"}
    assert all(e.action == "folded" for e in scaled.receipt)
    places = {e.tensor: e.reason.rpartition("divided in ")[2] for e in scaled.receipt}
    assert places == {
        "gate.weight": "norm.weight, norm.bias",
        "up.weight": "norm.weight, norm.bias",
        "down.weight": "up.weight, up.bias",
    }
    assert sum(n.op == "call_function" for n in scaled.graph.graph.nodes) == sum(
        n.op == "call_function" for n in model.graph.graph.nodes
    )
    assert not torch.equal(scaled.graph.get_parameter("norm.weight"), model.graph.get_parameter("norm.weight"))
    assert torch.equal(scaled.graph.get_parameter("lm_head.weight"), model.graph.get_parameter("lm_head.weight"))


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_errs_less_behind_it(model, bits, symmetric):
    fields = {"bits": bits, "symmetric": symmetric, "calibrated": True}
    x = inputs(5, 512)
    plain = error(run(model, RoundToNearest(**fields)), model, x)
    assert error(run(model, Awq(**fields), RoundToNearest(**fields)), model, x) < plain


def test_it_goes_before_gptq(model):
    found = run(model, Awq(bits=3), Gptq(bits=3))
    assert error(found, model, inputs(5)) < error(run(model, RoundToNearest(bits=3)), model, inputs(5))


def test_constant_activations_need_no_scales(model):
    data = Data({"x": torch.zeros(16, WIDTH).numpy()}, None, "zeros")
    context = Context(model, data, target.load("host"), torch.Generator().manual_seed(0))
    assert error(Awq().apply(model, context), model, inputs(5)) < 1e-5


def test_faults_are_named(model):
    with pytest.raises(PlanishError, match="layer 'gate': group 48 does not divide its 64 input channels"):
        run(model, Awq(group=48))
    with pytest.raises(PlanishError, match="calibrates on data; none was given"):
        Awq().apply(model, Context(model, None, target.load("host"), torch.Generator()))
    with pytest.raises(PlanishError, match=r"'quantize.awq' has no field 'alpha'"):
        recipe.parse("name: x\npasses:\n  - quantize.awq: {alpha: 1}\n", "r.yaml")
