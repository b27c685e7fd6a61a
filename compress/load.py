"""Loading of every MODEL form to a `Model`: a factory with weights, .pt2, .onnx, .tflite, or a compressed folder."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..common.errors import PlanishError, listed
from . import compressed, hugging_face, onnx_import, program_file, tflite_import, user_code, weights
from .data import Data
from .model import Input, Model, from_program, trace

FORMS = "path/to/file.py:factory, package.module:factory, a .pt2 program, an .onnx file, an int8 .tflite file, a Hugging Face folder or a compressed folder"
DYNAMIC = 8
"""size of the example of a dynamic dimension"""
DTYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32}


def parse_input(text: str) -> Input:
    """An input from 'image=1,3,32,32' or 'tokens=1,16:int64' (float32 when no dtype is named).

    A name in the place of a size, as in 'tokens=1,length:int64', makes that dimension dynamic; the batch is dynamic by itself.
    """
    match = re.fullmatch(r"([A-Za-z_]\w*)=([1-9]\d*(?:,(?:[1-9]\d*|[A-Za-z_]\w*))*)(?::(\w+))?", text.replace(" ", ""))
    if match is None or (match[3] or "float32") not in DTYPES:
        raise PlanishError(
            f"input '{text}' is not understood; name=1,3,32,32 is accepted, with a name for a dimension of any size "
            "(tokens=1,length), and with :int64 or :int32 behind it for integers"
        )
    sizes = match[2].split(",")
    names = tuple(None if s.isdigit() else s for s in sizes)
    shape = tuple(int(s) if s.isdigit() else DYNAMIC for s in sizes)
    return Input(match[1], shape, DTYPES[match[3] or "float32"], names if any(names) else ())


def load(
    spec: str,
    weights_file: Path | None = None,
    inputs: Mapping[str, tuple[int, ...] | Input] | None = None,
    example: Data | None = None,
) -> Model:
    """The model that `spec` names, traced.

    A factory's input shapes come from `inputs` (float32 shapes, or `Input`s from `parse_input`), else from one sample of
    `example`; the other forms carry their own. Raises PlanishError, one line, for everything that does not fit.
    """
    path = Path(spec)
    if user_code.names_code(spec) and not path.exists():
        return _from_factory(spec, weights_file, _declared(inputs, example))
    if weights_file is not None:
        raise PlanishError(f"'{spec}' carries its own weights; --weights belongs to a factory (file.py:factory)")
    if path.suffix == ".onnx":
        named = [n for n, s in (inputs or {}).items() if isinstance(s, Input) and s.dims]
        if named:
            raise PlanishError(
                f"'{spec}': --input gives {listed(named)} a dynamic dimension; an .onnx file takes sizes"
            )
        return onnx_import.load(path, {n: s.shape if isinstance(s, Input) else s for n, s in (inputs or {}).items()})
    if inputs and (path.suffix in (".pt2", ".tflite") or path.is_dir()):
        raise PlanishError(f"'{spec}' carries its own input shapes; --input belongs to a factory or an .onnx file")
    if path.suffix == ".tflite":
        return onnx_import.to_model(tflite_import.load(path), spec)
    if path.suffix == ".pt2":
        program, mapped = program_file.open_mapped(path)
        return replace(from_program(program, None, spec), mapped=(mapped,))
    if path.is_dir():
        return _from_folder(path)
    if path.suffix in (".safetensors", *weights.PICKLES):
        raise PlanishError(
            f"'{spec}' holds weights only; give the code that builds the model: file.py:factory --weights {path.name}"
        )
    if not path.exists():
        raise PlanishError(f"model '{spec}' does not exist; accepted: {FORMS}")
    raise PlanishError(f"model '{spec}' is not known by its suffix '{path.suffix}'; accepted: {FORMS}")


def _from_folder(folder: Path) -> Model:
    if (folder / "manifest.json").is_file():
        return compressed.load(folder).model
    if hugging_face.is_folder(folder):
        return hugging_face.load(folder)
    raise PlanishError(
        f"'{folder}' is no model folder (no manifest.json of planish, no config.json of Hugging Face); accepted: {FORMS}"
    )


def _declared(inputs: Mapping[str, tuple[int, ...] | Input] | None, example: Data | None) -> dict[str, Input]:
    """The inputs by name: as given, else as the first sample of the data."""
    if inputs:
        return {n: s if isinstance(s, Input) else Input(n, tuple(s), torch.float32) for n, s in inputs.items()}
    found = {} if example is None else {n: torch.from_numpy(a[:1]) for n, a in example.inputs.items()}
    return {
        n: Input(n, tuple(t.shape), torch.float32 if t.is_floating_point() else torch.int64) for n, t in found.items()
    }


def _from_factory(spec: str, weights_file: Path | None, declared: dict[str, Input]) -> Model:
    if weights_file is not None and not weights_file.is_file():
        raise PlanishError(f"weights '{weights_file}' do not exist")
    module = user_code.call(spec)
    if not isinstance(module, torch.nn.Module):
        raise PlanishError(f"'{spec}' returned a {type(module).__name__}; a torch.nn.Module is expected")
    if weights_file is not None:
        weights.fill(module, weights.read(weights_file), weights_file)
    ordered = _ordered(module, declared, spec)
    return trace(module, {i.name: torch.zeros(i.shape, dtype=i.dtype) for i in ordered}, spec, ordered)


def _ordered(module: torch.nn.Module, declared: dict[str, Input], spec: str) -> list[Input]:
    """The inputs in the order of forward's arguments. Raises PlanishError for names that forward does not have."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not declared:
        raise PlanishError(
            f"the input shapes of '{spec}' are not known: give --data with samples (a text file tells none), or --input {names[0] if names else 'x'}=1,3,32,32 (forward takes {listed(names, 6)})"
        )
    required = [p.name for p in parameters if p.name in names and p.default is p.empty]
    unknown = [n for n in declared if n not in names]
    lacking = [n for n in required if n not in declared]
    if unknown or lacking or set(names[: len(declared)]) != set(declared):
        raise PlanishError(
            f"the inputs given for '{spec}' are {listed(declared, 6)}; forward takes {listed(names, 6)}"
            + (f", of which {listed(required, 6)} must be given" if len(required) < len(names) else "")
        )
    return [declared[n] for n in names[: len(declared)]]
