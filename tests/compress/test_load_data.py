"""Data files are read as plain numbers; what is damaged, empty or does not fit the model is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from planish.common.errors import PlanishError
from planish.compress.data import Data, check
from planish.compress.load_data import load_data
from planish.compress.model import Model, trace

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.arange(6) % 3


def refused(words: str, spec: object) -> None:
    with pytest.raises(PlanishError, match=words) as caught:
        load_data(str(spec))
    assert "\n" not in str(caught.value)


def test_every_form_gives_the_same_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, labels=Y)
    safetensors.numpy.save_file({"x": X, "labels": Y}, tmp_path / "d.safetensors")
    (tmp_path / "parts").mkdir()
    np.savez(tmp_path / "parts" / "b.npz", x=X[2:], labels=Y[2:])
    safetensors.numpy.save_file({"x": X[:2], "labels": Y[:2]}, tmp_path / "parts" / "a.safetensors")
    (tmp_path / "loader.py").write_text(
        "import numpy as np, torch\n"
        "def get():\n    return {'x': torch.arange(24.).reshape(6, 4), 'labels': np.arange(6) % 3}\n"
    )
    for name in ("d.npz", "d.safetensors", "parts", "loader.py:get"):
        data = load_data(str(tmp_path / name))
        assert data.n == 6
        assert list(data.inputs) == ["x"]
        np.testing.assert_array_equal(data.inputs["x"], X)
        assert data.labels is not None
        np.testing.assert_array_equal(data.labels, Y)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": Y}, "no arrays besides"),
        ({}, "no arrays besides"),
        ({"x": X[:0]}, "empty: 0 samples of 'x'"),
        ({"x": np.array(["a", "b"])}, "dtype <U1"),
        ({"x": np.array([1, "a"], dtype=object)}, "pickled objects"),
        ({"x": np.float32(3)}, "single number"),
        ({"x": X, "labels": Y.astype(np.float32)}, "labels have dtype float32"),
        ({"x": X, "labels": Y.reshape(6, 1)}, r"shape \(6, 1\)"),
        ({"x": X, "labels": Y[:4]}, "4 labels for 6 samples"),
        ({"x": X, "labels": Y - 1}, "classes count from 0"),
    ],
)
def test_arrays_that_are_no_data(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    refused(words, tmp_path / "d.npz")


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9])
@pytest.mark.parametrize("name", ["d.npz", "d.safetensors"])
def test_damaged_files(name: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".npz":
        np.savez(path, x=np.zeros((50, 50)))
    else:
        safetensors.numpy.save_file({"x": np.zeros((50, 50))}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    refused("damaged", path)


def test_files_that_are_missing_or_something_else(tmp_path: Path) -> None:
    refused("does not exist", tmp_path / "none.npz")
    refused("suffix '.csv'", tmp_path / "none.csv")
    refused("holds no .npz", tmp_path)
    np.save(tmp_path / "single.npy", X)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    refused("single array", tmp_path / "single.npz")
    (tmp_path / "pickled.npz").write_bytes(b"\x80\x04cos\nsystem\n.")
    refused("pickled objects", tmp_path / "pickled.npz")


def test_folders_whose_files_do_not_fit_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    np.savez(tmp_path / "b.npz", z=X)
    refused("b.npz' has the keys 'z'; 'a.npz' has 'x'", tmp_path)
    np.savez(tmp_path / "b.npz", x=X[:, :2])
    refused("do not fit together", tmp_path)


@pytest.mark.parametrize("returned", ["3", "{'x': 3}", "{1: None}", "[1]"])
def test_loaders_that_return_something_else(returned: str, tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(f"def get():\n    return {returned}\n")
    refused("returned a", f"{tmp_path / 'loader.py'}:get")


def test_a_loader_that_fails(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text("def get():\n    return 1 / 0\n")
    refused(r"ZeroDivisionError.*loader.py:2", f"{tmp_path / 'loader.py'}:get")


# ---- against a model


@pytest.fixture(scope="module")
def model() -> Model:
    return trace(torch.nn.Linear(4, 2), {"input": torch.zeros(1, 4)}, "net")


def with_bad_value(value: float) -> np.ndarray:
    x = X.copy()
    x[3, 1] = value
    return x


@pytest.mark.parametrize(
    ("inputs", "labels", "words"),
    [
        ({"x": X}, None, "keys 'x'; the model's inputs are 'input'"),
        ({"input": X, "mask": X}, None, "keys 'input', 'mask'"),
        ({"input": X[:0]}, None, "empty"),
        ({"input": X[:, :3]}, None, r"shape \(n, 3\); the model takes \(n, 4\)"),
        ({"input": X[0]}, None, r"shape \(n\); the model takes \(n, 4\)"),
        ({"input": X.astype(np.uint8)}, None, "dtype uint8; the model takes float32"),
        ({"input": with_bad_value(np.nan)}, None, "1 NaN or Inf values, the first in sample 3"),
        ({"input": with_bad_value(-np.inf)}, None, "1 NaN or Inf"),
        ({"input": X}, Y[:2], "2 labels for 6 samples"),
    ],
)
def test_data_that_does_not_fit_the_model(
    inputs: dict[str, np.ndarray], labels: np.ndarray | None, words: str, model: Model
) -> None:
    with pytest.raises(PlanishError, match=words) as caught:
        check(Data(inputs, labels, "d.npz"), model.inputs)
    assert "d.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_different_numbers_of_samples() -> None:
    class Sum(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    both = trace(Sum(), {"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}, "net")
    assert list(check(Data({"b": X, "a": X}, None, "d"), both.inputs).inputs) == ["a", "b"]
    with pytest.raises(PlanishError, match="different numbers of samples"):
        check(Data({"a": X, "b": X[:3]}, None, "d"), both.inputs)
