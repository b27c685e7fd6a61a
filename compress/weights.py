"""Checkpoints: state dicts from .safetensors and from .pt files read without executing anything, matched to a module."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ..common.errors import PlanishError, listed
from ..common.progress import say

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""keys under which training scripts store the state dict beside epoch, optimizer, ..."""
PREFIXES = ("module.", "_orig_mod.")
"""what DataParallel and torch.compile put before every name"""
PICKLES = (".pt", ".pth", ".th")


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name. A wrapping key and a prefix of all names are taken off, and said.

    Raises PlanishError for a missing or damaged file, an unknown suffix, and a pickle that holds more than tensors.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise PlanishError(
            f"weights '{path}' are not known by their suffix '{path.suffix}'; .safetensors, .pt, .pth and .th are accepted"
        )
    if not path.is_file():
        raise PlanishError(f"weights '{path}' do not exist")
    found = _unwrap(_safetensors(path) if path.suffix == ".safetensors" else _pickle(path), path)
    for prefix in PREFIXES:
        if found and all(n.startswith(prefix) for n in found):
            say(f"weights '{path}': the prefix '{prefix}' of all names is left out")
            found = {n.removeprefix(prefix): t for n, t in found.items()}
    return found


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise PlanishError(f"weights '{path}' are damaged or no safetensors file: {_line(error)}") from None


def _pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # remarks about the pickle's protocol: it is read or refused, nothing between
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|but got <class '(\S+)'>", str(error))
        if named:
            what = next(g for g in named.groups() if g)
            raise PlanishError(
                f"weights '{path}' are refused: the pickle would call '{what}', and nothing in a checkpoint is executed; a state dict of tensors is accepted"
            ) from None
        raise PlanishError(f"weights '{path}' are damaged or no torch checkpoint: {_line(error)}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PlanishError(f"weights '{path}' are damaged or no torch checkpoint: {_line(error)}") from None


def _unwrap(found: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(found, Mapping):
        raise PlanishError(
            f"weights '{path}' hold a {type(found).__name__}; a state dict of tensors by name is expected"
        )
    wrapper = next((k for k in WRAPPERS if isinstance(found.get(k), Mapping)), None)
    if wrapper is not None:
        say(f"weights '{path}': the state dict under the key '{wrapper}' is used")
        return _unwrap(found[wrapper], path)
    other = [k for k, v in found.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if other or not found:
        detail = f"{listed(other)} are no tensors" if other else "it is empty"
        raise PlanishError(
            f"weights '{path}' hold no state dict: {detail}; tensors by name are expected, plain or under one of {', '.join(WRAPPERS)}"
        )
    return dict(found)


def misfits(
    missing: Sequence[str], unexpected: Sequence[str], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[str]:
    """How tensors of a file do not fit a model, a text for each kind; `shapes` are (in the file, in the model) by name."""
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing: {listed(missing)}")
    if unexpected:
        faults.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    if shapes:
        shown = [f"{n} {a} in the file, {b} in the model" for n, (a, b) in shapes.items()]
        faults.append(f"{len(shapes)} of another shape: {listed(shown)}")
    return faults


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load tensors into a module, in place. Raises PlanishError unless names and shapes agree (first three, counts)."""
    own = module.state_dict()
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in tensors if n not in own]
    shapes = {
        n: (tuple(t.shape), tuple(own[n].shape)) for n, t in tensors.items() if n in own and t.shape != own[n].shape
    }
    faults = misfits(missing, unexpected, shapes)
    if faults:
        raise PlanishError(f"weights '{path}' do not fit the model ({len(own)} tensors): {'; '.join(faults)}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise PlanishError(f"weights '{path}': '{name}' has {int((~tensor.isfinite()).sum())} NaN or Inf values")
    module.load_state_dict(dict(tensors), strict=False)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]
