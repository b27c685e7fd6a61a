"""Rotations: the same function in float64, outliers gone, fewer bits possible, and where a rotation offline does not fit."""

import copy
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import evaluation, journal, layers
from planish.compress.data import Data
from planish.compress.model import Model, predict, trace
from planish.compress.moments import Moments
from planish.compress.passes import Context
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.mamba_rotations import observe
from planish.compress.quantize.rotate import Rotate, Rotation
from planish.export.lowering import to_onnx
from planish.targets import target
from torch import nn
from torch.nn import functional as F

EVERY = [
    Rotate(),
    Rotate(kind="klt-hadamard"),
    Rotate(attention="online"),
    Rotate(residual=False, attention="none"),
    Rotate(online=False),
]


def apply(method, model, data):
    return method.apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))


def perplexity(model, data):
    return evaluation.perplexity(evaluation.language(model), data.inputs["input_ids"]).value


def hadamards(model):
    return [n for n in model.graph.graph.nodes if layers.op(n) == "planish.hadamard"]


def reasons(model):
    return {e.tensor: (e.action, e.reason) for e in model.receipt}


@pytest.fixture(scope="module")
def wide(decoder_module, decoder) -> Model:
    """The decoder in float64."""
    module = copy.deepcopy(decoder_module).double()
    declared = [replace(i, dtype=torch.float64) if i.state else i for i in decoder.inputs]
    examples = {i.name: torch.zeros((2, *i.shape[1:]), dtype=i.dtype) for i in declared}
    return replace(trace(module, examples, "decoder", declared), names=decoder.names)


@pytest.fixture(scope="module")
def injected(inject, decoder):
    return inject(decoder)[0]


@pytest.mark.parametrize("method", EVERY)
def test_the_function_is_unchanged_in_float64(wide, tokens, method):
    few = Data({"input_ids": tokens.inputs["input_ids"][:4]}, None, "few")
    before = predict(wide, few.inputs)["logits"]
    after = predict(apply(method, wide, few), few.inputs)["logits"]
    assert before.dtype == np.float64
    assert np.abs(after - before).max() <= 1e-9 * np.abs(before).max()


def test_a_decoder_is_rotated_offline_but_for_its_down_projections(decoder, tokens):
    model = apply(Rotate(), decoder, tokens)
    assert [layers.layer(u) for n in hadamards(model) for u in n.users] == ["layers.0.down_proj", "layers.1.down_proj"]
    found = reasons(model)
    assert found["residual stream"] == ("folded", "rotated by a Hadamard matrix of order 64; 5 norms folded into the next linears")  # fmt: skip
    assert "carry rotated values" in found["values of layers.1.self_attn"][1]
    assert "of order 96" in found["activation of layers.0.down_proj"][1]
    unfused = predict(model, {"input_ids": tokens.inputs["input_ids"][:4]})["logits"]
    before = predict(decoder, {"input_ids": tokens.inputs["input_ids"][:4]})["logits"]
    assert np.abs(unfused - before).max() <= 1e-4 * np.abs(before).max()


def test_written_out_attention_is_rotated_too(make_decoder, tokens):
    model = apply(Rotate(), make_decoder(False), tokens)
    assert {t for t in reasons(model) if t.startswith("values of")} == {"values of layers.0.self_attn", "values of layers.1.self_attn"}  # fmt: skip


def test_generation_continues_from_rotated_caches(decoder, tokens):
    model = apply(Rotate(), decoder, tokens)
    row = tokens.inputs["input_ids"][:2]
    language = evaluation.language(model)
    whole = language.scores(row)
    first, states = language.step(row[:, :20], language.empty(2))
    second, _ = language.step(row[:, 20:], states)
    assert np.allclose(np.concatenate([first, second], 1), whole, atol=1e-3)
    plain = evaluation.language(decoder).step(row[:, :20], language.empty(2))[1]
    assert np.allclose(states["past_key_0"], plain["past_key_0"], atol=1e-3)
    assert not np.allclose(states["past_value_0"], plain["past_value_0"], atol=1e-2)


def test_perplexity_at_eight_bits_stays_and_at_four_bits_recovers(decoder, injected, tokens):
    original = perplexity(decoder, tokens)
    eight, four = Dynamic(), Dynamic(bits=4, group="auto", activations=4, granularity="group")
    assert perplexity(apply(eight, injected, tokens), tokens) > 1.02 * original
    clean, ruined = (perplexity(apply(four, m, tokens), tokens) for m in (decoder, injected))
    assert ruined > 2 * clean
    for method in (Rotate(), Rotate(kind="klt-hadamard"), Rotate(residual=False, attention="online")):
        rotated = apply(method, injected, tokens)
        assert perplexity(apply(eight, rotated, tokens), tokens) < 1.01 * original
        assert perplexity(apply(four, rotated, tokens), tokens) < 1.05 * clean


def test_klt_hadamard_gives_equal_channels_and_only_in_this_order():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator, dtype=torch.float64)
    x = torch.randn(4096, 256, generator=generator, dtype=torch.float64) @ (0.3 * mixing / 16 + torch.eye(256))
    x[:, :5] *= 20

    def ratio(value):
        power = value.square().mean(0)
        return float(power.max() / power.min())

    second = x.T @ x
    rotation = Rotation(256, torch.Generator().manual_seed(1), second)
    spread = Rotation(256, torch.Generator().manual_seed(1))
    vectors = torch.linalg.eigh(second).eigenvectors
    assert ratio(x) > 100
    assert ratio(rotation.turn(x)) <= 1.001
    assert 1.1 < ratio(spread.turn(x)) < 3
    assert ratio(spread.turn(x) @ vectors) > 5  # the wrong order
    assert ratio(x @ vectors) > ratio(x)  # K alone is worse than nothing


def test_klt_of_the_stream_makes_what_the_layers_read_even(injected, tokens):
    """The norms' mean square per channel, over all of them together as K was taken."""
    ratios = []
    for kind in ("hadamard", "klt-hadamard"):
        model = apply(Rotate(kind=kind, online=False), injected, tokens)
        moments = Moments(64)
        sources = {n.args[0] for n in model.graph.graph.nodes if layers.op(n) == "aten.linear" and "o_proj" not in layers.layer(n) and "down_proj" not in layers.layer(n)}  # fmt: skip
        observe(model.graph, dict.fromkeys(sources, moments.add), lambda m=model: tokens.batches(m, 64))
        ratios.append(float(moments.square.max() / moments.square.min()))
    assert ratios[1] < 1.01 < ratios[0]


class Encoder(nn.Module):
    """Pre-norm with LayerNorm, learned positions, one linear for q, k and v, GELU; the head shares the table when `tied`."""

    def __init__(self, tied, post=False):
        super().__init__()
        self.table, self.place = nn.Embedding(30, 36), nn.Parameter(torch.randn(1, 6, 36))
        self.layers = nn.ModuleList(nn.ModuleDict({
            "first": nn.LayerNorm(36), "mix": nn.Linear(36, 108), "out": nn.Linear(36, 36),
            "second": nn.LayerNorm(36), "up": nn.Linear(36, 84), "down": nn.Linear(84, 36),
        }) for _ in range(2))  # fmt: skip
        self.last, self.head = nn.LayerNorm(36), nn.Linear(36, 30, bias=False)
        self.tied, self.post = tied, post
        if tied:
            self.head.weight = self.table.weight
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm):
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias)

    def forward(self, ids):
        x = self.table(ids) + self.place
        for block in self.layers:
            y = x if self.post else block["first"](x)
            q, k, v = (t.unflatten(-1, (3, 12)).transpose(1, 2) for t in block["mix"](y).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["out"](y)
            x = block["first"](x) if self.post else x
            y = x if self.post else block["second"](x)
            x = x + block["down"](F.gelu(block["up"](y)))
            x = block["second"](x) if self.post else x
        return self.head(self.last(x))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "klt-hadamard"])
def test_layer_norms_lose_their_mean_and_a_shared_table_stays_shared(tied, kind):
    torch.manual_seed(0)
    model = trace(Encoder(tied).double(), {"ids": torch.zeros(2, 6, dtype=torch.int64)}, "encoder")
    data = Data({"ids": np.random.default_rng(0).integers(0, 30, (8, 6))}, None, "ids")
    rotated = apply(Rotate(kind=kind), model, data)
    before, after = (predict(m, data.inputs)["output"] for m in (model, rotated))
    assert np.abs(after - before).max() <= 1e-9 * np.abs(before).max()
    found = reasons(rotated)
    assert found["residual stream"][0] == "folded"
    assert ("at run time where it begins or ends" in found["residual stream"][1]) == tied
    assert any("not rotated offline" in r for a, r in found.values() if a == "left")  # q, k and v come from one linear
    assert "2 Hadamard" not in found["activation of layers.0.out"][1]
    assert "a Hadamard matrix of order 84" in found["activation of layers.0.down"][1]
    assert not any(layers.op(n) == "aten.layer_norm" for n in rotated.graph.graph.nodes) or tied
    names = dict(rotated.graph.named_parameters())
    assert sum(tuple(p.shape) == (30, 36) for p in names.values()) == (1 if tied else 2)


def test_a_post_norm_model_is_rotated_in_front_of_every_layer():
    torch.manual_seed(0)
    model = trace(Encoder(False, post=True), {"ids": torch.zeros(2, 6, dtype=torch.int64)}, "encoder")
    data = Data({"ids": np.random.default_rng(0).integers(0, 30, (8, 6))}, None, "ids")
    rotated = apply(Rotate(), model, data)
    assert reasons(rotated)["residual stream"][0] == "left"
    assert len(hadamards(rotated)) == 9  # four in a block, and the head
    before, after = (predict(m, data.inputs)["output"] for m in (model, rotated))
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


def test_onnx_runtime_computes_a_rotated_and_quantized_model(injected, tokens):
    few = {"input_ids": tokens.inputs["input_ids"][:4]}
    model = apply(Dynamic(), apply(Rotate(attention="online"), injected, tokens), tokens)
    session = onnxruntime.InferenceSession(to_onnx(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: few["input_ids"] if i.name == "input_ids" else i.empty(4).numpy() for i in model.inputs}
    logits, expected = np.asarray(session.run(["logits"], feeds)[0]), predict(model, few)["logits"]
    assert np.linalg.norm(logits - expected) < 0.02 * np.linalg.norm(expected)


def test_errors_name_what_is_accepted(decoder, tokens):
    quantized = apply(Dynamic(), decoder, tokens)
    with pytest.raises(PlanishError, match="quantized already"):
        apply(Rotate(), quantized, tokens)
    with pytest.raises(PlanishError, match="'nothing' matches no linear layer"):
        apply(Rotate(layers=("nothing",)), decoder, tokens)
    with pytest.raises(PlanishError, match="calibrates on data; none was given"):
        apply(Rotate(kind="klt-hadamard"), decoder, None)
    bare = trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2)), {"x": torch.zeros(2, 1, 2, 2)}, "net")  # fmt: skip
    with pytest.raises(PlanishError, match="nothing of 'net' was rotated"):
        apply(Rotate(online=False), bare, None)


@pytest.mark.parametrize("method", [Rotate(), Rotate(residual=False)])
def test_rotated_weights_go_to_the_journal_one_after_the_other(decoder, tokens, tmp_path, monkeypatch, method):
    """With the same bits as in memory, which at no time holds more than the layers that were rewritten last."""
    plain = apply(method, decoder, tokens)
    monkeypatch.setattr(journal, "SPILL", 1)
    held, spill = [], journal.Journal.spill

    def watched(log, module):
        own = [p for p in module.parameters() if not any(m.holds(p) for m in log.maps)]
        held.append(sum(p.numel() for p in own))
        spill(log, module)

    monkeypatch.setattr(journal.Journal, "spill", watched)
    log = journal.Journal(tmp_path / "partial", identity={})
    log.spill(model := decoder.copy().graph)
    held.clear()
    context = Context(decoder, tokens, target.load("host"), torch.Generator().manual_seed(0), journal=log)
    spilled = method.apply(replace(decoder, graph=model), context)
    largest = max(p.numel() for p in decoder.graph.parameters())
    assert len(held) > 7
    assert max(held) <= 3 * largest
    want, got = dict(plain.graph.named_parameters()), dict(spilled.graph.named_parameters())
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    few = {"input_ids": tokens.inputs["input_ids"][:2]}
    assert np.array_equal(predict(plain, few)["logits"], predict(spilled, few)["logits"])
