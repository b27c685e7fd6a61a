"""Every bundled low-bit recipe on weights that are no good: all-zero channels keep their zeros, NaN and odd groups are one line."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import layers, recipe
from planish.compress import load as loading
from planish.compress.data import Data
from planish.compress.model import predict
from planish.compress.passes import Context
from planish.targets import target

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")

OTHER = {"prune-w8a8", "mambaquant-w8a8", "clipped-softmax", "gated-attention"}
"""recipes for other networks, or without low-bit weights"""
RECIPES = sorted(set(recipe.names()) - OTHER)
GROUPED = sorted(
    {n for n in RECIPES for _, s in recipe.load(n).passes if "group" in type(s).model_fields} - {"svdquant-w4a4"}
)
"""SVDQuant fills the last group of a row up"""
LAYER = "model.layers.0.mlp.down_proj"
WIDTH, HIDDEN = 128, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama: a gain of its first norm is zero, and a row of up_proj, a column of down_proj and a row of q_proj."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    block = model.model.layers[0]
    with torch.no_grad():
        block.input_layernorm.weight[3] = 0
        block.mlp.up_proj.weight[5] = 0
        block.mlp.down_proj.weight[:, 7] = 0
        block.self_attn.q_proj.weight[9] = 0
    place = tmp_path_factory.mktemp("llama")
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder):
    return loading.load(str(folder))


@pytest.fixture(scope="module")
def tokens():
    return Data({"input_ids": np.random.default_rng(0).integers(0, 40, (8, 12))}, None, "tokens")


def run(steps, model, tokens):
    result = model
    for step in steps:
        result = step.apply(result, Context(model, tokens, target.load("host"), torch.Generator().manual_seed(0)))
    return result


def steps(name):
    return [step for _, step in recipe.load(name).passes]


@pytest.mark.parametrize("name", RECIPES)
def test_all_zero_channels_do_no_harm(name, model, tokens):
    want = predict(model, tokens.inputs)["logits"]
    got = predict(run(steps(name), model, tokens), tokens.inputs)["logits"]
    assert np.isfinite(got).all()
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert error <= 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_nan_in_a_weight_is_named(name, model, tokens):
    broken = dataclasses.replace(model, graph=copy.deepcopy(model.graph))
    weight = layers.tensor(model.graph, f"{LAYER}.weight").clone()
    weight[1, 2] = math.nan
    layers.set_tensor(broken.graph, f"{LAYER}.weight", weight)
    with pytest.raises(PlanishError, match=LAYER) as caught:
        run(steps(name), broken, tokens)
    assert "NaN" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_that_does_not_divide_names_the_layer_and_what_does(name, model, tokens):
    odd = [s.model_copy(update={"group": 48}) if "group" in type(s).model_fields else s for s in steps(name)]
    with pytest.raises(
        PlanishError, match=r"layer '[\w.]+': group 48 does not divide its 128 input channels"
    ) as caught:
        run(odd, model, tokens)
    assert "\n" not in str(caught.value)
