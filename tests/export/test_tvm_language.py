"""Language models through the format `tvm`: a decoder and a Mamba with low-bit linears, answers, layers and what is said of sizes."""

import numpy as np
import onnx
import pytest
import torch
from ml_dtypes import bfloat16
from planish import pipeline
from planish.compress import load as loading
from planish.export import tvm_static

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")

WORDS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    **WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 24, "tie_word_embeddings": True,
}  # fmt: skip
MAMBA = {**WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 8}
INT4 = "name: low\npasses:\n  - quantize.rtn: {bits: 4, group: 8}\n"
INT8 = "name: low\npasses:\n  - quantize.mambaquant\n"
LENGTH = 7


def linears(kind, layers):
    """Names of the quantized layers of a small model."""
    names = {
        "llama": [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")],
        "mamba": [f"mixer.{n}_proj" for n in ("in", "x", "dt", "out")],
    }[kind]
    return {f"{'model' if kind == 'llama' else 'backbone'}.layers.{i}.{n}" for i in range(layers) for n in names}


@pytest.mark.parametrize(("kind", "recipe"), [("llama", INT4), ("mamba", INT4), ("mamba", INT8)])
def test_a_model_answers_as_its_program_and_its_layers_are_named(kind, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = LLAMA if kind == "llama" else MAMBA
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokens = np.random.default_rng(0).integers(2, 50, (8, LENGTH))
    np.savez("tokens.npz", input_ids=tokens)
    (tmp_path / "low.yaml").write_text(recipe)
    pipeline.compress("model", data="tokens.npz", recipe="low.yaml", output=tmp_path / "small")
    report = pipeline.export("small", format="tvm", output=tmp_path / "artifact")
    assert f"(length {LENGTH})" in report["warnings"][0] or f"(time {LENGTH})" in report["warnings"][0]
    checked = pipeline.verify(tmp_path / "artifact")
    assert checked["ok"] and checked["runtime"] == "tvm"
    program = loading.load("small")
    want = program(*program.feeds({"input_ids": tokens}))[0].detach().numpy()
    got = pipeline.run(tmp_path / "artifact", "tokens.npz")["logits"]
    tolerance = 2e-2 if recipe == INT8 else 1e-4
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
    profile = pipeline.profile(tmp_path / "artifact", runs=1, warmup=0)
    named = {r["name"] for r in profile["layers"]}
    assert linears(kind, 2) <= named
    assert sum(r["op"] == "selective_scan" for r in profile["layers"]) == (2 if kind == "mamba" else 0)


def test_constants_in_bfloat16_are_evaluated():
    """A checkpoint in bfloat16 is one whose weights are cast when they are read; ONNX Runtime takes no such array."""
    stored = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3).astype(bfloat16), "stored")
    nodes = [
        onnx.helper.make_node("Transpose", ["stored"], ["turned"], perm=[1, 0]),
        onnx.helper.make_node("Cast", ["turned"], ["weight"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [1, 3]), ("y", [1, 2])))
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], [stored]), opset_imports=opset)
    made = tvm_static.static(model)
    assert [n.op_type for n in made.graph.node] == ["MatMul"]
    weight = next(i for i in made.graph.initializer if i.name == made.graph.node[0].input[1])
    assert np.array_equal(onnx.numpy_helper.to_array(weight), [[0, 3], [1, 4], [2, 5]])
