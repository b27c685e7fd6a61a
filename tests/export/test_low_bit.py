"""Low-bit models as ONNX: packed after loading, accuracy chosen by measurement, costs said before writing, caches that generate."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish.common.errors import PlanishError
from planish.compress.model import Input, Model, trace
from planish.compress.passes import Context
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.rtn import RoundToNearest
from planish.export import accuracy, metadata
from planish.export.format import Source, Written
from planish.export.lowering import lowered, to_onnx
from planish.export.onnx import Onnx, float_weight_bytes, optimized
from planish.runtimes import ort
from planish.targets import target
from torch import nn
from torch.nn import functional as F

WIDTH, HIDDEN, CLASSES = 64, 128, 10


class Classifier(nn.Module):
    """Three layers. What enters the second carries an outlier `gain` times as large as the rest, which the next weights undo."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, CLASSES)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.up, self.mid, self.head):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.up.weight[::32] *= gain
            self.up.bias[::32] += gain
            self.mid.weight[:, ::32] /= gain**2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mid(torch.relu(self.up(x)))))


def compressed(
    module: nn.Module, step: Any, inputs: dict[str, torch.Tensor], declared: tuple[Input, ...] = ()
) -> Model:
    """The traced module after one pass."""
    model = trace(module, inputs, "model", declared)
    return step.apply(model, Context(model, None, target.load("host"), torch.Generator().manual_seed(0)))


def source(model: Model, inputs: dict[str, np.ndarray]) -> Source:
    """What the pipeline hands to a format."""
    graph = to_onnx(model, lower=False)
    return Source(lowered(graph), inputs, "model", fused=graph)


def write(model: Model, inputs: dict[str, np.ndarray], folder: Path) -> Written:
    folder.mkdir()
    return Onnx().write(source(model, inputs), target.load("host"), folder)


@functools.cache
def classifier(gain: float, step: Any) -> tuple[Model, Source]:
    """The classifier after one pass, and as it is handed to the format with a few samples."""
    model = compressed(Classifier(gain), step, {"x": torch.zeros(1, WIDTH)})
    return model, source(model, noise())


def write_classifier(gain: float, step: Any, folder: Path) -> Written:
    folder.mkdir()
    return Onnx().write(classifier(gain, step)[1], target.load("host"), folder)


def noise(n: int = 8, width: int = WIDTH) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((n, width), np.float32)}


def test_a_node_whose_output_int8_activations_would_spoil_keeps_floats(tmp_path: Path) -> None:
    step = RoundToNearest(bits=4, group=32)
    plain = write_classifier(1.0, step, tmp_path / "plain")
    spiky = write_classifier(200.0, step, tmp_path / "spiky")
    levels = plain.details["accuracy_levels"]
    assert {n: c["level"] for n, c in levels.items()} == {"up": 4, "mid": 4, "head": 4}
    assert all(0 < c["error"] <= accuracy.BOUND for c in levels.values())
    spoiled = spiky.details["accuracy_levels"]["mid"]
    assert spoiled["level"] == 0 and spoiled["error"] > accuracy.BOUND and "error above" in spoiled["reason"]
    stored = {n.name: helper.get_node_attr_value(n, "accuracy_level") for n in onnx.load(tmp_path / "spiky/model.onnx").graph.node if n.op_type == "MatMulNBits"}  # fmt: skip
    assert stored == {n: c["level"] for n, c in spiky.details["accuracy_levels"].items()}


def test_level_four_moves_no_top_score_of_the_golden_samples() -> None:
    """Of many samples some lie near a border: nodes go back to level 0 until the classes are those of level 0, but for ties."""
    model = onnx.ModelProto()
    model.CopyFrom(classifier(3.0, RoundToNearest(bits=4, group=32))[1].onnx)
    inputs = noise(2000)
    before = ort.run(ort.create(model.SerializeToString(), 1), inputs)["output"]
    every = onnx.ModelProto()
    every.CopyFrom(model)
    accuracy._set(every, ["up", "mid", "head"])
    assert accuracy.moved(before, ort.run(ort.create(every.SerializeToString(), 1), inputs)["output"]).any()
    choices = accuracy.choose(model, inputs)
    assert any("top score" in c.reason for c in choices)
    assert not accuracy.moved(before, ort.run(ort.create(model.SerializeToString(), 1), inputs)["output"]).any()


def test_a_tie_may_go_either_way() -> None:
    scores = np.array([[0.0, 1.0, 0.999], [0.0, 1.0, 0.9]], np.float32)
    assert accuracy.moved(scores, scores[:, [0, 2, 1]]).tolist() == [False, True]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_artifact_answers_as_the_compressed_program(bits: int, tmp_path: Path) -> None:
    model, _ = classifier(1.0, step := RoundToNearest(bits=bits, group=32))
    written = write_classifier(1.0, step, tmp_path / "a")
    assert written.answers is not None
    want = model(torch.from_numpy(noise()["x"])).detach().numpy()
    assert np.linalg.norm(written.answers["output"] - want) <= 0.02 * np.linalg.norm(want)


def test_equal_sources_give_equal_bytes_and_details(tmp_path: Path) -> None:
    model, _ = classifier(3.0, step := RoundToNearest(bits=4, group=32))
    a, b = write_classifier(3.0, step, tmp_path / "a"), write(model, noise(), tmp_path / "b")
    assert (tmp_path / "a/model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()
    assert a.details == b.details and a.warnings == b.warnings


def test_what_costs_speed_or_bytes_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = RoundToNearest(bits=3, group=32)
    with pytest.raises(FileNotFoundError):
        Onnx().write(classifier(1.0, step)[1], target.load("host"), tmp_path / "missing")
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: 'up', 'mid', 'head'" in said or "warning: 'up'" in said
    assert "3-bit codes are stored in 4 bits" in said
    written = write_classifier(1.0, step, tmp_path / "a")
    assert any("3-bit codes are stored in 4 bits" in w for w in written.warnings)


def test_four_bit_activations_of_small_layers_are_said_to_be_slow(tmp_path: Path) -> None:
    step = Dynamic(bits=4, activations=4, group=32)
    written = write_classifier(1.0, step, tmp_path / "a")
    assert any("rounding its activations" in w for w in written.warnings)


def test_dynamic_int8_is_fused_and_needs_no_choice(tmp_path: Path) -> None:
    step = Dynamic(granularity="tensor")
    written = write_classifier(1.0, step, tmp_path / "a")
    assert written.details["runtime_ops"]["DynamicQuantizeMatMul"] == 3
    assert "accuracy_levels" not in written.details and written.warnings == ()
    assert float_weight_bytes(optimized(tmp_path / "a/model.onnx")) == 0


def test_a_low_bit_weight_that_onnx_runtime_folds_back_is_refused(tmp_path: Path) -> None:
    """Codes, a cast and a multiplication by scales look compressed in the file and are float once loaded."""
    codes = np.random.default_rng(0).integers(-8, 8, (WIDTH, HIDDEN)).astype(np.int8)
    nodes = [
        helper.make_node("Cast", ["fc.weight_codes"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="fc"),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("x", WIDTH), ("y", HIDDEN))
    ]
    constants = [numpy_helper.from_array(codes, "fc.weight_codes"), numpy_helper.from_array(np.full((1, HIDDEN), 0.1, np.float32), "s")]  # fmt: skip
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    Onnx().write(Source(model, noise(), "m"), target.load("host"), tmp_path)  # no low-bit op: the user's own business
    metadata.put(model, metadata.LOW_BIT, ["linear_wna16"])
    with pytest.raises(
        PlanishError,
        match=f"decodes {codes.size} bytes .* to {4 * codes.size - 4 * HIDDEN} bytes of float .*'fc.weight_codes'",
    ):
        Onnx().write(Source(model, noise(), "m"), target.load("host"), tmp_path)


VOCABULARY, HEADS = 48, 4
SIZE = WIDTH // HEADS


class Decoder(nn.Module):
    """One causal attention layer with a cache and one feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(32, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self, input_ids: torch.Tensor, past_key_0: torch.Tensor, past_value_0: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch, length = input_ids.shape
        past = past_key_0.shape[2]
        place = torch.arange(past, past + length)
        x = self.embed(input_ids) + self.position(place)
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        key, value = (
            torch.cat([past_key_0, k], 2),
            torch.cat([past_value_0, v], 2),
        )  # (batch, heads, past + length, size)
        scores = (q @ key.transpose(-1, -2)) * SIZE**-0.5
        scores = scores.masked_fill(torch.arange(past + length) > place[:, None], float("-inf"))
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, WIDTH))
        return self.lm_head(x + self.down(F.gelu(self.up(x)))), key, value


@pytest.fixture(scope="module")
def decoder() -> Model:
    """The decoder in the cache form, its linears in 4 bits and its output in 8."""
    torch.manual_seed(0)
    past = [torch.randn(2, HEADS, 3, SIZE) for _ in range(2)]
    names = ("past_key_0", "past_value_0")
    state = tuple(Input(n, (1, HEADS, 3, SIZE), torch.float32, (None, None, "past", None), True) for n in names)
    declared = (Input("input_ids", (1, 5), torch.int64, (None, "length")), *state)
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.int64)} | dict(zip(names, past, strict=True))
    model = compressed(Decoder(), RoundToNearest(bits=4, group=32, skip=("lm_head",)), inputs, declared)
    model = Dynamic(layers=("lm_head",), skip=()).apply(
        model, Context(model, None, target.load("host"), torch.Generator().manual_seed(0))
    )
    return replace(model, names=("logits", "present_key_0", "present_value_0"))


def test_generation_in_onnx_runtime_token_by_token_equals_the_whole(decoder: Model, tmp_path: Path) -> None:
    """Every length, with and without a past, from one file; the caches keep their names and may be left out."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))
    written = write(decoder, {"input_ids": tokens}, tmp_path / "a")
    assert [i["name"] for i in written.inputs] == ["input_ids", "past_key_0", "past_value_0"]
    assert [o["name"] for o in written.outputs] == ["logits", "present_key_0", "present_value_0"]
    assert written.inputs[0]["shape"] == ["batch", "length"]
    assert written.inputs[1]["shape"] == ["batch", HEADS, "past", SIZE]
    session = ort.create(tmp_path / "a/model.onnx", 1)
    whole = ort.run(session, {"input_ids": tokens})
    program = decoder(*decoder.feeds({"input_ids": tokens}))[0].detach().numpy()
    assert np.linalg.norm(whole["logits"] - program) <= 0.02 * np.linalg.norm(program)
    steps, state = [], {}
    for t in range(tokens.shape[1]):
        step = ort.run(session, {"input_ids": tokens[:, t : t + 1], **state})
        state = {n.replace("present", "past"): step[n] for n in ("present_key_0", "present_value_0")}
        steps.append(step["logits"])
    scale = np.abs(whole["logits"]).max()
    assert np.abs(np.concatenate(steps, 1) - whole["logits"]).max() <= 1e-4 * scale
    assert np.abs(state["past_key_0"] - whole["present_key_0"]).max() <= 1e-4


def test_no_weight_of_the_decoder_is_float_after_loading(decoder: Model, tmp_path: Path) -> None:
    write(decoder, {"input_ids": np.zeros((2, 6), np.int64)}, tmp_path / "a")
    runs = optimized(tmp_path / "a/model.onnx")
    embeddings = (VOCABULARY + 32) * WIDTH * 4
    scales = (3 * WIDTH + WIDTH + HIDDEN) * (WIDTH // 32) * 4 + WIDTH * (HIDDEN // 32) * 4
    assert float_weight_bytes(runs) == embeddings + scales
