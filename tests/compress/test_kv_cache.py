"""The pass on the key/value cache: where the op stands, steps give what the whole gives, closeness, refusals, and the finder behind it."""

import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import evaluation, forecast, hugging_face, kv_caches, layers, recipe, text
from planish.compress.model import Input, trace
from planish.compress.passes import Context
from planish.compress.quantize.kv_cache import KvCache
from planish.compress.quantize.rtn import RoundToNearest
from planish.export import lowering
from planish.kernels import kv_cache
from planish.runtimes import ort
from planish.targets import target

WEIGHTS = Path(__file__).resolve().parents[2] / "benchmarks" / "weights" / "decoder"


def run(model, *steps):
    context = Context(model, None, target.load("host"), torch.Generator().manual_seed(0))
    for step in steps:
        model = step.apply(model, context)
    return model


def scored(model, ids, cuts):
    """Scores of ids (batch, length) in steps of the lengths `cuts`, and the last step's states."""
    states = [i.empty(len(ids)) for i in model.inputs if i.state]
    found = []
    with torch.no_grad():
        for part in ids.split(cuts, 1):
            scores, *states = model(part, *states)
            found.append(scores)
    return torch.cat(found, 1), states


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", kv_cache.FORMATS)
def test_the_cache_holds_what_8_bits_give_back(make_decoder, tokens, fused, form):
    model = make_decoder(fused)
    result = run(model, KvCache(format=form))
    ids = torch.from_numpy(tokens.inputs["input_ids"][:4])
    whole, states = scored(result, ids, [32])
    steps, _ = scored(result, ids, [20, 1, 1, 10])
    assert torch.equal(torch.stack(states[:2]), torch.stack([torch.ops.planish.kv_cache(s, form) for s in states[:2]]))
    torch.testing.assert_close(steps, whole, rtol=1e-3, atol=1e-2)  # float sums in another order may move a code
    before, _ = scored(model, ids, [32])
    change = float((whole - before).norm() / before.norm())
    assert 0 < change < {"int8": 0.02, "e4m3": 0.1}[form]
    found = kv_caches.find(result)
    assert [c.key.format for c in found] == [c.value.format for c in found] == [form] * 2


@pytest.mark.parametrize("fused", [True, False])
def test_every_cache_and_its_attention_are_found(make_decoder, fused):
    model = make_decoder(fused)
    found = kv_caches.find(model)
    assert [c.name for c in found] == ["0", "1"]
    assert [(s.output, s.heads, s.size, s.format) for c in found for s in (c.key, c.value)] == [
        (1, 2, 16, "none"), (2, 2, 16, "none"), (3, 2, 16, "none"), (4, 2, 16, "none"),
    ]  # fmt: skip
    for cached in found:
        item = kv_caches.attention_of(model, cached)
        assert item.scale == pytest.approx(16**-0.5)
        assert item.query.meta["val"].shape[1] == 4 and item.mixed.meta["val"].shape[1:2] == (4,)


def test_a_mask_that_hides_more_than_the_future_is_seen(make_decoder):
    model = make_decoder(True)
    graph = model.graph.graph
    (compare,) = [n for n in graph.nodes if layers.op(n) == "aten.le"][:1]
    first, second = compare.args
    with graph.inserting_after(compare):  # the nearest four alone
        least = graph.call_function(torch.ops.aten.sub.Tensor, (second, 4))
    with graph.inserting_after(least):
        near = graph.call_function(torch.ops.aten.gt.Tensor, (first, least))
    with graph.inserting_after(near):
        both = graph.call_function(torch.ops.aten.logical_and.default, (compare, near))
    compare.replace_all_uses_with(both, delete_user_cb=lambda n: n is not both)
    changed = replace(model, graph=torch.fx.GraphModule(model.graph, graph))
    with pytest.raises(PlanishError, match="layer 0: its mask is not the causal one"):
        kv_caches.attention_of(changed, kv_caches.find(changed)[0])
    assert kv_caches.attention_of(changed, kv_caches.find(changed)[1])


def test_receipt_and_forecast(decoder):
    result = run(decoder, RoundToNearest(bits=4, group=32), KvCache())
    entries = [e for e in result.receipt if "cache" in e.tensor]
    assert [e.tensor for e in entries] == [f"{k} cache of layer {i}" for i in (0, 1) for k in ("key", "value")]
    assert {(e.before_bytes, e.after_bytes) for e in entries} == {(2 * 16 * 4, 2 * (16 + 4))}
    assert "int8" in entries[0].reason
    steps = [("quantize.rtn", RoundToNearest(bits=4, group=32)), ("quantize.kv_cache", KvCache())]
    told = forecast.forecast(decoder, steps, None, 0)
    assert told.bytes == result.bytes() and not told.problems and not told.unknown
    assert [name for name, _ in recipe.load("w4a16-kv8").passes] == ["quantize.rtn", "quantize.kv_cache"]


def test_exported_to_onnx(decoder, tokens):
    result = run(decoder, KvCache())
    ids = tokens.inputs["input_ids"][:2]
    with torch.no_grad():
        want = result(*result.feeds({"input_ids": ids}))
    session = ort.create(lowering.to_onnx(result).SerializeToString(), 1)
    feeds = {i.name: x.numpy() for i, x in zip(result.inputs, result.feeds({"input_ids": ids}), strict=True)}
    found = ort.run(session, feeds)
    np.testing.assert_allclose(found["present_key_0"], want[1].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["logits"], want[0].numpy(), rtol=1e-2, atol=2e-2)


def test_refusals(decoder, residual):
    with pytest.raises(PlanishError, match=r"quantize\.kv_cache: 'residual' carries no state; a causal language model"):
        run(residual, KvCache())
    with pytest.raises(PlanishError, match="no state"):
        KvCache().foresee(residual, frozenset())
    with pytest.raises(PlanishError, match=r"cache of 'decoder' is quantized already \(layer 0\)"):
        run(decoder, KvCache(), KvCache())


def test_a_state_that_is_no_cache_is_named():
    class Sums(torch.nn.Module):
        def forward(self, x, past_key_0, past_value_0):
            return x, past_key_0 + x, torch.cat([past_value_0, x], 2)

    dims = (None, None, "past", None)
    declared = [Input("x", (1, 2, 4, 8), torch.float32), *(Input(f"past_{k}_0", (1, 2, 4, 8), torch.float32, dims, True) for k in ("key", "value"))]  # fmt: skip
    declared[0] = replace(declared[0], dims=dims)
    module = trace(Sums(), {i.name: torch.zeros(2, *i.shape[1:]) for i in declared}, "sums", declared)
    with pytest.raises(PlanishError, match="'past_key_0' is not continued by a concatenation"):
        run(module, KvCache())


def test_perplexity_of_a_trained_model_stays(data_folder):
    """Within a thousandth in int8, within a hundredth in 8-bit floats, on text that it was not trained on."""
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    model = hugging_face.load(WEIGHTS)
    assert model.text is not None
    with lzma.open(data_folder / "wikitext2" / "valid.txt.xz", "rt", encoding="utf8") as file:
        words = file.read()[-12_000:]  # its end was held out
    rows = text.windows(words, model.text, 256)[:8]
    before = evaluation.perplexity(evaluation.language(model), rows).value
    for form, limit in (("int8", 1e-3), ("e4m3", 1e-2)):
        result = run(model, KvCache(format=form))
        for cached in kv_caches.find(result):
            assert kv_caches.attention_of(result, cached).scale == pytest.approx(64**-0.5)
        after = evaluation.perplexity(evaluation.language(result), rows).value
        print(f"{form}: perplexity {before:.4f} -> {after:.4f}")
        assert abs(after / before - 1) < limit
