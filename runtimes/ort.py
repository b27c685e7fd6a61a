"""Runtime `ort`: ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..common.progress import say
from ..export.artifact import Artifact
from ..export.ort_session import create, feeds, run
from .measure import latency, machine, peak_memory
from .session import Arrays, Layer, Profile, Runtime, Session

__all__ = ["Ort", "OrtSession", "create", "run"]


class Ort(Runtime):
    """ONNX Runtime, CPU execution provider."""

    formats: ClassVar[tuple[str, ...]] = ("onnx", "onnx_standard", "onnx_tensorrt")

    def open(self, artifact: Artifact, threads: int) -> OrtSession:
        """Load model.onnx; says so where it was made for another kind of device than this one."""
        if artifact.target.startswith("cuda"):
            say(f"ONNX Runtime's CPU provider runs this artifact here; it was made for '{artifact.target}'")
        return OrtSession(artifact, threads)


class OrtSession(Session):
    """A loaded ONNX file."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.artifact, self.threads = artifact, threads
        self.session = create(artifact.folder / "model.onnx", threads)
        self.names = [o.name for o in self.session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch."""
        return run(self.session, inputs)

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Latency of the session, then a shorter run with ONNX Runtime's own profiler for the per-layer table."""
        import onnxruntime as ort

        given = feeds(self.session, inputs)
        timing = latency(lambda: self.session.run(None, given), runs, warmup)
        path = self.artifact.folder / "model.onnx"
        return Profile(
            target="host",
            format=self.artifact.format,
            kind="measured",
            latency_ms=timing,
            peak_memory_bytes=peak_memory(),
            file_bytes=path.stat().st_size,
            layers=_layers(path, given, self.threads, self.artifact.manifest.get("macs", {})),
            environment=machine(self.threads, artifact_target=self.artifact.target, onnxruntime=ort.__version__),
        )


def _layers(path: Path, given: Arrays, threads: int, macs: dict[str, int]) -> tuple[Layer, ...]:
    """Median milliseconds of every node over 20 profiled runs, in the order in which they ran."""
    times: dict[str, list[float]] = defaultdict(list)
    ops: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        session = create(path, threads, enable_profiling=True, profile_file_prefix=str(Path(scratch) / "p"))
        for _ in range(20):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time").partition("_token_")[0].removesuffix("_nchwc")
            times[name].append(event["dur"] / 1e3)
            ops[name] = event["args"]["op_name"]
    return tuple(Layer(n, ops[n], macs.get(n), statistics.median(t)) for n, t in times.items())
