"""Diagnostics: the figures by their definition, on float, statically quantized and low-bit models."""

import numpy as np
import pytest
import torch
from planish.compress import diagnostics
from planish.compress.diagnostics import inspect
from planish.compress.model import predict, trace
from planish.compress.passes import Context
from planish.compress.quantize.rtn import RoundToNearest
from planish.targets import target
from torch import nn


@pytest.fixture(scope="module")
def found(decoder, tokens):
    return inspect(decoder, list(tokens.take(slice(16)).batches(decoder, 4)))


def test_every_layer_has_its_size_and_work(decoder, found):
    rows = {r.name: r for r in found.layers}
    assert list(rows) == [
        "embed_tokens",
        *(
            f"layers.{i}.{n}"
            for i in range(2)
            for n in (*(f"self_attn.{p}_proj" for p in "qkvo"), "gate_proj", "up_proj", "down_proj")
        ),
        "lm_head",
    ]
    row = rows["layers.0.self_attn.k_proj"]
    assert (row.op, row.shape, row.bits, row.bytes) == ("linear", (32, 64), 32, 32 * 64 * 4)
    assert row.macs == 8 * 32 * 64  # a traced example has 8 tokens
    assert rows["embed_tokens"].macs == 0 and rows["embed_tokens"].input is None
    norms = 5 * 64 * 4
    assert sum(r.bytes for r in found.layers) == decoder.bytes() - norms


def test_outliers_are_those_of_what_a_layer_reads(decoder, tokens, found):
    """The head reads the normalized hidden state; its statistics are known from a model that returns it."""
    model = decoder.copy()
    head = next(n for n in model.graph.graph.nodes if "lm_head" in str([a.target for a in n.all_input_nodes]))
    output = next(n for n in model.graph.graph.nodes if n.op == "output")
    output.args = (head.args[0],)
    model.graph.graph.eliminate_dead_code()
    model.graph.recompile()
    import dataclasses

    x = predict(dataclasses.replace(model, names=("x",)), tokens.take(slice(16)).inputs)["x"].reshape(-1, 64)
    got = next(r for r in found.layers if r.name == "lm_head").input
    peak = np.abs(x).max(0)
    wide = x.astype(np.float64)
    assert got.peak == pytest.approx(np.abs(x).max())
    assert got.kurtosis == pytest.approx((wide**4).mean() / (wide**2).mean() ** 2, rel=1e-5)
    assert got.columns == int((peak >= 6).sum())
    assert got.ratio == pytest.approx(peak.max() / np.sort(peak)[31], rel=1e-5)


def test_fewer_bits_are_never_better(found):
    linears = [r for r in found.layers if r.op == "linear"]
    assert len(linears) == 15
    for row in linears:
        errors = [row.sensitivity[b] for b in (8, 4, 3, 2)]
        assert errors == sorted(errors) and 0 < errors[0] < 0.01 < errors[3] < 1


def test_attention_outputs_are_monitored(found):
    assert [a.name for a in found.attention] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(a.output.peak > 0 and a.output.kurtosis > 1 for a in found.attention)


def test_an_injected_outlier_is_seen(decoder, tokens, found):
    """A norm gain times 40 with the next columns divided by 40: the same function, another diagnosis."""
    model = decoder.copy()
    model.graph.get_parameter("layers.0.input_layernorm.weight").data[5] *= 40
    for p in "qkv":
        model.graph.get_parameter(f"layers.0.self_attn.{p}_proj.weight").data[:, 5] /= 40
    after = inspect(model, list(tokens.take(slice(16)).batches(model, 4)))
    name = "layers.0.self_attn.q_proj"
    a, b = (next(r for r in d.layers if r.name == name).input for d in (found, after))
    assert b.peak > 10 * a.peak and b.kurtosis > 3 * a.kurtosis and b.ratio > 10 * a.ratio
    assert b.columns > a.columns


def test_without_data_there_are_sizes_only(decoder):
    found = inspect(decoder)
    assert all(r.input is None and r.sensitivity is None and r.weight_peak > 0 for r in found.layers)
    assert found.attention == ()


def test_a_low_bit_model_shows_op_bits_bytes_and_error(decoder, tokens):
    context = Context(decoder, None, target.load("host"), torch.Generator().manual_seed(0))
    model = RoundToNearest(bits=4, group=32).apply(decoder, context)
    rows = {r.name: r for r in inspect(model, list(tokens.take(slice(4)).batches(model, 4))).layers}
    row = rows["layers.0.self_attn.q_proj"]
    assert (row.op, row.bits, row.bytes) == ("linear_wna16", 4, 64 * 64 // 2 + 64 * 2 * 4)
    assert 0 < row.error < 0.2 and row.weight_peak is None
    assert row.input.peak > 0 and row.sensitivity is None
    assert rows["lm_head"].bits == 32 and rows["lm_head"].error is None


def test_a_statically_quantized_model_has_eight_bits(quantized, residual, images):
    before, after = inspect(residual, list(images.batches(residual, 32))), inspect(quantized)
    assert {r.name for r in before.layers} == {"stem", "depthwise", "point", "down", "branch", "head"}
    assert all(r.input is not None for r in before.layers)
    assert {r.bits for r in after.layers} == {8}
    assert sum(r.macs for r in after.layers) == sum(r.macs for r in before.layers)


def test_tied_weights_are_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)

        def forward(self, ids):
            return nn.functional.linear(self.embed(ids), self.embed.weight)

    model = trace(Tied(), {"ids": torch.zeros(2, 3, dtype=torch.int64)}, "tied")
    assert [r.bytes for r in inspect(model).layers] == [160, 0]
    assert diagnostics.THRESHOLD == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_figures_of_a_weight_do_not_depend_on_how_it_is_cut(monkeypatch, dtype):
    weight = torch.randn(37, 53, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, 5] = -7
    before, wide = weight.clone(), weight.double()
    monkeypatch.setattr(diagnostics, "CHUNK", 100)
    peak, kurtosis = diagnostics._weight(weight)
    assert torch.equal(weight, before)
    assert peak == 7
    assert kurtosis == pytest.approx(float(wide.pow(4).mean() / wide.square().mean() ** 2), rel=1e-12)
    assert diagnostics._weight(torch.zeros(2, 2)) == (0, 0)
