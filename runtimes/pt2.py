"""Runtime `pt2`: a torch.export program in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from ..compress import program_file
from ..compress.model import Model, from_program, predict
from ..export.artifact import Artifact
from .measure import latency, machine, peak_memory
from .session import Arrays, Profile, Runtime, Session


class Pt2(Runtime):
    """PyTorch on the CPU, every quantized op by its reference."""

    formats: ClassVar[tuple[str, ...]] = ("pt2",)

    def open(self, artifact: Artifact, threads: int) -> Pt2Session:
        """Load model.pt2 without running any code that the file brings."""
        path = artifact.folder / "model.pt2"
        program, mapped = program_file.open_mapped(path)
        names = tuple(o["name"] for o in artifact.outputs)
        model = replace(from_program(program, None, str(path)), names=names, mapped=(mapped,))
        return Pt2Session(artifact, model, threads)


class Pt2Session(Session):
    """A loaded program."""

    def __init__(self, artifact: Artifact, model: Model, threads: int) -> None:
        self.artifact, self.model, self.threads = artifact, model, threads

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch."""
        return predict(self.model, inputs)

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Latency in PyTorch; no per-layer table."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            timing = latency(lambda: self.run(inputs), runs, warmup)
        finally:
            torch.set_num_threads(before)
        return Profile(
            target="host",
            format=self.artifact.format,
            kind="measured",
            latency_ms=timing,
            peak_memory_bytes=peak_memory(),
            file_bytes=(self.artifact.folder / "model.pt2").stat().st_size,
            environment=machine(self.threads, artifact_target=self.artifact.target, torch=torch.__version__),
        )
