"""Programs for a GPU, run on the CPU by the references: what is fused, merged and cast, how near they stay, and what the artifact says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planish import pipeline
from planish.common.errors import PlanishError
from planish.compress import layers
from planish.compress import load as loading
from planish.compress.model import predict, trace
from planish.compress.passes import Context
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.kv_cache import KvCache
from planish.compress.quantize.rotate import Rotate
from planish.compress.quantize.rtn import RoundToNearest
from planish.export import gpu as gpu_program
from planish.export import gpu_precision, lowering, metadata
from planish.export.interface import interface
from planish.export.onnx import describe
from planish.export.pt2 import Pt2
from planish.kernels.gpu import op as gpu_op
from planish.kernels.gpu.core import CORES
from planish.targets import target
from torch import nn
from torch.nn import functional as F

HOPPER = CORES["sm_90"]
KINDS = (torch.bfloat16, torch.float16)


def applied(model, *steps):
    context = Context(model, None, target.load("host"), torch.Generator().manual_seed(0))
    for step in steps:
        model = step.apply(model, context)
    return model


def named(model, name):
    return [n for n in model.graph.graph.nodes if layers.op(n) == name]


def apart(model, other, feeds):
    """Largest difference of the outputs of two models, as a share of the largest value of each."""
    a, b = predict(model, feeds), predict(other, feeds)
    assert all(a[k].dtype == b[k].dtype for k in a)
    return max(float(np.abs(a[k].astype(float) - b[k]).max() / np.abs(a[k]).max()) for k in a)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama folder with weights that make its scores spread."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(llama):
    """The same, traced."""
    return loading.load(str(llama))


TOKENS = {"input_ids": np.random.default_rng(0).integers(0, 64, (3, 9))}


@pytest.mark.parametrize("dtype", KINDS)
def test_a_decoder_is_fused_merged_and_near(decoder, dtype):
    model = applied(decoder, RoundToNearest(bits=4, group=32))
    made = gpu_program.rewrite(model, HOPPER, dtype)
    assert made.left == ()
    assert dict(made.ops) == {
        "embedding": 1, "gpu_linear_wna16": 10, "gpu_norm": 5, "linear": 1, "scaled_dot_product_attention": 2,
    }  # fmt: skip
    assert [tuple(n.rpartition(".")[2] for n in m) for m in made.merged] == [("q_proj", "k_proj", "v_proj")] * 2
    assert made.tails == 2 * 4  # silu and product of the gate, two residual sums, in each layer
    gates = [n for n in named(made.model, "planish.gpu_linear_wna16") if layers.argument(n, "activation") == "silu"]
    assert len(gates) == 2 and all(layers.argument(n, "factor") is not None for n in gates)
    assert sum(layers.argument(n, "residual") is not None for n in named(made.model, "planish.gpu_linear_wna16")) == 4
    assert apart(model, made.model, TOKENS) < (0.03 if dtype == torch.bfloat16 else 0.005)


def test_activations_have_16_bits_and_positions_32(decoder):
    made = gpu_program.rewrite(applied(decoder, RoundToNearest(bits=4, group=32)), HOPPER).model
    types = {n: t for n, (t, _) in gpu_precision.described(made).items()}
    for name in ("planish.gpu_linear_wna16", "aten.scaled_dot_product_attention", "aten.embedding"):
        assert {types[n] for n in named(made, name)} == {torch.bfloat16}
    assert {types[n] for name in ("aten.cos", "aten.sin") for n in named(made, name)} == {torch.float32}
    masks = [layers.argument(n, "attn_mask") for n in named(made, "aten.scaled_dot_product_attention")]
    assert len(set(masks)) == 1  # one cast, read by every layer
    assert torch.finfo(torch.bfloat16).min == min(a for n in named(made, "aten.where") for a in n.args if isinstance(a, float))  # fmt: skip


def test_roundings_take_the_norm_and_are_shared(decoder):
    if "linear_dynamic" not in gpu_op.ops():
        pytest.skip("linear_dynamic has no GPU form")
    model = applied(decoder, Dynamic(bits=8, activations=8))
    made = gpu_program.rewrite(model, HOPPER)
    assert made.left == () and made.normed_roundings == 4  # the last norm feeds the float head
    rounds = named(made.model, "planish.gpu_quantize_tokens")
    assert len(rounds) == 2 * 4  # qkv, o, gate with up, down
    assert [layers.argument(n, "norm") for n in rounds] == ["rms", "", "rms", ""] * 2
    assert len(named(made.model, "planish.gpu_linear_int8")) == 10
    assert apart(model, made.model, TOKENS) < 0.05


def test_a_rounded_cache_keeps_its_op(decoder):
    made = gpu_program.rewrite(applied(decoder, KvCache(format="int8")), HOPPER).model
    types = gpu_precision.described(made)
    assert {types[n][0] for n in named(made, "planish.kv_cache")} == {torch.bfloat16}
    assert len(named(made, "planish.kv_cache")) == 4


def test_a_layer_without_a_kernel_stays_with_its_reason(decoder, monkeypatch):
    model = applied(decoder, RoundToNearest(bits=4, group=32))
    monkeypatch.setattr(gpu_op, "ops", dict)
    made = gpu_program.rewrite(model, HOPPER)
    assert len(made.left) == 10 and all("linear_wna16" in why for _, why in made.left)
    assert len(named(made.model, "planish.linear_wna16")) == 10
    assert apart(model, made.model, TOKENS) < 0.03


class Block(nn.Module):
    """LayerNorm, three linears of one input, GELU, a bias that is added behind, a sum with what came in."""

    def __init__(self, twice=False):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32, bias=False)
        self.down = nn.Linear(64, 32)
        self.shift = nn.Parameter(torch.randn(32))
        self.twice = twice

    def forward(self, x):
        h = self.norm(x)
        inner = self.down(F.gelu(self.b(h), approximate="tanh"))
        y = self.c(h) + self.shift
        gated = y * torch.relu(self.a(h))
        return (x + inner, gated + inner) if self.twice else (x + inner, gated)


@pytest.mark.parametrize("twice", [False, True])
def test_tails_are_taken_where_nothing_else_reads_between(twice):
    torch.manual_seed(0)
    x = torch.randn(4, 7, 32)
    model = trace(Block(twice).eval(), {"x": x}, "block")
    model = applied(model, RoundToNearest(bits=8, group=32, skip=()))
    made = gpu_program.rewrite(model, HOPPER, torch.float16)
    tails = {layers.layer(n): n for n in named(made.model, "planish.gpu_linear_wna16")}
    down = tails["down"]
    assert (layers.argument(down, "residual") is None) == twice
    assert layers.argument(tails["b"], "activation") == "gelu_tanh"
    assert made.norms == 1 and not named(made.model, "aten.layer_norm")
    assert apart(model, made.model, {"x": x.numpy()}) < 0.01


def test_convolutions_compute_in_16_bits_between_float32_ends(residual, images):
    made = gpu_program.rewrite(residual, HOPPER, torch.float16)
    types = gpu_precision.described(made.model)
    assert {types[n][0] for n in named(made.model, "aten.conv2d")} == {torch.float16}
    feeds = {"image": images.inputs["image"][:8]}
    assert apart(residual, made.model, feeds) < 0.01
    constants = dict(made.model.graph.named_parameters()) | dict(made.model.graph.named_buffers())
    assert all(t.dtype == torch.float16 for n, t in constants.items() if n.startswith("head."))


def test_static_pairs_are_said_to_be_slow_and_answer(quantized, images):
    made = gpu_program.rewrite(quantized, HOPPER, torch.float16)
    assert {n for n, _ in made.left} >= {"stem", "depthwise", "point", "head"}
    assert all("--format onnx" in why for _, why in made.left)
    assert apart(quantized, made.model, {"image": images.inputs["image"][:8]}) < 0.1


def test_equal_layers_of_other_groups_are_not_merged():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x):
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    model = trace(Two().eval(), {"x": torch.randn(2, 64)}, "two")
    both = applied(model, RoundToNearest(bits=4, group=32, skip=()))
    one = applied(model, RoundToNearest(bits=4, group=32, skip=("b",)), RoundToNearest(bits=4, group=64, skip=("a",)))
    assert gpu_program.rewrite(both, HOPPER).merged == (("a", "b"),)
    assert gpu_program.rewrite(one, HOPPER).merged == ()
    assert gpu_program.rewrite(model, HOPPER).merged == (("a", "b"),)  # float layers too
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)}
    for item in (both, one, model):
        assert apart(item, gpu_program.rewrite(item, HOPPER, torch.float16).model, feeds) < 0.005


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """The decoder with 4-bit weights compressed (small) and for Hopper (artifact), and what was exported."""
    folder = tmp_path_factory.mktemp("gpu")
    np.savez(folder / "tokens.npz", **TOKENS)
    (folder / "low.yaml").write_text("name: low\npasses:\n  - quantize.rtn: {bits: 4, group: 32}\n")
    pipeline.compress(str(llama), target="cuda-sm90", recipe=str(folder / "low.yaml"), data=str(folder / "tokens.npz"), output=folder / "small")  # fmt: skip
    source, origin = pipeline._source(str(folder / "small"), None, None, None, folder)
    (folder / "artifact").mkdir()
    written = Pt2().write(source, target.load("cuda-sm90"), folder / "artifact")
    pipeline._finish(folder / "artifact", source, origin, target.load("cuda-sm90"), "pt2", written)
    return folder, source


def test_an_artifact_answers_on_the_cpu_by_its_references(exported):
    folder, _ = exported
    manifest = pipeline.artifacts.load(folder / "artifact").manifest
    assert manifest["details"]["core"] == "sm_90" and manifest["warnings"] == []
    assert manifest["details"]["activations"] == "bfloat16" and len(manifest["details"]["merged"]) == 2
    assert 0 < manifest["details"]["difference_to_float32"] < manifest["max_error"] <= 0.1 * manifest["details"]["largest_output"]  # fmt: skip
    checked = pipeline.verify(folder / "artifact", runtime="pt2")
    assert checked["ok"] and checked["exact"]
    before = pipeline.evaluate(str(folder / "small"), data=str(folder / "tokens.npz"))
    after = pipeline.evaluate(str(folder / "artifact"), data=str(folder / "tokens.npz"), runtime="pt2")
    assert after["value"] == pytest.approx(before["value"], rel=0.02)


def test_equal_exports_have_equal_bytes(exported, tmp_path):
    folder, source = exported
    Pt2().write(source, target.load("cuda-sm90"), tmp_path)
    assert (folder / "artifact" / "model.pt2").read_bytes() == (tmp_path / "model.pt2").read_bytes()


def test_float16_is_a_field_of_the_format(exported, tmp_path):
    written = Pt2(activations="float16").write(exported[1], target.load("cuda-sm80"), tmp_path)
    assert written.details["activations"] == "float16" and written.details["core"] == "sm_80"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_reference_is_offered(exported):
    for verb in (pipeline.verify, pipeline.profile):
        with pytest.raises(PlanishError, match=r"needs a GPU.*--runtime pt2 runs its reference on the CPU"):
            verb(exported[0] / "artifact")


def test_the_given_model_is_not_changed(decoder):
    before = [str(n) for n in decoder.graph.graph.nodes]
    gpu_program.rewrite(replace(decoder), HOPPER)
    assert [str(n) for n in decoder.graph.graph.nodes] == before


def test_a_program_needs_no_onnx_file(exported, decoder, monkeypatch, tmp_path):
    """Whatever 2 GiB say: the interface that ONNX would have, and no ONNX."""
    model = applied(decoder, RoundToNearest(bits=4, group=32))
    known, found = lowering.to_onnx(model), interface(model)
    for a, b in ((known.graph.input, found.graph.input), (known.graph.output, found.graph.output)):
        for old, new in zip([describe(v) for v in a], [describe(v) for v in b], strict=True):
            fixed = [d for d in old["shape"] if isinstance(d, int)]
            assert (old["name"], old["dtype"]) == (new["name"], new["dtype"])
            assert fixed == [d for d in new["shape"] if isinstance(d, int)] and len(old["shape"]) == len(new["shape"])
    assert describe(found.graph.output[1])["shape"][2] == "past + length"
    assert metadata.get(known, metadata.STATES) == metadata.get(found, metadata.STATES)

    def never(*_, **__):
        raise AssertionError("no ONNX")

    monkeypatch.setattr(pipeline, "to_onnx", never)
    folder, _ = exported
    made = pipeline.export(str(folder / "small"), target="cuda-sm90", output=tmp_path / "again")
    assert made["format"] == "pt2"


class Chain(nn.Module):
    """A norm whose result two layers and a sum read, and linear layers right behind each other."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64)
        self.norm, self.side = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        """(n, 64) -> (n, 64)."""
        y = self.norm(F.gelu(self.third(self.second(self.first(x)))))
        return self.side(y.tanh()) + self.third(y) + y


@pytest.mark.parametrize(
    "steps", [[RoundToNearest(bits=4, group=32)], [Dynamic()], [Rotate(residual=False), Dynamic()]]
)
def test_layers_without_anything_between_and_norms_with_many_readers(steps):
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = applied(trace(Chain(), {"x": x}, "chain"), *steps)
    made = gpu_program.rewrite(model, HOPPER)
    assert apart(model, made.model, {"x": x.numpy()}) < 0.1


def test_c_is_not_for_a_gpu(exported, tmp_path):
    with pytest.raises(PlanishError, match="target 'cuda-sm90' is a GPU, which takes pt2, tvm, onnx or onnx_tensorrt"):
        pipeline.export(str(exported[0] / "small"), target="cuda-sm90", format="c", output=str(tmp_path / "c"))
    assert not list(tmp_path.iterdir())
