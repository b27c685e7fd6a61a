"""Format `pt2`: the compressed program itself, for PyTorch; for a GPU with packed weights, 16-bit activations and fused nodes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..common.errors import PlanishError
from ..compress import program_file
from ..compress.model import Model, from_program, predict
from ..kernels.gpu.core import core
from ..targets.target import Target
from . import fused, gpu, metadata
from .format import Format, Source, Written
from .onnx import describe

PROGRAM = "model.pt2"
ROUNDINGS = 2
"""units in the last place of the largest output by which two right orders of 16-bit computation may always differ"""
CARRIED = 0.1
"""of the largest output: the most that is ever accepted of a model that carries a rounding that far"""


@dataclass(frozen=True)
class Pt2(Format):
    """model.pt2, a torch.export program whose quantized weights are stored as codes; runs in PyTorch."""

    activations: Literal["bfloat16", "float16"] = "bfloat16"
    """of programs for a GPU; inputs and outputs keep their types"""

    def reads(self, target: Target) -> bool:
        """Not for a GPU, whose program is rewritten from the program itself."""
        return target.kind != "gpu"

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Copy the program, or rewrite it for a GPU (gpu.py).

        Raises PlanishError when the source is an ONNX file, which has none, and for a GPU that there are no kernels for.
        """
        if source.program is None:
            raise PlanishError(
                f"format 'pt2' needs a compressed model or a PyTorch model; '{source.name}' is an ONNX file"
            )
        inputs, outputs = ([describe(v) for v in part] for part in (source.onnx.graph.input, source.onnx.graph.output))
        names = tuple(str(o["name"]) for o in outputs)
        if target.kind == "gpu":
            return self._for_gpu(source, target, folder, inputs, outputs)
        shutil.copyfile(source.program, folder / PROGRAM)
        answers = predict(_read(folder / PROGRAM, source, names), source.golden_inputs)
        return Written(inputs, outputs, answers=answers)

    def _for_gpu(
        self, source: Source, target: Target, folder: Path, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]
    ) -> Written:
        assert source.program is not None
        names = tuple(str(o["name"]) for o in outputs)
        states = metadata.get(source.onnx, metadata.STATES)
        float_model = with_dims(_read(source.program, source, names), inputs, states)
        made = gpu.rewrite(float_model, core(target.core), getattr(torch, self.activations))
        program_file.save(made.model.program(), folder / PROGRAM)
        answers = predict(_read(folder / PROGRAM, source, names), source.golden_inputs)
        before = predict(float_model, source.golden_inputs)
        difference, largest = _apart(answers, before)
        bound = _bound(difference, largest, torch.finfo(getattr(torch, self.activations)).eps)
        warnings = list(fused.together([(n, f"left to PyTorch's ops, which is slow: {why}") for n, why in made.left]))
        if difference > CARRIED * largest:
            warnings.append(
                f"16-bit activations move the golden answers by {difference / largest:.1%} of the largest; compare "
                f"`planish evaluate` before and after"
            )
        details = {
            "core": target.core,
            "activations": self.activations,
            "ops": dict(made.ops),
            "merged": [list(m) for m in made.merged],
            "fused": {
                "epilogue_nodes": made.tails,
                "norms": made.norms,
                "norms_in_roundings": made.normed_roundings,
                "attentions": made.attentions,
            },
            "left": [{"layer": n, "reason": why} for n, why in made.left],
            "largest_output": largest,
            "difference_to_float32": difference,
        }
        return Written(inputs, outputs, details=details, warnings=tuple(warnings), max_error=bound, answers=answers)


def _read(path: Path, source: Source, names: tuple[str, ...]) -> Model:
    program, mapped = program_file.open_mapped(path)
    return replace(from_program(program, None, source.name), names=names, mapped=(mapped,))


def with_dims(model: Model, inputs: Sequence[Mapping[str, Any]], states: Sequence[str]) -> Model:
    """The model with the names of its dynamic dimensions, which a stored program has lost, and which of its inputs are states."""
    given = []
    for item, said in zip(model.inputs, inputs, strict=True):
        dims = (None, *(d if isinstance(d, str) else None for d in said["shape"][1:]))
        given.append(replace(item, dims=dims if any(dims) else (), state=item.name in states))
    return replace(model, inputs=tuple(given))


def _apart(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Largest difference of two answers, and the largest value of the second."""
    pairs = [(a[n].astype(np.float64), b[n].astype(np.float64)) for n in b]
    return max(float(np.abs(x - y).max(initial=0)) for x, y in pairs), max(float(np.abs(y).max(initial=0)) for _, y in pairs)  # fmt: skip


def _bound(difference: float, largest: float, unit: float) -> float:
    """Largest difference of an output to the reference's on the CPU that is accepted of a GPU.

    Both compute one program; only the order of sums differs, and with it where 16 bits round. Each is about as far from the float32
    program as the other: twice that distance, as measured on the golden samples, is accepted, at least ROUNDINGS units of the
    largest output and at most CARRIED of it.
    """
    return min(max(2 * difference, ROUNDINGS * unit * largest), max(CARRIED * largest, ROUNDINGS * unit * largest))
