"""The compressed folder: complete, checked, the same bytes every time, and loadable without the user's code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planish.common import files
from planish.common.errors import PlanishError
from planish.compress import compressed, program_file
from planish.compress.compressed import Compressed
from planish.compress.load import load as load_model
from planish.compress.model import Entry, Input, Model, Text, predict, trace


class Net(torch.nn.Module):
    """Two outputs, integer codes behind a dequantize, and a layer that is left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.linear = torch.nn.Linear(4, 2)
        self.register_buffer("weight_codes", torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4))
        self.register_buffer("scale", torch.full((4,), 0.1))
        self.register_buffer("zero_point", torch.zeros(4, dtype=torch.int32))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.conv(image)).mean((2, 3))
        w = torch.ops.planish.dequantize(self.weight_codes, self.scale, self.zero_point, 0)
        return self.linear(y), torch.nn.functional.linear(y, w)


RECIPE = {"name": "r", "description": "", "passes": [{"quantize.static": {"samples": 8}}]}
IMAGES = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32)


def model() -> Model:
    torch.manual_seed(0)
    return trace(Net(), {"image": torch.zeros(1, 3, 8, 8)}, "net.py:Net")


def build() -> Compressed:
    original = model()
    small = original.copy().with_receipt(
        Entry("weight", "quantized", "min-max", 64, 16, 0.01),
        Entry("linear.weight", "left", "skipped by 'linear'", 32, 32),
    )
    accuracy = {"original": 0.9, "compressed": 0.89, "n": 4}
    return compressed.build(small, original, RECIPE, "stm32f746", {"image": IMAGES}, accuracy, "0.1.0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save(tmp_path / "small")
    return tmp_path / "small"


def test_what_is_saved_is_loaded(folder: Path) -> None:
    before, after = build(), compressed.load(folder)
    assert after.model.receipt == before.model.receipt
    assert after.model.inputs == before.model.inputs
    assert dict(after.manifest) == json.loads(json.dumps(before.manifest))
    assert after.golden.keys() == before.golden.keys()
    for name, array in before.golden.items():
        np.testing.assert_array_equal(after.golden[name], array)
    for y, name in zip(after.model(torch.from_numpy(IMAGES)), ("output_0", "output_1"), strict=True):
        np.testing.assert_array_equal(y.detach().numpy(), after.golden[f"expected.{name}"])


def test_the_manifest_says_what_it_should(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == "compressed"
    assert manifest["recipe"] == RECIPE
    assert manifest["inputs"] == [{"name": "image", "shape": [None, 3, 8, 8], "dtype": "float32"}]
    assert [o["shape"] for o in manifest["outputs"]] == [[None, 2], [None, 4]]
    assert manifest["compressed"]["params"] == 3 * 4 * 9 + 4 + 8 + 2 + 16
    assert manifest["compressed"]["macs"] == 8 * 8 * 4 * 27 + 8 + 16
    assert manifest["receipt"][0]["reason"] == "min-max"
    assert manifest["files"].keys() == {"model.pt2", "golden.safetensors"}
    for name, stated in manifest["files"].items():
        assert stated == {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)}


def test_the_same_inputs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    build().save(tmp_path / "again")
    compressed.load(folder).save(tmp_path / "loaded")
    for name in ("model.pt2", "golden.safetensors", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    golden = "golden.safetensors"
    assert (tmp_path / "loaded" / golden).read_bytes() == (folder / golden).read_bytes()


def test_it_is_a_model_form(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert [e.action for e in loaded.receipt] == ["quantized", "left"]
    assert load_model(str(folder / "model.pt2")).inputs == loaded.inputs


def test_an_existing_folder_is_replaced_only_by_force(folder: Path) -> None:
    with pytest.raises(PlanishError, match="--force"):
        build().save(folder)
    build().save(folder, force=True)
    compressed.load(folder)


def test_a_failing_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program_file, "save", full)
    with pytest.raises(PlanishError, match="No space left"):
        build().save(tmp_path / "deep" / "small")
    assert list(tmp_path.iterdir()) == []


def change(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))


def refused(words: str, folder: Path) -> None:
    with pytest.raises(PlanishError, match=words) as caught:
        compressed.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.pt2", "golden.safetensors"])
def test_a_changed_file_is_named(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    refused(f"{name}' is not the file that the manifest lists", folder)
    (folder / name).unlink()
    refused(f"{name}' is missing", folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": "onnx"}, "holds 'onnx', not a compressed model"),
        ({"format_version": 2}, "format version 2; this planish reads up to 1"),
        ({"format_version": "x"}, "format version 'x'"),
        ({"files": None}, "does not list its files"),
        ({"files": {"../../x": {}, "model.pt2": {}}}, "does not list its files"),
        ({"receipt": [{"tensor": 3}]}, "receipt is malformed"),
        ({"receipt": None}, "receipt is malformed"),
        ({"inputs": [{"name": "other"}]}, "describes other inputs"),
        ({"inputs": "image"}, "describes other inputs"),
    ],
)
def test_a_manifest_that_does_not_fit(values: dict[str, Any], words: str, folder: Path) -> None:
    change(folder, **values)
    refused(words, folder)


def test_what_is_no_compressed_folder(folder: Path, tmp_path: Path) -> None:
    refused("not a folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("manifest.json' is missing", tmp_path / "empty")
    (folder / "manifest.json").write_text("{")
    refused("not valid JSON", folder)


def test_a_forged_program_with_a_right_hash_is_still_refused(folder: Path) -> None:
    """The hash tells an accident; that nothing runs does not depend on it."""
    (folder / "model.pt2").write_bytes(b"PK\x05\x06" + bytes(18))
    listing = {n: {"sha256": files.sha256(folder / n)} for n in ("model.pt2", "golden.safetensors")}
    change(folder, files=listing)
    refused("model.pt2' is refused", folder)


def test_a_model_with_a_fixed_batch() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 12) * 2

    fixed = trace(Fixed(), {"x": torch.zeros(2, 3, 4)}, "fixed")
    assert not fixed.batched
    built = compressed.build(fixed, fixed, RECIPE, "host", {"x": np.ones((4, 3, 4), np.float32)})
    assert built.golden["expected.output"].shape == (4, 12)
    assert built.manifest["inputs"][0]["shape"] == [2, 3, 4]
    with pytest.raises(PlanishError, match="3 samples do not fill batches of 2"):
        compressed.build(fixed, fixed, RECIPE, "host", {"x": np.ones((3, 3, 4), np.float32)})


def test_paths_of_this_machine_are_not_inside(folder: Path) -> None:
    here = str(Path(__file__).parent).encode()
    for file in folder.iterdir():
        assert here not in file.read_bytes()
        assert str(folder).encode() not in file.read_bytes()


def test_build_keeps_the_original_apart(folder: Path) -> None:
    changed = model()
    with torch.no_grad():
        changed.graph.get_parameter("linear.bias").add_(1.0)
    built = compressed.build(replace(changed, source="b"), model(), RECIPE, "host", {"image": IMAGES})
    difference = built.golden["expected.output_0"] - built.golden["original.output_0"]
    np.testing.assert_allclose(difference, 1.0, atol=1e-6)
    assert built.manifest["model"] == "net.py:Net"


class Counter(torch.nn.Module):
    """A language model of sorts: scores from the tokens so far, whose sum of embeddings is carried along."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(7, 4)

    def forward(self, input_ids: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        present = torch.cat([past, self.table(input_ids)], 1)
        return present.cumsum(1)[:, past.shape[1] :] @ self.table.weight.T, present


def test_names_dimensions_states_and_the_tokenizer_are_kept(tmp_path: Path) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    declared = (
        Input("input_ids", (1, 4), torch.int64, (None, "length")),
        Input("past", (1, 3, 4), torch.float32, (None, "before", None), state=True),
    )
    traced = trace(Counter(), {"input_ids": ids, "past": torch.zeros(1, 3, 4)}, "counter", declared)
    before = replace(traced, names=("logits", "present"), text=Text('{"a": 1}', 2, 16, True))
    samples = {"input_ids": np.arange(12).reshape(2, 6) % 7}
    built = compressed.build(before, before, RECIPE, "host", samples)
    built.save(tmp_path / "small")
    after = compressed.load(tmp_path / "small").model
    assert (after.inputs, after.names, after.text) == (before.inputs, before.names, before.text)
    assert predict(after, samples)["logits"].shape == (2, 6, 7)
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["inputs"][1] == {"name": "past", "shape": [None, "before", 4], "dtype": "float32", "state": True}
    assert [o["shape"] for o in manifest["outputs"]] == [[None, None, 7], [None, None, 4]]
    assert manifest["text"] == {"begin": 2, "window": 16, "causal": True}
    assert "tokenizer.json" in manifest["files"]
    compressed.load(tmp_path / "small").save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == '{"a": 1}'
    change(tmp_path / "small", text={"begin": "x"})
    refused("'text' is malformed", tmp_path / "small")
    change(tmp_path / "small", text=None)
    refused("does not list its files", tmp_path / "small")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inputs": [{"name": "image", "shape": [None, 3]}]}, "describes input 'image' otherwise"),
        ({"inputs": [{"name": "image", "shape": [None, 3, 8, 8], "state": 1}]}, "describes input 'image' otherwise"),
        ({"outputs": [{"name": "a"}]}, "describes other outputs than model.pt2, which has 2"),
        ({"outputs": [{"name": "a"}, {"name": "a"}]}, "describes other outputs"),
        ({"outputs": 3}, "describes other outputs"),
    ],
)
def test_a_manifest_that_contradicts_the_program(values: dict[str, Any], words: str, folder: Path) -> None:
    change(folder, **values)
    refused(words, folder)
