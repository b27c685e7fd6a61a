"""`Compressed`: the result of a recipe as a folder that needs none of the user's code to load, and runs none.

    model.pt2            the program: ATen ops, quantize/dequantize pairs, planish ops, with their tensors
    golden.safetensors   input.<name>, original.<output>, expected.<output>: samples with both models' answers
    tokenizer.json       of a language model that has one, as it was in the model's folder
    hugging_face.json    of a model from a Hugging Face folder: config.json and other small files of it, content by name
    manifest.json        format "compressed", format_version, planish (version), model (what the user named), target,
                         recipe (as run, every field), inputs and outputs ({name, shape, dtype}; null: any batch; a name:
                         any size; state: true for a state, which starts empty), text ({begin, window, causal} or absent),
                         original and compressed ({params, macs, bytes}), accuracy ({original, compressed, n} or null),
                         quality ({metric, original, compressed, n} or null: perplexity, else the cosine to the original),
                         receipt (what happened to each tensor and why), files ({name: {bytes, sha256}})

Nothing in it depends on when, where or how fast it was made: the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors
import safetensors.numpy
import torch
from torch.utils._pytree import tree_leaves

from ..common import files
from ..common.errors import PlanishError, listed
from . import cost, layers, program_file
from .model import Entry, Input, Model, Text, from_program, output_names, predict

FORMAT_VERSION = 1
PROGRAM, GOLDEN, MANIFEST, TOKENIZER = "model.pt2", "golden.safetensors", "manifest.json", "tokenizer.json"
ORIGIN = "hugging_face.json"


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
            program_file.save(self.model.program(), work / PROGRAM, self.model.release)
            arrays = {n: np.ascontiguousarray(a) for n, a in sorted(self.golden.items())}
            (work / GOLDEN).write_bytes(safetensors.numpy.save(arrays))
            names = [PROGRAM, GOLDEN]
            if self.model.text is not None:
                (work / TOKENIZER).write_text(self.model.text.tokenizer, encoding="utf-8")
                names.append(TOKENIZER)
            if self.model.origin is not None:
                (work / ORIGIN).write_text(files.to_json(dict(self.model.origin)), encoding="utf-8")
                names.append(ORIGIN)
            listing = {n: {"bytes": (work / n).stat().st_size, "sha256": files.sha256(work / n)} for n in names}
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
        "inputs": [_input(i, model.batched) for i in model.inputs],
        "outputs": _outputs(model, after),
        **({} if model.text is None else {"text": _without_tokenizer(model.text)}),
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
    listing = _check_files(folder, manifest)
    receipt = _receipt(folder, manifest)
    program, mapped = program_file.open_mapped(folder / PROGRAM)
    try:
        golden = safetensors.numpy.load_file(folder / GOLDEN)
    except safetensors.SafetensorError as error:
        raise PlanishError(f"'{folder / GOLDEN}' is damaged: {error}") from None
    origin = _origin(folder) if ORIGIN in listing else None
    model = replace(from_program(program, None, str(manifest.get("model", folder))), mapped=(mapped,), origin=origin)
    return Compressed(_as_described(model, folder, manifest).with_receipt(*receipt), manifest, golden)


def _as_described(model: Model, folder: Path, manifest: Mapping[str, Any]) -> Model:
    """The program's model with what only the manifest knows: names of dimensions and outputs, states, and how text is read."""
    names = [i.name for i in model.inputs]
    described = manifest.get("inputs")
    if not isinstance(described, list) or [d.get("name") if isinstance(d, dict) else d for d in described] != names:
        raise PlanishError(
            f"'{folder / MANIFEST}' describes other inputs than {PROGRAM}, whose inputs are {listed(names, 6)}"
        )
    model = replace(model, inputs=tuple(_restored(i, d, folder) for i, d in zip(model.inputs, described, strict=True)))
    outputs, count = manifest.get("outputs"), len(output_names(model))
    found = [o.get("name") if isinstance(o, dict) else None for o in outputs] if isinstance(outputs, list) else []
    if len(found) != count or not all(isinstance(n, str) for n in found) or len(set(found)) < count:
        raise PlanishError(f"'{folder / MANIFEST}' describes other outputs than {PROGRAM}, which has {count}")
    if tuple(found) != output_names(model):
        model = replace(model, names=tuple(str(n) for n in found))
    said = manifest.get("text")
    if said is None:
        return model
    try:
        content = (folder / TOKENIZER).read_text(encoding="utf-8")
        return replace(model, text=pydantic.TypeAdapter(Text).validate_python({**said, "tokenizer": content}))
    except (pydantic.ValidationError, TypeError, OSError, UnicodeDecodeError):
        raise PlanishError(f"'{folder / MANIFEST}': 'text' is malformed, or {TOKENIZER} is no text") from None


def _restored(item: Input, said: Mapping[str, Any], folder: Path) -> Input:
    """An input of the program under the names that the manifest gives its dynamic dimensions."""
    shape, state = said.get("shape"), said.get("state", False)
    if not isinstance(shape, list) or len(shape) != len(item.shape) or not isinstance(state, bool):
        raise PlanishError(f"'{folder / MANIFEST}' describes input '{item.name}' otherwise than {PROGRAM}")
    dims = tuple(d if isinstance(d, str) and item.dim(k) else item.dim(k) for k, d in enumerate(shape))
    return replace(item, dims=dims if any(dims) else (), state=state)


def _origin(folder: Path) -> dict[str, str]:
    found = files.read_json(folder / ORIGIN)
    if not all(isinstance(v, str) and Path(n).name == n for n, v in found.items()):
        raise PlanishError(f"'{folder / ORIGIN}' holds something else than texts by file name")
    return found


def _check_files(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest's list of files, taken out of it. Raises PlanishError unless they are what is expected, each with its hash."""
    listing = manifest.pop("files", None)
    wanted = {PROGRAM, GOLDEN} | ({TOKENIZER} if manifest.get("text") is not None else set())
    if not isinstance(listing, dict) or set(listing) - {ORIGIN} != wanted:
        raise PlanishError(f"'{folder / MANIFEST}' does not list its files; {listed(sorted(wanted))} are expected")
    for name, stated in listing.items():
        path = folder / name
        if not path.is_file():
            raise PlanishError(f"'{path}' is missing")
        if not isinstance(stated, dict) or files.sha256(path) != stated.get("sha256"):
            raise PlanishError(f"'{path}' is not the file that the manifest lists: its SHA-256 differs")
    return listing


def _receipt(folder: Path, manifest: Mapping[str, Any]) -> list[Entry]:
    try:
        return pydantic.TypeAdapter(list[Entry]).validate_python(manifest.get("receipt"))
    except pydantic.ValidationError as error:
        where = ".".join(str(p) for p in error.errors()[0]["loc"])
        raise PlanishError(f"'{folder / MANIFEST}': the receipt is malformed at '{where}'") from None


def _input(item: Input, batched: bool) -> dict[str, Any]:
    sizes: list[int | str | None] = [item.dim(k) or size for k, size in enumerate(item.shape)]
    shape = [None, *sizes[1:]] if batched else sizes
    return {"name": item.name, "shape": shape, "dtype": _dtype(item.dtype), **({"state": True} if item.state else {})}


def _outputs(model: Model, answers: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Name, shape and dtype of every output; null stands for the batch and for a size that follows a dynamic dimension."""
    shapes = [list[int | None](a.shape) for a in answers.values()]
    if any(i.dims for i in model.inputs):
        wider = tuple(
            replace(i, shape=tuple(d + (i.dim(k) is not None) for k, d in enumerate(i.shape))) for i in model.inputs
        )
        pairs = zip(_example_shapes(model), _example_shapes(replace(model, inputs=wider)), strict=True)
        shapes = [[a if a == b else None for a, b in zip(s, w, strict=True)] for s, w in pairs]
    if model.batched:
        shapes = [[None, *s[1:]] for s in shapes]
    return [
        {"name": n, "shape": s, "dtype": _dtype(torch.from_numpy(a).dtype)}
        for s, (n, a) in zip(shapes, answers.items(), strict=True)
    ]


def _example_shapes(model: Model) -> list[tuple[int, ...]]:
    """Shapes of the outputs for the inputs' example sizes."""
    found = layers.shapes(model)
    node = next(n for n in model.graph.graph.nodes if n.op == "output")
    return [found[n] for n in tree_leaves(node.args)]


def _without_tokenizer(how: Text) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(how).items() if k != "tokenizer"}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
