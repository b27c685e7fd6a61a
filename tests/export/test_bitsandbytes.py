"""Format bitsandbytes: transformers with bitsandbytes computes what planish computes; what cannot be held is refused or said."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from planish import pipeline
from planish.common import files
from planish.common.errors import PlanishError
from planish.compress import compressed, hugging_face, layers, program_file
from planish.compress import load as loading
from planish.compress.data import Data
from planish.compress.model import Model, output_names, predict
from planish.compress.passes import Context, Pass
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.fp4 import Fp4
from planish.compress.quantize.linears import HEAD
from planish.compress.quantize.llm_int8 import COUNTER, LlmInt8
from planish.compress.quantize.mxfp4 import Mxfp4
from planish.compress.quantize.nf4 import Nf4
from planish.compress.quantize.rtn import RoundToNearest
from planish.export import bitsandbytes
from planish.export.artifact import Artifact
from planish.export.bitsandbytes import Bitsandbytes
from planish.export.format import Source, Written
from planish.runtimes.transformers import Transformers, _quiet
from planish.targets import target
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate", reason="transformers loads bitsandbytes models through it")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning"),
]

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "attention_bias": True,
}  # fmt: skip
BERT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 24,
}
IDS = np.random.default_rng(0).integers(2, 50, (3, 11))
DOWN = "model.layers.0.mlp.down_proj"


def saved(folder: Path, name: str = "LlamaForCausalLM", kind: str = "llama", **fields: Any) -> Path:
    """A random model with bfloat16 weights, some activations of which are large."""
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for owner, parameter in model.named_parameters():
            if owner.endswith("post_attention_layernorm.weight"):
                parameter[:3] *= 8
    with _quiet():
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return functools.cache(lambda **fields: saved(tmp_path_factory.mktemp("base"), **{**SHAPE, **fields}))


@pytest.fixture(scope="module")
def llama(folders: Callable[..., Path]) -> Model:
    return loading.load(str(folders()))


def applied(model: Model, *steps: Pass) -> Model:
    data = Data({"input_ids": np.random.default_rng(1).integers(2, 50, (8, 11))}, None, "tokens")
    result = model
    for step in steps:
        result = step.apply(result, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))
    return result


def source(model: Model, folder: Path, inputs: dict[str, np.ndarray] | None = None) -> Source:
    """As the pipeline makes it, with an ONNX graph of names alone."""
    folder.mkdir(exist_ok=True)
    program_file.save(model.program(), folder / "model.pt2")
    described = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in names]
        for names in ([i.name for i in model.inputs], output_names(model))
    ]
    proto = helper.make_model(helper.make_graph([], "main", *described))
    assert isinstance(proto, onnx.ModelProto)
    return Source(proto, inputs or {"input_ids": IDS}, "net", folder / "model.pt2", origin=model.origin)


def written(model: Model, folder: Path) -> Written:
    made = source(model, folder)
    (folder / "out").mkdir()
    return Bitsandbytes().write(made, target.load("host"), folder / "out")


def ran(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with Transformers().open(Artifact(folder, {"format": "bitsandbytes", "target": "host"}), 1) as session:
        return session.run(inputs)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "step", [Nf4(nested=True), Fp4(block=32, skip=(*HEAD, "*.q_proj"))], ids=["nested", "fp4"]
)  # fmt: skip
def test_four_bits_give_the_same_answers(step: Pass, llama: Model, tmp_path: Path) -> None:
    made = applied(llama, step)
    result = written(made, tmp_path)
    found = ran(tmp_path / "out", {"input_ids": IDS})
    expected = predict(made, {"input_ids": IDS})
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)
        assert np.abs(found[name] - value).max() <= result.max_error
    assert result.warnings == ()
    said = config_of(tmp_path / "out")["quantization_config"]
    skipped = ["lm_head"] + (["model.layers.0.self_attn.q_proj"] if "*.q_proj" in step.skip else [])  # pyright: ignore[reportAttributeAccessIssue]
    assert said["llm_int8_skip_modules"] == skipped


def test_the_runtime_steps_through_its_cache(llama: Model, tmp_path: Path) -> None:
    made = applied(llama, Nf4(nested=True))
    written(made, tmp_path)
    with _quiet():  # as anyone reads it
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested
    with Transformers().open(Artifact(tmp_path / "out", {"format": "bitsandbytes", "target": "host"}), 1) as session:
        whole = session.run({"input_ids": IDS})
        first = session.run({"input_ids": IDS[:, :7]})
        states = {n.replace("present", "past"): v for n, v in first.items() if n != "logits"}
        second = session.run({"input_ids": IDS[:, 7:], **states})
        assert session.profile({"input_ids": IDS[:1]}, 2, 1).kind == "measured"
    np.testing.assert_allclose(second["logits"], whole["logits"][:, 7:], atol=1e-5)


@pytest.mark.parametrize(
    "step", [Dynamic(), LlmInt8(threshold=2.0, exact=False, frozen=False)], ids=["plain", "outliers"]
)
def test_eight_bits_give_the_same_answers_within_the_rounding_of_activations(
    step: Pass, llama: Model, tmp_path: Path
) -> None:
    made = applied(llama, step)
    result = written(made, tmp_path)
    found, expected = ran(tmp_path / "out", {"input_ids": IDS})["logits"], predict(made, {"input_ids": IDS})["logits"]
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert np.abs(found - expected).max() <= result.max_error
    assert result.warnings == ()
    threshold = config_of(tmp_path / "out")["quantization_config"]["llm_int8_threshold"]
    assert threshold == (0.0 if isinstance(step, Dynamic) else 2.0)


def test_what_outlier_columns_in_16_bits_lose_is_said_and_the_counter_is_left_out(llama: Model, tmp_path: Path) -> None:
    made = applied(llama, LlmInt8(threshold=2.0))
    assert COUNTER in output_names(made)
    result = written(made, tmp_path)
    (warning,) = result.warnings
    assert "restores from int8 what is stored in 16 bits" in warning
    share = float(warning.split("outputs are ")[1].split("%")[0]) / 100
    own, found = predict(made, {"input_ids": IDS})["logits"], result.answers
    assert found is not None
    assert share == pytest.approx(np.abs(found["logits"] - own).max() / np.abs(own).max(), abs=0.03)
    assert COUNTER not in found
    assert [o["name"] for o in result.outputs] == list(found)
    there = ran(tmp_path / "out", {"input_ids": IDS})
    assert max(np.abs(there[n] - v).max() for n, v in found.items()) <= result.max_error


def test_a_head_that_was_tied_has_weights_of_its_own_once_it_is_quantized(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    model = loading.load(str(folders(tie_word_embeddings=True)))
    made = applied(model, Nf4(skip=()))
    written(made, tmp_path)
    content = config_of(tmp_path / "out")
    assert content["tie_word_embeddings"] is False
    assert content["quantization_config"]["llm_int8_skip_modules"] == []
    found = ran(tmp_path / "out", {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(found, predict(made, {"input_ids": IDS})["logits"], atol=1e-5)
    _, module = hugging_face.skeleton(content | {"tie_word_embeddings": True}, tmp_path)
    assert bitsandbytes._untied(module, {"model.embed_tokens.weight"}) == {}


def test_an_encoder(tmp_path: Path) -> None:
    model = loading.load(str(saved(tmp_path / "bert", "BertForSequenceClassification", "bert", **BERT)))
    made = applied(model)
    data = Data({"input_ids": IDS, "attention_mask": np.ones_like(IDS)}, None, "tokens")
    made = Nf4().apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))
    item = source(made, tmp_path / "made", dict(data.inputs))
    (tmp_path / "out").mkdir()
    result = Bitsandbytes().write(item, target.load("host"), tmp_path / "out")
    found = ran(tmp_path / "out", dict(data.inputs))
    assert result.answers is not None
    np.testing.assert_allclose(found["logits"], result.answers["logits"], atol=1e-5)


@pytest.mark.parametrize("form", ["nested", "int8"])
def test_what_bitsandbytes_wrote_comes_back_byte_for_byte(
    form: str, folders: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # fmt: skip
    with _quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folders(), quantization_config=transformers.BitsAndBytesConfig(**options), device_map={"": "cpu"}
        )
        theirs.save_pretrained(tmp_path / "theirs")
    written(loading.load(str(tmp_path / "theirs")), tmp_path)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert value.shape == after[name].shape, name
        assert value.view(-1).view(torch.uint8).equal(after[name].view(-1).view(torch.uint8)), name


@pytest.mark.slow
def test_from_a_folder_through_every_verb(folders: Callable[..., Path], tmp_path: Path) -> None:
    pipeline.compress(str(folders()), recipe="nf4", output=tmp_path / "made")
    kept = json.loads((tmp_path / "made" / compressed.ORIGIN).read_text())
    assert json.loads(kept["config.json"])["model_type"] == "llama"
    assert compressed.load(tmp_path / "made").model.origin == kept
    found = pipeline.export(str(tmp_path / "made"), format="bitsandbytes", output=tmp_path / "out")
    assert found["warnings"] == []
    assert {"config.json", "model.safetensors", "golden.safetensors"} <= set(found["files"])
    checked = pipeline.verify(tmp_path / "out")
    assert checked["ok"], checked
    assert checked["runtime"] == "transformers"
    mine, theirs = (pipeline.evaluate(str(tmp_path / n)) for n in ("made", "out"))
    assert theirs["value"] == pytest.approx(mine["value"], abs=1e-5)
    first, second = tmp_path / "out" / "model.safetensors", tmp_path / "again"
    item = compressed.load(tmp_path / "made").model
    written(item, second)
    assert files.sha256(first) == files.sha256(second / "out" / "model.safetensors")  # same input, same bytes


def test_an_origin_that_names_a_path_is_refused(llama: Model, tmp_path: Path) -> None:
    made = compressed.build(llama, llama, {}, "host", {"input_ids": IDS})
    made.save(tmp_path / "made")
    where = tmp_path / "made" / compressed.ORIGIN
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    for content in ({"../config.json": "{}"}, {"config.json": 3}, {"/etc/x": ""}):
        where.write_text(json.dumps(content))
        with pytest.raises(PlanishError, match="SHA-256 differs"):
            compressed.load(tmp_path / "made")
        manifest["files"][compressed.ORIGIN]["sha256"] = files.sha256(where)
        (tmp_path / "made" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(PlanishError, match="something else than texts by file name"):
            compressed.load(tmp_path / "made")


# ---- what is refused


def refused(model: Model, folder: Path) -> str:
    with pytest.raises(PlanishError) as caught:
        written(model, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_formats_that_bitsandbytes_lacks_are_refused_by_layer(llama: Model, tmp_path: Path) -> None:
    _, module = hugging_face.skeleton(json.loads((llama.origin or {})["config.json"]), tmp_path)

    def said(*steps: Pass) -> str:
        made = applied(llama, *steps)
        with pytest.raises(PlanishError) as caught:
            bitsandbytes._quantization(made, module, bitsandbytes._coded(made, module), "float32")
        return str(caught.value)

    group = said(RoundToNearest(bits=4, group=32, layers=("*.q_proj",)))
    assert group.startswith(
        "layer 'model.layers.0.self_attn.q_proj' has the op linear_wna16; format 'bitsandbytes' takes nf4"
    )
    assert f"layer '{DOWN}' is stored as mxfp4" in said(Mxfp4(layers=("*.down_proj",)))
    four = said(Dynamic(bits=4, group=32, layers=("*.down_proj",)))
    assert f"layer '{DOWN}' has weights of 4 bits in groups, activations of 8 bits" in four
    mixed = said(Nf4(layers=("*.down_proj",)), Dynamic(layers=("*.q_proj",)))
    assert f"has layers of 4 bits ('{DOWN}') and of 8 bits ('model.layers.0.self_attn.q_proj')" in mixed
    steps = [LlmInt8(layers=(f"*.{n}_proj",), threshold=t) for n, t in (("q", 2.0), ("k", 3.0))]
    assert "has layers with the outlier thresholds '2', '3'" in said(*steps)
    assert "has no layer in low bits" in said()


def test_a_program_that_is_more_than_its_architecture_is_refused(llama: Model, tmp_path: Path) -> None:
    made = applied(llama, Nf4()).editable()
    node = next(n for n in made.graph.graph.nodes if layers.op(n) == "aten.silu")
    with made.graph.graph.inserting_after(node):
        double = made.graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.5))
    node.replace_all_uses_with(double, delete_user_cb=lambda n: n is not double)
    made.graph.recompile()
    assert "is more than its architecture with other weights" in refused(made, tmp_path / "a")
    made = applied(llama, Nf4()).editable()
    node = next(n for n in made.graph.graph.nodes if layers.op(n) == "aten.silu")
    with made.graph.graph.inserting_before(node.next):
        gain = layers.add_parameter(made.graph, "model.gain", torch.ones(1))
        product = made.graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, gain))
    node.replace_all_uses_with(product, delete_user_cb=lambda n: n is not product)
    made.graph.recompile()
    assert "1 more: 'model.gain'" in refused(made, tmp_path / "b")


def test_a_norm_whose_gain_was_folded_away_is_written_with_ones(llama: Model, tmp_path: Path) -> None:
    made = llama.copy()
    graph = made.graph
    gain = next(
        n for n in graph.graph.nodes if n.op == "get_attr" and n.target == "model.layers.0.input_layernorm.weight"
    )
    (wide,) = gain.users  # stored in 16 bits
    (product,) = wide.users
    product.replace_all_uses_with(next(a for a in product.args if a is not wide))
    layers.drop_unused(graph)
    made = applied(made, Nf4())
    written(made, tmp_path)
    found = ran(tmp_path / "out", {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(found, predict(made, {"input_ids": IDS})["logits"], atol=1e-5)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.input_layernorm.weight"].eq(1).all()


def test_a_model_from_elsewhere_has_no_configuration_to_write(llama: Model, tmp_path: Path) -> None:
    item = source(applied(llama, Nf4()), tmp_path / "made")
    content = json.loads((llama.origin or {})["config.json"])
    for origin, words in (
        (None, "'net' was not made from one"),
        ({"config.json": "{"}, "the config.json kept with 'net' is not valid JSON"),
        ({"config.json": json.dumps(content | {"num_hidden_layers": 2})}, "less: 'model.layers.1."),
        ({"config.json": json.dumps(content | {"model_type": "own"})}, "architecture 'own'"),
    ):
        with pytest.raises(PlanishError) as caught:
            Bitsandbytes().write(replace(item, origin=origin), target.load("host"), tmp_path)
        assert words in str(caught.value)


def test_blocks_over_the_end_of_a_row_are_warned_about_and_never_run_wrongly(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    """bitsandbytes 0.50 decodes them wrongly on CPUs with AVX-512."""
    made = applied(loading.load(str(folders(intermediate_size=96))), Nf4())
    result = written(made, tmp_path)
    (warning,) = result.warnings
    assert f"{DOWN} (96 inputs, blocks of 64)" in warning
    try:
        found = ran(tmp_path / "out", {"input_ids": IDS})
    except PlanishError as error:
        assert f"decodes '{DOWN}' wrongly on this CPU" in str(error)
    else:
        np.testing.assert_allclose(found["logits"], predict(made, {"input_ids": IDS})["logits"], atol=1e-5)


def test_without_accelerate_the_extra_is_named(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(PlanishError, match=r"accelerate.*planish\[gpu\]"):
        ran(tmp_path, {})
