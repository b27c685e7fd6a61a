"""Gated attention: where it starts, what it reads, and that it trains."""

import math

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import attention
from planish.compress.evaluation import closeness, language
from planish.compress.model import predict, trace
from planish.compress.passes import Context
from planish.compress.rewrite.gated_attention import GatedAttention
from planish.export.lowering import to_onnx
from planish.runtimes import ort
from planish.targets import target
from torch import nn


def gated(model, **fields):
    context = Context(model, None, target.load("host"), torch.Generator().manual_seed(0))
    return GatedAttention(**fields).apply(model, context)


def difference(model, other, rows):
    before, after = predict(model, rows), predict(other, rows)
    return max(float(np.abs(before[k] - after[k]).max()) for k in before)


@pytest.fixture(scope="module")
def rows(tokens):
    return {k: v[:4] for k, v in tokens.inputs.items()}


@pytest.mark.parametrize("fused", [True, False])
def test_scaled_gates_start_as_the_original(make_decoder, rows, fused):
    """METHODS A5 (a), fine-tuning."""
    model = make_decoder(fused)
    changed = gated(model, deviation=0.0)
    assert difference(model, changed, rows) < 1e-5
    assert [a.name for a in attention.find(changed.graph)] == ["layers.0.self_attn", "layers.1.self_attn"]
    shapes = {n: tuple(p.shape) for n, p in changed.graph.named_parameters() if "gate." in n}
    assert shapes["layers.0.self_attn.gate.weight"] == (4, 16) and shapes["layers.1.self_attn.gate.bias"] == (4,)


def test_small_random_weights_start_near_the_original(decoder, rows):
    found = closeness(language(decoder), language(gated(decoder)), rows["input_ids"])
    assert 0 < found.kl < 0.01


@pytest.mark.parametrize("pi", [0.1, 0.25, 0.9])
def test_gates_start_at_pi(decoder, rows, pi):
    """METHODS A5 (c): mean gate within 1e-6 of pi when the weights are zero; (a): logit(0.25) = -1.0986."""
    changed = gated(decoder, pi=pi, deviation=0.0, finetune=False)
    bias = changed.graph.get_parameter("layers.0.self_attn.gate.bias")
    assert abs(float(torch.sigmoid(bias.detach()).mean()) - pi) < 1e-6
    if pi == 0.25:
        assert float(bias.detach()[0]) == pytest.approx(-1.0986, abs=1e-4)
    twin = gated(decoder, pi=pi, deviation=0.0)
    assert difference(decoder, changed, rows) > 1e-3
    assert difference(decoder, twin, rows) < 1e-5


def test_a_gate_reads_its_own_heads_share_of_the_input():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))

        def forward(self, x):
            q, k, v = (p(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
            return self.o(y.transpose(1, 2).reshape(x.shape[0], -1, 8))

    torch.manual_seed(0)
    module = One().eval()
    model = trace(module, {"x": torch.zeros(2, 5, 8)}, "one")
    changed = gated(model, finetune=False, deviation=1.0)
    parameters = dict(changed.graph.named_parameters())
    (weight,) = (p for n, p in parameters.items() if n.endswith("gate.weight"))
    x = torch.randn(3, 5, 8)
    gate = torch.sigmoid((x.view(3, 5, 2, 4) * weight).sum(-1) + math.log(1 / 3))  # (batch, length, heads)
    q, k, v = (p(x).view(3, -1, 2, 4).transpose(1, 2) for p in (module.q, module.k, module.v))
    y = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
    y = y * gate.transpose(1, 2)[..., None]
    assert (changed(x) - module.o(y.transpose(1, 2).reshape(3, 5, 8))).abs().max() < 1e-6


def test_gates_are_trained_and_exported(decoder, rows):
    changed = gated(decoder)
    for p in changed.graph.parameters():
        p.requires_grad_(True)
    outputs = changed(*changed.feeds(rows))
    outputs[0].pow(2).mean().backward()
    gates = {n: p for n, p in changed.graph.named_parameters() if "gate." in n and "self_attn" in n}
    assert len(gates) == 4 and all(float(p.grad.abs().max()) > 0 for p in gates.values())
    session = ort.create(to_onnx(changed).SerializeToString(), 1)
    feeds = dict(zip([i.name for i in changed.inputs], (x.numpy() for x in changed.feeds(rows)), strict=True))
    found = ort.run(session, feeds)
    assert np.abs(found["logits"] - outputs[0].detach().numpy()).max() < 1e-4


def test_same_seed_same_gates(decoder):
    a, b = (dict(gated(decoder).graph.named_parameters()) for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_heads_that_do_not_share_the_input_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = nn.Linear(10, 12), nn.Linear(12, 10)

        def forward(self, x):
            q = self.q(x).view(x.shape[0], -1, 3, 4).transpose(1, 2)
            return self.o((torch.softmax(q @ q.transpose(-1, -2), -1) @ q).transpose(1, 2).reshape(x.shape[0], -1, 12))

    with pytest.raises(PlanishError, match="its 3 heads divide"):
        gated(trace(Odd(), {"x": torch.zeros(2, 5, 10)}, "odd"))
