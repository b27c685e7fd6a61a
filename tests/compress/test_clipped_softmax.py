"""Clipped softmax: the method card's figures, the exported form, and that it trains. (Trained effects do not show at this size.)"""

import dataclasses

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import attention, layers, recipe
from planish.compress.distill import Distill
from planish.compress.evaluation import closeness, language
from planish.compress.model import Text, predict, trace
from planish.compress.passes import Context
from planish.compress.rewrite.clipped_softmax import ClippedSoftmax
from planish.export.lowering import to_onnx
from planish.targets import target
from torch import nn

T = 128


class Bare(nn.Module):
    """Attention that shows its probabilities: the values are the identity."""

    def forward(self, q, k):
        """q, k (batch, length, size) -> (batch, length, length)."""
        return torch.softmax(q @ k.transpose(1, 2), -1) @ torch.eye(T)


class Encoder(nn.Module):
    """Fused attention of two heads with one of three kinds of mask."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).view(x.shape[0], -1, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = None
        if self.kind == "float":
            mask = x[:, None, None, :, 0] * 3
        elif self.kind == "bool":
            mask = torch.ones(6, 6, dtype=torch.bool).tril()
        if self.kind == "shared":
            k, v = k[:, :1], v[:, :1]
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.kind == "causal", enable_gqa=self.kind == "shared"
        )
        return self.o(y.transpose(1, 2).reshape(x.shape[0], -1, 16))


def with_original(model, data=None):
    return Context(model, data, target.load("host"), torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bare():
    return trace(Bare(), {"q": torch.zeros(2, T, 4), "k": torch.zeros(2, T, 4)}, "bare")


@pytest.fixture(scope="module")
def gaussian():
    """q k^T with standard normal entries: q is the score matrix itself, k the first unit vectors."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, T, T, generator=generator)


@pytest.fixture(scope="module")
def wide():
    return trace(Bare(), {"q": torch.zeros(2, T, T), "k": torch.zeros(2, T, T)}, "wide")


def clipped(model, alpha, length=T):
    return ClippedSoftmax(alpha=alpha, length=length).apply(model, with_original(model))


def test_gamma_zero_is_softmax(bare):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, T, 4, generator=generator), torch.randn(3, T, 4, generator=generator)
    assert (clipped(bare, 0.0)(*x) - bare(*x)).abs().max() < 1e-7


@pytest.mark.parametrize("gamma, share", [(-0.003, 0.33), (-0.03, 0.96), (-12 / 128, 0.998)])
def test_share_of_exact_zeros_for_gaussian_scores(wide, gaussian, gamma, share):
    """METHODS A5 (c)."""
    p = clipped(wide, -gamma * T)(gaussian, torch.eye(T).expand(8, T, T))
    assert abs(float((p == 0).double().mean()) - share) < 0.01


def test_rows_no_longer_add_up_to_one(wide, gaussian):
    """METHODS A5 (d): about 0.07 at gamma -0.03."""
    p = clipped(wide, 0.03 * T)(gaussian, torch.eye(T).expand(8, T, T))
    assert abs(float(p.sum(-1).mean()) - 0.07) < 0.02
    assert float(p.min()) >= 0 and float(p.max()) <= 1


def test_zeros_begin_where_the_formula_says(wide, gaussian):
    eye = torch.eye(T).expand(8, T, T)
    before, after = wide(gaussian, eye), clipped(wide, 0.03 * T)(gaussian, eye)
    threshold = 0.03 / 1.03
    assert ((after == 0) | (before > threshold - 1e-6)).all()
    assert ((after > 0) | (before < threshold + 1e-6)).all()


def test_what_is_clipped_has_no_gradient(wide, gaussian):
    model = clipped(wide, 0.03 * T)
    x = gaussian[:1].clone().requires_grad_()
    p = model(x, torch.eye(T)[None])
    (row, column) = (p[0] == 0).nonzero()[0].tolist()
    p[0, row, column].backward()
    assert float(x.grad.abs().max()) == 0
    x.grad = None
    (row, column) = (p[0] > 0).nonzero()[0].tolist()
    clipped(wide, 0.03 * T)(x, torch.eye(T)[None])[0, row, column].backward()
    assert float(x.grad.abs().max()) > 0


def test_onnx_is_softmax_mul_add_clip(bare):
    graph = to_onnx(clipped(bare, 4.0)).graph
    makers = {o: n for n in graph.node for o in n.output}
    node = next(n for n in graph.node if n.op_type == "Clip")
    found = []
    while node is not None and node.op_type != "MatMul":
        found.append(node.op_type)
        node = makers.get(node.input[0])
    assert found == ["Clip", "Add", "Mul", "Softmax"]


@pytest.mark.parametrize("kind", ["none", "float", "bool", "causal", "shared"])
def test_fused_attention_is_written_out_exactly(kind):
    torch.manual_seed(0)
    model = trace(Encoder(kind), {"x": torch.zeros(2, 6, 16)}, kind)
    x = torch.randn(3, 6, 16)
    assert [a.name for a in attention.find(model.graph)] == ["scaled_dot_product_attention"]  # 'o' has no prefix
    changed = ClippedSoftmax(alpha=0.0, length=6).apply(model, with_original(model))
    assert (changed(x) - model(x)).abs().max() < 1e-6
    assert not any(layers.op(n) == attention.FUSED for n in changed.graph.graph.nodes)


@pytest.mark.parametrize("fused", [True, False])
def test_a_decoder_keeps_its_function_at_gamma_zero_and_its_cache(make_decoder, tokens, fused):
    model = make_decoder(fused)
    changed = clipped(model, 0.0)
    names = [a.name for a in attention.find(changed.graph)]
    assert names == ["layers.0.self_attn", "layers.1.self_attn"]
    rows = {k: v[:4] for k, v in tokens.inputs.items()}
    before, after = predict(model, rows), predict(changed, rows)
    assert all(np.abs(before[k] - after[k]).max() < 1e-4 for k in before)
    assert changed.names == model.names


def test_it_changes_the_function_and_training_brings_it_back(decoder, tokens):
    changed = clipped(decoder, 8.0, 32)
    assert [e.action for e in changed.receipt] == ["rewritten"] * 2
    windows = tokens.inputs["input_ids"][:16]
    start = closeness(language(decoder), language(changed), windows).kl
    assert start > 0.01
    config = Distill(epochs=6, batch=8, optimizer="adamw", learning_rate=2e-3, temperature=1.0, precision="float32")
    trained = config.apply(changed, with_original(decoder, tokens))
    end = closeness(language(decoder), language(trained), windows).kl
    assert end < 0.5 * start, (start, end)


def test_gamma_belongs_to_the_training_length(decoder):
    text = Text("{}", None, 512, False)
    assert ClippedSoftmax(alpha=12.0).gamma(dataclasses.replace(decoder, text=text)) == pytest.approx(-0.0234, abs=1e-4)
    with pytest.raises(PlanishError, match="names no longest text; give the training length"):
        ClippedSoftmax().apply(decoder, with_original(decoder))


def test_a_model_without_attention_is_refused(residual, decoder):
    with pytest.raises(PlanishError, match="has no attention"):
        clipped(residual, 1.0)
    with pytest.raises(PlanishError, match=r"'nothing' matches no attention; there are 'layers.0.self_attn'"):
        ClippedSoftmax(length=8, layers=("nothing",)).apply(decoder, with_original(decoder))


def test_quantizing_before_training_is_refused():
    text = "name: x\npasses:\n  - rewrite.clipped_softmax\n  - quantize.static\n"
    with pytest.raises(PlanishError, match=r"line 4: 'rewrite.clipped_softmax' changes what the network computes"):
        recipe.parse(text, "x.yaml")
    assert recipe.parse(text.replace("  - quantize", "  - distill\n  - quantize"), "x.yaml")
