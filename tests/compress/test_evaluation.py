"""Perplexity and closeness by the definition, streaming, and on every runtime alike."""

import dataclasses

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import evaluation
from planish.compress.evaluation import Language, closeness, language, perplexity
from planish.compress.model import predict
from planish.export.lowering import to_onnx
from planish.runtimes import ort
from torch.nn import functional as F


@pytest.fixture(scope="module")
def windows(tokens):
    return tokens.inputs["input_ids"]


@pytest.fixture(scope="module")
def logits(decoder, tokens):
    return torch.from_numpy(predict(decoder, tokens.inputs)["logits"])


def shifted(decoder, amount=0.3):
    """A model that is a little off."""
    model = decoder.copy()
    weight = model.graph.get_parameter("lm_head.weight")
    weight.data += amount * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    return model


def test_perplexity_is_that_of_the_definition(decoder, windows, logits):
    found = perplexity(language(decoder), windows)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(windows[:, 1:]).flatten())
    assert found.n == 64 * 31
    assert abs(found.nats - float(expected)) < 1e-5
    assert found.value == pytest.approx(np.exp(found.nats))
    assert 2 < found.value < 8  # trained: 64 tokens are guessed as well as 2 to 8


def test_memory_is_that_of_one_batch(decoder, windows, monkeypatch):
    whole = perplexity(language(decoder), windows)
    monkeypatch.setattr(evaluation, "SCORES", 32 * 64 * 2)
    seen = []
    inner = language(decoder)
    model = dataclasses.replace(inner, run=lambda a: (seen.append(len(a["input_ids"])), inner.run(a))[1])
    assert abs(perplexity(model, windows).nats - whole.nats) < 1e-6
    assert max(seen) == 2


def test_closeness_of_a_model_to_itself_and_to_another(decoder, windows, logits):
    model = language(decoder)
    same = closeness(model, model, windows)
    assert (same.kl, same.agreement, same.n) == (0, 1, 64 * 32)
    other = shifted(decoder)
    q = torch.from_numpy(predict(other, {"input_ids": windows})["logits"])
    p, q = logits.double().log_softmax(-1), q.double().log_softmax(-1)
    found = closeness(model, language(other), windows)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < found.kl < 1 and found.agreement < 1
    assert found.kl < closeness(model, language(shifted(decoder, 0.6)), windows).kl


def test_onnx_runtime_gives_the_same_perplexity(decoder, windows):
    session = ort.create(to_onnx(decoder).SerializeToString(), 1)
    model = language(decoder)
    other = dataclasses.replace(model, run=lambda arrays: ort.run(session, arrays), source="onnx")
    assert perplexity(other, windows[:8]).nats == pytest.approx(perplexity(model, windows[:8]).nats, abs=1e-5)


def test_steps_through_the_cache_give_the_scores_of_the_whole(decoder, windows):
    model = language(decoder)
    whole, states, parts = model.scores(windows[:2]), model.empty(2), []
    for start, stop in ((0, 5), (5, 6), (6, 32)):
        scores, states = model.step(windows[:2, start:stop], states)
        parts.append(scores)
    assert np.abs(np.concatenate(parts, 1) - whole).max() < 1e-4


def test_a_score_that_is_ruled_out_counts_for_nothing():
    before, after = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.5, 1.0, -torch.inf]])
    assert evaluation.divergence(before, before) == 0
    assert 0 < evaluation.divergence(before, after) < 1


@pytest.mark.parametrize(
    "given, message",
    [
        (np.zeros((2, 1), np.int64), "at least 2 tokens"),
        (np.zeros((0, 8), np.int64), "at least 2 tokens"),
        (np.full((2, 8), 64), "tokens from 64 to 64 do not fit 'decoder', whose vocabulary has 64"),
    ],
)
def test_windows_that_do_not_fit_are_refused(decoder, given, message):
    with pytest.raises(PlanishError, match=message):
        perplexity(language(decoder), given)


def test_scores_that_are_no_numbers_are_refused(decoder, windows):
    model = decoder.copy()
    model.graph.get_parameter("norm.weight").data[0] = torch.nan
    with pytest.raises(PlanishError, match="NaN"):
        perplexity(language(model), windows)


def test_other_models_are_no_language_models(residual):
    with pytest.raises(PlanishError, match="has the inputs 'image'; a language model takes input_ids"):
        language(residual)
    assert not evaluation.is_causal(residual)


def test_two_vocabularies_are_refused(decoder, windows):
    model = language(decoder)
    narrow = Language(lambda a: {**model.run(a), "logits": model.run(a)["logits"][..., :60]}, model.inputs, model.outputs, "narrow")  # fmt: skip
    with pytest.raises(PlanishError, match="vocabulary"):
        closeness(model, narrow, windows)
