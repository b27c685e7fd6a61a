"""`Compressed`: the result of a recipe as a folder that needs none of the user's code to load, and runs none.

    model.pt2            the program: ATen ops, quantize/dequantize pairs, planish ops, with their tensors
    golden.safetensors   input.<name>, original.<output>, expected.<output>: samples with both models' answers
    manifest.json        format "compressed", format_version, planish (version), model (what the user named), target,
                         recipe (as run, every field), inputs and outputs ({name, shape, dtype}; null: any batch),
                         original and compressed ({params, macs, bytes}), accuracy ({original, compressed, n} or null),
                         quality ({metric, original, compressed, n} or null: perplexity, else the cosine to the original),
                         receipt (what happened to each tensor and why), files ({name: {bytes, sha256}})

Nothing in it depends on when, where or how fast it was made: the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors
import safetensors.numpy
import torch

from ..common import files
from ..common.errors import PlanishError, listed
from . import cost, program_file
from .model import Entry, Model, from_program, predict

FORMAT_VERSION = 1
PROGRAM, GOLDEN, MANIFEST = "model.pt2", "golden.safetensors", "manifest.json"


@dataclass(frozen=True)
class Compressed:
    """A compressed model with everything that is known about it."""

    model: Model
    manifest: Mapping[str, Any]
    """as in manifest.json, without `files`, which `save` adds"""
    golden: Mapping[str, np.ndarray]
    """input.<name> (n, ...), original.<output> (n, ...) and expected.<output> (n, ...)"""

    def save(self, folder: Path, force: bool = False) -> None:
        """Write the folder, whole or not at all. Raises PlanishError as `files.new_folder` does."""
        with files.new_folder(folder, force) as work:
            program_file.save(self.model.program(), work / PROGRAM)
            arrays = {n: np.ascontiguousarray(a) for n, a in sorted(self.golden.items())}
            (work / GOLDEN).write_bytes(safetensors.numpy.save(arrays))
            listing = {
                n: {"bytes": (work / n).stat().st_size, "sha256": files.sha256(work / n)} for n in (PROGRAM, GOLDEN)
            }
            (work / MANIFEST).write_text(files.to_json({**self.manifest, "files": listing}), encoding="utf-8")


def build(
    model: Model,
    original: Model,
    recipe: Mapping[str, Any],
    target: str,
    samples: Mapping[str, np.ndarray],
    accuracy: Mapping[str, Any] | None = None,
    version: str = "0",
    quality: Mapping[str, Any] | None = None,
) -> Compressed:
    """The compressed model with its manifest and the answers of both models to `samples` (n, ...) by input name."""
    arrays = {i.name: samples[i.name] for i in model.inputs if i.name in samples}
    before, after = predict(original, arrays), predict(model, arrays)
    golden = {f"input.{n}": a.copy() for n, a in arrays.items()}
    golden |= {f"original.{n}": a for n, a in before.items()}
    golden |= {f"expected.{n}": a for n, a in after.items()}
    manifest = {
        "format": "compressed",
        "format_version": FORMAT_VERSION,
        "planish": version,
        "model": original.source,
        "target": target,
        "recipe": dict(recipe),
        "inputs": [_described(i.name, i.shape, i.dtype, model.batched) for i in model.inputs],
        "outputs": [_described(n, a.shape, torch.from_numpy(a).dtype, model.batched) for n, a in after.items()],
        "original": summary(original),
        "compressed": summary(model),
        "accuracy": None if accuracy is None else dict(accuracy),
        "quality": None if quality is None else dict(quality),
        "receipt": [dataclasses.asdict(e) for e in model.receipt],
    }
    return Compressed(model, manifest, golden)


def summary(model: Model) -> dict[str, int]:
    """Parameters (count), MACs (per sample) and bytes of all tensors."""
    return {"params": model.parameters(), "macs": cost.total_macs(model), "bytes": model.bytes()}


def load(folder: Path) -> Compressed:
    """Read a compressed folder, every file checked against its hash before it is used.

    Raises PlanishError for a folder that is none, of a newer format, incomplete, changed, or that could run code.
    """
    if not folder.is_dir():
        raise PlanishError(f"compressed model '{folder}' is not a folder")
    manifest = files.read_json(folder / MANIFEST)
    if manifest.get("format") != "compressed":
        raise PlanishError(
            f"'{folder}' holds {manifest.get('format')!r:.40}, not a compressed model (format 'compressed')"
        )
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise PlanishError(f"'{folder}' has format version {version!r:.20}; this planish reads up to {FORMAT_VERSION}")
    _check_files(folder, manifest.pop("files", None))
    receipt = _receipt(folder, manifest)
    program = program_file.load(folder / PROGRAM)
    try:
        golden = safetensors.numpy.load_file(folder / GOLDEN)
    except safetensors.SafetensorError as error:
        raise PlanishError(f"'{folder / GOLDEN}' is damaged: {error}") from None
    model = from_program(program, None, str(manifest.get("model", folder)))
    names = [i.name for i in model.inputs]
    described = manifest.get("inputs")
    if not isinstance(described, list) or [d.get("name") if isinstance(d, dict) else d for d in described] != names:
        raise PlanishError(
            f"'{folder / MANIFEST}' describes other inputs than {PROGRAM}, whose inputs are {listed(names, 6)}"
        )
    return Compressed(model.with_receipt(*receipt), manifest, golden)


def _check_files(folder: Path, listing: Any) -> None:
    if not isinstance(listing, dict) or set(listing) != {PROGRAM, GOLDEN}:
        raise PlanishError(f"'{folder / MANIFEST}' does not list its files; {PROGRAM} and {GOLDEN} are expected")
    for name, stated in listing.items():
        path = folder / name
        if not path.is_file():
            raise PlanishError(f"'{path}' is missing")
        if not isinstance(stated, dict) or files.sha256(path) != stated.get("sha256"):
            raise PlanishError(f"'{path}' is not the file that the manifest lists: its SHA-256 differs")


def _receipt(folder: Path, manifest: Mapping[str, Any]) -> list[Entry]:
    try:
        return pydantic.TypeAdapter(list[Entry]).validate_python(manifest.get("receipt"))
    except pydantic.ValidationError as error:
        where = ".".join(str(p) for p in error.errors()[0]["loc"])
        raise PlanishError(f"'{folder / MANIFEST}': the receipt is malformed at '{where}'") from None


def _described(name: str, shape: tuple[int, ...], dtype: torch.dtype, batched: bool) -> dict[str, Any]:
    dims: list[int | None] = [None, *shape[1:]] if batched else list(shape)
    return {"name": name, "shape": dims, "dtype": str(dtype).removeprefix("torch.")}
