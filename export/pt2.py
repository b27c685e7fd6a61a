"""Format `pt2`: the compressed program itself, for PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..common.errors import PlanishError
from ..compress import program_file
from ..compress.model import from_program, predict
from ..targets.target import Target
from .format import Format, Source, Written
from .onnx import describe


class Pt2(Format):
    """model.pt2, a torch.export program whose quantized weights are stored as codes; runs in PyTorch."""

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Copy the program. Raises PlanishError when the source is an ONNX file, which has none."""
        if source.program is None:
            raise PlanishError(
                f"format 'pt2' needs a compressed model or a PyTorch model; '{source.name}' is an ONNX file"
            )
        shutil.copyfile(source.program, folder / "model.pt2")
        graph = source.onnx.graph
        model = from_program(program_file.load(folder / "model.pt2"), None, source.name)
        answers = predict(model, source.golden_inputs)
        names = [o.name for o in graph.output]
        return Written(
            [describe(i) for i in graph.input],
            [describe(o) for o in graph.output],
            answers=dict(zip(names, answers.values(), strict=True)),
        )
