"""bitsandbytes checkpoints: what bitsandbytes itself quantized is read byte for byte and computes the same; every fault is one line."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planish import pipeline
from planish.common.errors import PlanishError
from planish.compress import bitsandbytes_file, layers
from planish.compress import load as loading
from planish.compress.model import Model, predict
from planish.kernels import codebooks, linear_int8_outlier
from planish.runtimes import transformers as runtime
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate", reason="transformers loads bitsandbytes models through it")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning"),
]

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "attention_bias": True,
}  # fmt: skip
GPT2 = {
    "n_embd": 64,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 24,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 2.0},
    "plain": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
LAYER = "model.layers.1.mlp.up_proj"


def saved(folder: Path, name: str = "llama", fields: dict[str, Any] | None = None) -> None:
    """A random model with bfloat16 weights."""
    config = transformers.AutoConfig.for_model(name, **(fields or SHAPE))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


def quantized(base: Path, folder: Path, **options: Any) -> None:
    """The model of a folder, quantized and saved by bitsandbytes."""
    config = transformers.BitsAndBytesConfig(**options)
    with runtime._quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, device_map={"": "cpu"}
        )
        model.save_pretrained(folder)


def theirs(folder: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of transformers and bitsandbytes, in float32."""
    with runtime._quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).eval()
    runtime._in_float32(model)
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    saved(folder)
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(form) -> the folder that bitsandbytes wrote, once each."""
    folders: dict[str, Path] = {}

    def make(form: str) -> Path:
        if form not in folders:
            folders[form] = tmp_path_factory.mktemp(form)
            quantized(base, folders[form], **FORMS[form])
        return folders[form]

    return make


@pytest.fixture(scope="module")
def traced(made: Callable[[str], Path]) -> Callable[[str], Model]:
    """traced(form) -> the model as planish reads it, once each."""
    return functools.cache(lambda form: loading.load(str(made(form))))


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda form: shutil.copytree(made(form), tmp_path / form)


IDS = np.random.default_rng(0).integers(2, 50, (3, 11))


@pytest.mark.parametrize("form", ["nf4", "nested", "fp4"])
def test_four_bits_are_kept_byte_for_byte_and_compute_the_same_bits(
    form: str, made: Callable[[str], Path], traced: Callable[[str], Model]
) -> None:
    folder = made(form)
    model = traced(form)
    stored = load_file(folder / "model.safetensors")
    names = [n.removesuffix(".weight.absmax") for n in stored if n.endswith(".weight.absmax")]
    assert len(names) == 14
    for name in names:
        own = {n: layers.tensor(model.graph, f"{name}.weight_{n}") for n in ("codes", "scale")}
        assert own["codes"].numpy().tobytes() == stored[f"{name}.weight"].view(torch.uint8).numpy().tobytes()
        assert torch.equal(own["scale"], stored[f"{name}.weight.absmax"])
        if form == "nested":
            second = layers.tensor(model.graph, f"{name}.weight_second_scale")
            assert torch.equal(second, stored[f"{name}.weight.nested_absmax"])
        weight = f"{name}.weight"
        assert not any(n == weight for n, _ in model.graph.named_parameters())
    assert all(m.holds(own["codes"]) for m in model.mapped)  # not copied
    found = predict(model, {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(found, theirs(folder, IDS), atol=1e-5)
    line = next(e for e in model.receipt if e.tensor == f"{LAYER}.weight")
    kind = {"nf4": "nf4, blocks of 64", "nested": "nf4, blocks of 64, scales in 8 bits", "fp4": "fp4, blocks of 64"}[
        form
    ]
    assert line.reason == f"{kind}, as stored by bitsandbytes"


@pytest.mark.parametrize("form", ["int8", "plain"])
def test_eight_bits_are_kept_and_compute_the_same_within_the_rounding_of_activations(
    form: str, made: Callable[[str], Path], traced: Callable[[str], Model]
) -> None:
    """bitsandbytes rounds activations to float16 first, so that a code may be another one."""
    folder = made(form)
    model = traced(form)
    stored = load_file(folder / "model.safetensors")
    names = [n.removesuffix(".SCB") for n in stored if n.endswith(".SCB")]
    assert len(names) == 14
    for name in names:
        codes, scale = (layers.tensor(model.graph, f"{name}.weight_{n}") for n in ("codes", "scale"))
        codes = bitsandbytes_file.signed(codes) if form == "plain" else codes
        assert torch.equal(codes, stored[f"{name}.weight"])
        assert torch.equal(scale.flatten(), stored[f"{name}.SCB"] / 127)
    found, expected = predict(model, {"input_ids": IDS})["logits"], theirs(folder, IDS)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_the_cache_form_steps_through_codes_as_through_floats(traced: Callable[[str], Model]) -> None:
    model = traced("nf4")
    with torch.no_grad():
        whole = model(*model.feeds({"input_ids": IDS}))
        first = model(*model.feeds({"input_ids": IDS[:, :6]}))
        second = model(torch.from_numpy(IDS[:, 6:]), *first[1:])
    torch.testing.assert_close(torch.cat([first[0], second[0]], 1), whole[0], atol=1e-5, rtol=1e-4)


def test_a_convolution_of_one_tap_is_a_linear_as_bitsandbytes_has_it(tmp_path: Path) -> None:
    """GPT-2 stores its weights as (in, out); bitsandbytes turns them."""
    saved(tmp_path / "base", "gpt2", GPT2)
    quantized(tmp_path / "base", tmp_path / "four", **FORMS["nf4"])
    model = loading.load(str(tmp_path / "four"))
    found = predict(model, {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(found, theirs(tmp_path / "four", IDS), atol=2e-5)


def test_skipped_layers_and_shards(base: Path, tmp_path: Path) -> None:
    quantized(
        base,
        tmp_path / "some",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "q_proj"],
    )
    stored = load_file(tmp_path / "some" / "model.safetensors")
    names = sorted(stored)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # a layer's parts fall apart
    for file, own in parts.items():
        save_file({n: stored[n] for n in own}, tmp_path / "some" / file)
    (tmp_path / "some" / "model.safetensors").unlink()
    index = {n: f for f, own in parts.items() for n in own}
    where = tmp_path / "some" / "model.safetensors.index.json"
    where.write_text(json.dumps({"weight_map": index}))
    model = loading.load(str(tmp_path / "some"))
    parameters = dict(model.graph.named_parameters())
    assert parameters["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.k_proj.weight" not in parameters
    where.write_text(json.dumps({"weight_map": index | {names[0]: "../a.safetensors"}}))
    with pytest.raises(PlanishError, match="beside it is expected"):
        loading.load(str(tmp_path / "some"))


def test_the_verbs_take_it(made: Callable[[str], Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input_ids=IDS)
    score = pipeline.evaluate(str(made("nested")), data=str(tmp_path / "d.npz"))
    assert score["metric"] == "perplexity"
    rows = {r["name"]: r for r in pipeline.inspect(str(made("nested")))["layers"]}
    assert rows[LAYER]["op"] == "linear_codebook"


def test_compressing_on_leaves_the_codes_and_says_so(made: Callable[[str], Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input_ids=IDS)
    (tmp_path / "head.yaml").write_text("name: head\npasses:\n  - quantize.rtn: {bits: 8, group: 32, skip: []}\n")
    pipeline.compress(str(made("nf4")), recipe=str(tmp_path / "head.yaml"), output=tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    reasons = {e["tensor"]: e["reason"] for e in manifest["receipt"]}
    assert reasons[f"{LAYER}.weight"] == "nf4, blocks of 64, as stored by bitsandbytes"
    assert "as stored" not in reasons["lm_head.weight"]
    with pytest.raises(PlanishError, match="is quantized already"):
        pipeline.compress(str(made("nf4")), recipe="w8a8-static", data=str(tmp_path / "d.npz"))


@pytest.mark.parametrize("form", ["nf4", "nested", "fp4"])
def test_the_writer_gives_the_files_own_bytes_back(
    form: str, made: Callable[[str], Path], traced: Callable[[str], Model]
) -> None:
    stored = load_file(made(form) / "model.safetensors")
    model = traced(form)
    given = {n: layers.tensor(model.graph, f"{LAYER}.weight_{n}") for n in ("codes", "scale")}
    if form == "nested":
        given |= {n: layers.tensor(model.graph, f"{LAYER}.weight_{n}") for n in ("second_scale", "offset")}
    again = bitsandbytes_file.four_bits(codebooks.Coded(**given), "fp4" if form == "fp4" else "nf4", 64, "bfloat16")
    own = {n.removeprefix(f"{LAYER}."): t for n, t in stored.items() if n.startswith(f"{LAYER}.")}
    assert again.keys() == own.keys()
    for name, value in again.items():
        assert value.numpy().tobytes() == own[name].view(torch.uint8).numpy().tobytes(), name


def test_the_largest_magnitude_comes_back_from_the_scale_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(1, 0x7C00, (20000,), generator=generator, dtype=torch.int16).view(torch.float16).float()
    assert torch.equal(bitsandbytes_file.largest(halves / 127), halves)
    any_ = torch.rand(20000, generator=generator) * 10
    found = bitsandbytes_file.largest(any_ / 127)
    assert torch.equal(found / 127, any_ / 127)
    assert torch.equal(bitsandbytes_file.largest(torch.zeros(2)), torch.zeros(2))
    assert linear_int8_outlier.TOP == 127


# ---- faults


def refused(words: str, folder: Path) -> None:
    with pytest.raises(PlanishError) as caught:
        loading.load(str(folder))
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Parts of LAYER in the file replaced, or taken out where None; '__' stands for a dot."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, value in tensors.items():
        key = f"{LAYER}.{name.replace('__', '.').replace('quant_state', 'quant_state.bitsandbytes__nf4')}"
        stored.pop(key, None)
        if value is not None:
            stored[key] = value
    save_file(stored, path)


def state(**values: Any) -> torch.Tensor:
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64], **values}
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def test_the_unchanged_state_is_read(copied: Callable[[str], Path]) -> None:
    folder = copied("nf4")
    changed(folder, weight__quant_state=state())
    loading.load(str(folder))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": None}, f"layer '{LAYER}': the files lack its 'weight'"),
        ({"weight__absmax": None}, "the files lack its 'weight.absmax'"),
        ({"weight__quant_map": None}, "the files lack its 'weight.quant_map'"),
        ({"weight__quant_state": None}, "the files lack its quant_state"),
        ({"weight": torch.zeros(5, 1, dtype=torch.uint8)}, "its weight has 5 bytes; 4096 hold 128 x 64 codes"),
        ({"weight__absmax": torch.zeros(7)}, "'weight.absmax' is float32 (7,); float32 (128,) is expected"),
        ({"weight__absmax": torch.full((128,), float("nan"))}, "has 128 NaN or Inf values"),
        ({"weight__quant_map": torch.zeros(16)}, "holds other values than those of bitsandbytes' 16 codes"),
        ({"weight__quant_map": torch.zeros(4)}, "'weight.quant_map' is float32 (4,)"),
        ({"weight__quant_state": torch.zeros(3)}, "is no row of bytes"),
        ({"weight__quant_state": torch.tensor([123, 34], dtype=torch.uint8)}, "is not valid JSON"),
        ({"weight__quant_state": torch.tensor([255, 254], dtype=torch.uint8)}, "is not valid JSON"),
        ({"weight__quant_state": torch.tensor(list(b"[" * 100000), dtype=torch.uint8)}, "is not valid JSON"),
        ({"weight__quant_state": torch.tensor([91, 93], dtype=torch.uint8)}, "is a JSON list"),
        ({"weight__quant_state": state(quant_type="int4")}, "its quant_type is 'int4' under the name 'nf4'"),
        ({"weight__quant_state": state(blocksize=48)}, "its blocksize is 48; 32, 64"),
        ({"weight__quant_state": state(blocksize=128)}, "'weight.absmax' is float32 (128,); float32 (64,)"),
        ({"weight__quant_state": state(shape=[64, 128])}, "names the shape [64, 128]; [128, 64]"),
        ({"weight__quant_state": state(shape=None)}, "names the shape None"),
        ({"weight__quant_state": state(nested_offset=1.0)}, "its nested_blocksize is None"),
        ({"weight__quant_state": state(nested_offset="x", nested_blocksize=256)}, "its nested_offset is 'x'"),
        ({"weight__quant_state": state(nested_offset=0.1, nested_blocksize=256)}, "the files lack its 'weight.nested_quant_map'"),
        ({"weight__other": torch.zeros(2)}, f"1 unexpected: '{LAYER}.weight.other'"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tensors: dict[str, Any], words: str, copied: Callable[[str], Path]) -> None:
    folder = copied("nf4")
    changed(folder, **tensors)
    refused(words, folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": None}, f"layer '{LAYER}': the files lack its 'weight'"),
        ({"SCB": None}, "the files lack its 'SCB'"),
        ({"SCB": torch.ones(3)}, "'SCB' is float32 (3,); float32 (128,)"),
        ({"SCB": torch.full((128,), float("inf"))}, "'SCB' has 128 NaN or Inf values"),
        ({"weight": torch.zeros(128, 64)}, "'weight' is float32 (128, 64); int8 (128, 64)"),
        ({"weight": torch.zeros(64, 128, dtype=torch.int8)}, "'weight' is int8 (64, 128)"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "its weight_format is '2'; 0"),
    ],
)
def test_parts_of_eight_bits_that_do_not_fit(
    tensors: dict[str, Any], words: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("int8")
    changed(folder, **tensors)
    refused(words, folder)


@pytest.mark.parametrize(
    ("form", "values", "words"),
    [
        ("nf4", {"quant_method": "gptq"}, "is quantized already, as 'gptq'"),
        ("nf4", {"quant_method": None}, "is quantized already, by a method that is not named"),
        ("nf4", {"load_in_8bit": True}, "names neither or both"),
        ("nf4", {"load_in_4bit": False}, "names neither or both"),
        (
            "nf4",
            {"load_in_4bit": False, "load_in_8bit": True},
            "none of its tensors is (…SCB, …weight_format are expected)",
        ),
        ("int8", {"llm_int8_threshold": "six"}, "llm_int8_threshold is 'six'"),
        ("int8", {"llm_int8_threshold": -1}, "llm_int8_threshold is -1"),
        ("int8", {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight keeps its weights in float16"),
    ],
)
def test_a_quantization_config_that_does_not_fit(
    form: str, values: dict[str, Any], words: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(form)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= values
    path.write_text(json.dumps(content))
    refused(words, folder)


def test_a_layer_that_the_architecture_lacks(copied: Callable[[str], Path]) -> None:
    folder = copied("nf4")
    stored = load_file(folder / "model.safetensors")
    moved = {n.replace("layers.1.mlp.up_proj", "layers.1.mlp.side_proj"): t for n, t in stored.items()}
    save_file(moved, folder / "model.safetensors")
    refused("layer 'model.layers.1.mlp.side_proj': its config.json describes no such layer", folder)
    moved = {n.replace("layers.1.mlp.up_proj", "norm"): t for n, t in stored.items() if n != "model.norm.weight"}
    save_file(moved, folder / "model.safetensors")
    refused("layer 'model.norm': it is a LlamaRMSNorm in the model", folder)


def test_a_truncated_file(copied: Callable[[str], Path]) -> None:
    folder = copied("nf4")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused("model.safetensors' are damaged", folder)
