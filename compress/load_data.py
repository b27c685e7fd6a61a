"""Data for calibration, training and testing, from `--data`: .npz, .safetensors, a folder of such, or `file.py:loader`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

from ..common.errors import PlanishError, listed
from . import user_code
from .data import Data

SUFFIXES = (".npz", ".safetensors")


def load_data(spec: str) -> Data:
    """Arrays by input name, (n, ...) each, and optionally 'labels' (n,).

    A folder's files are read in sorted order and joined along the first dimension. Raises PlanishError for what is
    missing, damaged, empty, or not numeric. `data.check` compares with a model.
    """
    path = Path(spec)
    if user_code.names_code(spec) and not path.exists():
        arrays = _from_loader(spec)
    elif path.is_dir():
        arrays = _from_folder(path)
    else:
        arrays = _from_file(path)
    labels = arrays.pop("labels", None)
    if not arrays:
        raise PlanishError(f"data '{spec}' holds no arrays besides 'labels'; one array per model input is expected")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise PlanishError(f"data '{spec}': '{name}' has dtype {array.dtype}; numbers are expected")
        if array.ndim == 0:
            raise PlanishError(f"data '{spec}': '{name}' is a single number; (n, ...) samples are expected")
        if len(array) == 0:
            raise PlanishError(f"data '{spec}' is empty: 0 samples of '{name}'")
    if labels is not None:
        _check_labels(labels, len(next(iter(arrays.values()))), spec)
    return Data(arrays, labels, spec)


def _check_labels(labels: np.ndarray, n: int, spec: str) -> None:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise PlanishError(
            f"data '{spec}': labels have dtype {labels.dtype} and shape {labels.shape}; integer classes ({n},) are expected"
        )
    if len(labels) != n:
        raise PlanishError(f"data '{spec}': {len(labels)} labels for {n} samples")
    if labels.min() < 0:
        raise PlanishError(f"data '{spec}': labels contain {labels.min()}; classes count from 0")


def _from_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix not in SUFFIXES:
        raise PlanishError(
            f"data '{path}' is not known by its suffix '{path.suffix}'; .npz, .safetensors, a folder of such or file.py:loader are accepted"
        )
    if not path.is_file():
        raise PlanishError(f"data '{path}' does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        with path.open("rb") as raw:  # np.load would leave a damaged file open
            found = np.load(raw, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise PlanishError(
                    f"data '{path}' is a single array without a name; an .npz of named arrays is expected"
                )
            return {name: found[name] for name in found.files}
    except (
        safetensors.SafetensorError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        KeyError,
    ) as error:
        if "allow_pickle" in str(error):
            raise PlanishError(
                f"data '{path}' holds pickled objects, which are not read; plain numeric arrays are accepted"
            ) from None
        raise PlanishError(
            f"data '{path}' is damaged or no {path.suffix} file: {str(error).splitlines()[0][:150]}"
        ) from None


def _from_folder(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    if not files:
        raise PlanishError(f"data folder '{folder}' holds no .npz or .safetensors files")
    parts = [_from_file(p) for p in files]
    for path, part in zip(files, parts, strict=True):
        if set(part) != set(parts[0]):
            raise PlanishError(
                f"data '{path}' has the keys {listed(part, 6)}; '{files[0].name}' has {listed(parts[0], 6)}"
            )
    try:
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    except ValueError as error:
        raise PlanishError(f"data folder '{folder}': the files' arrays do not fit together: {error}") from None


def _from_loader(spec: str) -> dict[str, np.ndarray]:
    result: Any = user_code.call(spec)
    if not isinstance(result, Mapping):
        raise PlanishError(
            f"'{spec}' returned a {type(result).__name__}; a mapping of arrays by input name is expected"
        )
    arrays: dict[str, np.ndarray] = {}
    for name, value in result.items():
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise PlanishError(
                f"'{spec}' returned a {type(value).__name__} for {name!r}; arrays by input name are expected"
            )
        arrays[name] = array
    return arrays
