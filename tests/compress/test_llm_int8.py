"""LLM.int8() on a trained decoder with outliers put in: perplexity, frozen columns, the counter in every runtime, and errors."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import evaluation, layers, program_file
from planish.compress.data import Data
from planish.compress.model import from_program, predict, trace
from planish.compress.passes import Context
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.llm_int8 import COUNTER, LlmInt8
from planish.export.lowering import to_onnx
from planish.targets import target
from torch import nn


def apply(method, model, data):
    return method.apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))


def perplexity(model, data):
    return evaluation.perplexity(evaluation.language(model), data.inputs["input_ids"]).value


@pytest.fixture(scope="module")
def injected(inject, decoder):
    """The decoder with four outlier channels behind each norm of a block, and those channels by gain."""
    return inject(decoder)


@pytest.fixture(scope="module")
def quantized(injected, tokens):
    return apply(LlmInt8(), injected[0], tokens)


def test_perplexity_stays_where_plain_int8_loses_it(decoder, injected, quantized, tokens):
    original = perplexity(decoder, tokens)
    assert perplexity(injected[0], tokens) == pytest.approx(original, rel=1e-5)
    plain = perplexity(apply(Dynamic(), injected[0], tokens), tokens)
    assert plain > original * 1.02
    assert perplexity(quantized, tokens) < original * 1.005
    for other in (LlmInt8(exact=False), LlmInt8(frozen=False)):
        assert perplexity(apply(other, injected[0], tokens), tokens) < original * 1.005


def test_the_frozen_columns_hold_the_outliers_and_stand_in_the_receipt(injected, quantized):
    for gain, channels in injected[1].items():
        block, _, norm = gain.removesuffix(".weight").rpartition(".")
        reader = "self_attn.q_proj" if norm == "input_layernorm" else "gate_proj"
        columns = layers.tensor(quantized.graph, f"{block}.{reader}.weight_columns")
        assert set(channels) <= set(columns.tolist())
        line = next(e for e in quantized.receipt if e.tensor == f"{block}.{reader}.weight")
        assert f"{len(columns)} of 64 columns float16" in line.reason
        assert line.error is not None
        assert line.error < 0.01
    assert next(e for e in quantized.receipt if e.tensor == "lm_head.weight").action == "left"


def test_the_counter_is_an_output_for_each_sample_in_front_of_the_states(quantized, decoder, tokens, tmp_path):
    assert quantized.names == (decoder.names[0], COUNTER, *decoder.names[1:])
    few = {"input_ids": tokens.inputs["input_ids"][:6]}
    assert predict(quantized, few, batch=4)[COUNTER].tolist() == [0] * 6
    program_file.save(quantized.program(), tmp_path / "model.pt2")
    program = from_program(program_file.load(tmp_path / "model.pt2"), None, "again")
    again = predict(replace(program, inputs=quantized.inputs, names=quantized.names), few)
    assert np.array_equal(again["logits"], predict(quantized, few)["logits"])


def test_generation_carries_its_states_past_the_counter(quantized, tokens):
    """The counter is an output between the scores and the states; scored in two pieces, a text has the scores of the whole."""
    rows = tokens.inputs["input_ids"][:3]
    language = evaluation.language(quantized)
    first, states = language.step(rows[:, :20], language.empty(3))
    assert [i.name for i in quantized.inputs if i.state] == list(states)
    assert all(v.shape[2] == 20 for v in states.values())
    second, _ = language.step(rows[:, 20:], states)
    np.testing.assert_allclose(np.concatenate([first, second], 1), language.scores(rows), atol=1e-3)


def test_values_that_calibration_did_not_see_are_counted_in_torch_and_in_onnx(injected, tokens):
    tokens = Data({"input_ids": tokens.inputs["input_ids"][:2]}, None, "two rows")
    model = apply(LlmInt8(threshold=1.5), injected[0], tokens)
    other = np.random.default_rng(0).integers(0, 64, (5, 16))
    found = predict(model, {"input_ids": other})
    assert found[COUNTER].min() > 0
    session = onnxruntime.InferenceSession(to_onnx(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: other if i.name == "input_ids" else i.empty(5).numpy() for i in model.inputs}
    logits, beyond = session.run(["logits", COUNTER], feeds)
    assert np.abs(np.asarray(beyond) - found[COUNTER]).max() <= 2  # a value at the threshold may round to either side
    np.testing.assert_allclose(logits, found["logits"], atol=0.05)


def test_two_passes_share_one_counter(injected, tokens):
    first = apply(LlmInt8(layers=("layers.0.*",)), injected[0], tokens)
    both = apply(LlmInt8(layers=("layers.1.*",)), first, tokens)
    assert both.names.count(COUNTER) == 1
    assert both.names == first.names
    assert predict(both, {"input_ids": tokens.inputs["input_ids"][:2]})[COUNTER].shape == (2,)


class Small(nn.Module):
    """Merges batch and length before its layer, and has the batch second in the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        y = self.first(x.reshape(-1, 6)).reshape(x.shape)
        return self.second(y.transpose(0, 1)).transpose(0, 1)


def test_every_sample_gets_its_own_count_wherever_the_batch_stands():
    torch.manual_seed(0)
    model = trace(Small(), {"x": torch.zeros(2, 4, 6)}, "small")
    x = np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float32)
    model = apply(LlmInt8(), model, Data({"x": x}, None, "x"))
    x[3, 1, 2] = 9.0
    x[5] = 20.0
    found = predict(model, {"x": x})[COUNTER]
    assert found[3] >= 1
    assert found[5] >= 24
    assert found[[0, 1, 2, 4, 6, 7]].tolist() == [0] * 6
    session = onnxruntime.InferenceSession(to_onnx(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.asarray(session.run([COUNTER], {"x": x})[0]).tolist() == found.tolist()


def test_activations_beyond_float16_stay_right_and_are_named_and_such_weights_are_refused():
    model = trace(nn.Sequential(nn.Linear(4, 3)), {"x": torch.zeros(2, 4)}, "one")
    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    x[3, 2] = 1e5
    quantized = apply(LlmInt8(), model, Data({"x": x}, None, "x"))
    assert "reach 1e+05, beyond float16" in quantized.receipt[0].reason
    np.testing.assert_allclose(predict(quantized, {"x": x})["output"], predict(model, {"x": x})["output"], rtol=2e-3, atol=0.1)  # fmt: skip
    with torch.no_grad():
        layers.tensor(model.graph, "0.weight")[1, 2] = 1e6
    with pytest.raises(PlanishError, match=r"reaches 1e.06 in an outlier column, beyond float16"):
        apply(LlmInt8(), model, Data({"x": x}, None, "x"))
