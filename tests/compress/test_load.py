"""Every MODEL form loads to the same function, and every fault is one clear line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import load as loading
from planish.compress import program_file
from planish.compress.data import Data
from planish.compress.model import Input, Model
from safetensors.torch import save_file

SOURCE = """
import torch
from helper import width

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, width())
        self.norm = torch.nn.BatchNorm1d(width())
        self.last = torch.nn.Linear(width(), 3)

    def forward(self, x, scale=None):
        y = self.last(torch.relu(self.norm(self.first(x))))
        return y if scale is None else y * scale

def net():
    torch.manual_seed(1)
    return Net()

def number():
    return 3

def broken():
    raise KeyError("no such layer")

def leaves():
    raise SystemExit(3)

constant = 5
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("def width():\n    return 8\n")
    (tmp_path / "nets.py").write_text(SOURCE)
    return tmp_path / "nets.py"


SHAPES = {"x": (1, 6)}


def state(code: Path) -> dict[str, torch.Tensor]:
    """Weights that differ from what the factory sets."""
    model = loading.load(f"{code}:net", None, SHAPES)
    own = dict(model.graph.named_parameters()) | dict(model.graph.named_buffers())
    return {n: (t.detach() + 0.25 if t.is_floating_point() else t.clone()) for n, t in own.items()}


def output(model: Model) -> torch.Tensor:
    y = model(torch.linspace(-1, 1, 12).reshape(2, 6))
    assert isinstance(y, torch.Tensor)
    return y.detach()


def refused(words: str, spec: str, *args: Any) -> str:
    with pytest.raises(PlanishError, match=words) as caught:
        loading.load(spec, *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- forms


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.th"])
def test_weights_of_every_suffix(name: str, code: Path) -> None:
    wanted, path = state(code), code.parent / name
    if path.suffix == ".safetensors":
        save_file({n: t.contiguous() for n, t in wanted.items()}, path)
    else:
        torch.save(wanted, path)
    model = loading.load(f"{code}:net", path, SHAPES)
    own = dict(model.graph.named_parameters()) | dict(model.graph.named_buffers())
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[n], wanted[n]) for n in wanted)
    assert model.batched
    assert model.inputs == (Input("x", (1, 6), torch.float32),)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_wrapping_and_prefix_are_found_and_said(
    key: str, prefix: str, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, path = state(code), code.parent / "w.pt"
    torch.save({"epoch": 3, key: {prefix + n: t for n, t in wanted.items()}}, path)
    model = loading.load(f"{code}:net", path, SHAPES)
    assert torch.equal(dict(model.graph.named_parameters())["first.weight"], wanted["first.weight"])
    said = capsys.readouterr().err
    assert f"'{key}'" in said
    assert ("'module.'" in said) == bool(prefix)


def test_all_forms_give_the_same_outputs(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = loading.load(f"{code}:net", None, SHAPES)
    program_file.save(wanted.program(), code.parent / "net.pt2")
    monkeypatch.chdir(code.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own future
        torch.onnx.export(
            wanted.graph, wanted.example(), "net.onnx", input_names=["x"], output_names=["y"],
            dynamic_axes={"x": {0: "n"}}, dynamo=False,
        )  # fmt: skip
    for spec, inputs in ((f"{code}:net", SHAPES), ("nets:net", SHAPES), ("net.pt2", None), ("net.onnx", None)):
        model = loading.load(spec, None, inputs)
        torch.testing.assert_close(output(model), output(wanted), atol=1e-6, rtol=1e-5)
        assert [i.name for i in model.inputs] == ["x"], spec


def test_shapes_come_from_data(code: Path) -> None:
    data = Data({"x": np.zeros((7, 6), np.float64)}, None, "d.npz")
    assert loading.load(f"{code}:net", None, None, data).inputs == (Input("x", (1, 6), torch.float32),)


def test_integer_inputs(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))\n"
    )
    spec = f"{tmp_path / 'words.py'}:net"
    asked = loading.load(spec, None, {"input": loading.parse_input("input=1,5:int64")})
    given = loading.load(spec, None, None, Data({"input": np.zeros((3, 5), np.int32)}, None, "d"))
    assert asked.inputs == given.inputs == (Input("input", (1, 5), torch.int64),)


def test_a_name_in_the_place_of_a_size_makes_the_dimension_dynamic(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))\n"
    )
    item = loading.parse_input("input=1,length:int64")
    model = loading.load(f"{tmp_path / 'words.py'}:net", None, {"input": item})
    assert model.batched
    assert model.inputs[0].dims == (None, "length")
    for shape in ((1, 1), (3, 7)):
        assert model(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 2)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PlanishError, match="dynamic dimension"):
        loading.load(str(tmp_path / "a.onnx"), None, {"input": item})


@pytest.mark.parametrize("text", ["x", "x=", "=1,2", "x=1,0", "x=1,2:float99", "x=a", "x=a,2", "x=1,2b", "x=-1,2"])
def test_input_texts_that_are_not_understood(text: str) -> None:
    with pytest.raises(PlanishError, match="not understood"):
        loading.parse_input(text)


# ---- what does not exist


def test_places_that_do_not_exist(code: Path, tmp_path: Path) -> None:
    assert "'Net', 'net', 'number'" in refused("has no 'nett'", f"{code}:nett", None, SHAPES)
    refused("does not exist", f"{tmp_path / 'none.py'}:net", None, SHAPES)
    refused("module 'no_such_package' of .* is not found", "no_such_package.nets:net", None, SHAPES)
    refused("does not exist; accepted", str(tmp_path / "none.bin"))
    refused("cannot be read", str(tmp_path / "none.pt2"))
    refused("does not exist", str(tmp_path / "none.onnx"))
    refused("weights .* do not exist", f"{code}:net", tmp_path / "none.pt", SHAPES)
    refused("--input x=1,3,32,32", f"{code}:net")


def test_what_is_no_model(code: Path, tmp_path: Path) -> None:
    refused("is a int", f"{code}:constant", None, SHAPES)
    refused("returned a int; a torch.nn.Module", f"{code}:number", None, SHAPES)
    (tmp_path / "notes.txt").write_text("x")
    refused("suffix '.txt'", str(tmp_path / "notes.txt"))
    (tmp_path / "w.safetensors").write_text("x")
    refused("holds weights only", str(tmp_path / "w.safetensors"))
    refused("no model folder", str(tmp_path))
    refused("carries its own weights", str(tmp_path / "a.pt2"), tmp_path / "w.safetensors")
    refused("carries its own input shapes", str(tmp_path / "a.pt2"), None, SHAPES)


def test_faults_in_the_users_code_say_where(code: Path) -> None:
    line = next(i for i, text in enumerate(SOURCE.splitlines(), 1) if "no such layer" in text)
    assert f"nets.py:{line}" in refused("KeyError: 'no such layer'", f"{code}:broken", None, SHAPES)
    refused("raised SystemExit", f"{code}:leaves", None, SHAPES)
    code.write_text("def net(:\n")
    assert "nets.py:1" in refused("raised SyntaxError", f"{code}:net", None, SHAPES)
    code.write_text("import no_such_helper\n")
    assert "nets.py:1" in refused("ModuleNotFoundError", f"{code}:net", None, SHAPES)


def test_input_names_must_be_forwards(code: Path) -> None:
    refused("forward takes 'x', 'scale', of which 'x' must", f"{code}:net", None, {"image": (1, 6)})
    refused("forward takes", f"{code}:net", None, {"scale": (1, 3)})


def test_a_shape_that_does_not_fit_the_model(code: Path) -> None:
    refused("cannot be traced", f"{code}:net", None, {"x": (1, 7)})


# ---- weights that do not fit


def test_keys_and_shapes_that_do_not_match(code: Path) -> None:
    wanted, path = state(code), code.parent / "w.pt"
    wrong = {n: t for n, t in wanted.items() if not n.startswith("norm.")}
    wrong |= {f"extra.{i}": torch.zeros(1) for i in range(5)} | {"last.bias": torch.zeros(4)}
    torch.save(wrong, path)
    message = refused("do not fit the model", f"{code}:net", path, SHAPES)
    assert "4 missing: 'norm.weight', 'norm.bias', 'norm.running_mean' and 1 more" in message
    assert "5 unexpected: 'extra.0', 'extra.1', 'extra.2' and 2 more" in message
    assert "1 of another shape: 'last.bias (4,) in the file, (3,) in the model'" in message


def test_weights_that_are_not_finite(code: Path) -> None:
    wanted, path = state(code), code.parent / "w.pt"
    wanted["last.bias"][1] = float("nan")
    torch.save(wanted, path)
    refused("'last.bias' has 1 NaN", f"{code}:net", path, SHAPES)


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_weights(kind: str, keep: float, code: Path) -> None:
    wanted = state(code)
    path = code.parent / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file({n: t.contiguous() for n, t in wanted.items()}, path)
    else:
        torch.save(wanted, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    refused("damaged", f"{code}:net", path, SHAPES)


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(legacy: bool, code: Path) -> None:
    mark, path = code.parent / "ran", code.parent / "w.pt"
    torch.save({"state_dict": {"a": Evil(mark)}}, path, _use_new_zipfile_serialization=not legacy)
    message = refused("refused: the pickle would call", f"{code}:net", path, SHAPES)
    assert "system" in message
    assert not mark.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert mark.exists()  # the attack is a real one


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {"state_dict": {"a": "text"}}])
def test_a_checkpoint_without_a_state_dict(content: Any, code: Path) -> None:
    torch.save(content, code.parent / "w.pt")
    refused("hold", f"{code}:net", code.parent / "w.pt", SHAPES)


def test_weights_of_an_unknown_suffix(code: Path) -> None:
    (code.parent / "w.bin").write_bytes(b"x")
    refused("suffix '.bin'", f"{code}:net", code.parent / "w.bin", SHAPES)


def test_an_output_that_is_no_tensor(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nclass N(torch.nn.Module):\n    def forward(self, x):\n        return x, 3\n"
    )
    refused("must be a tensor", f"{tmp_path / 'odd.py'}:N", None, {"x": (1, 2)})
