"""Runtime `ort`: ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..common.errors import PlanishError
from ..export.artifact import Artifact
from .measure import latency, machine, peak_memory
from .session import Arrays, Layer, Profile, Runtime, Session


class Ort(Runtime):
    """ONNX Runtime, CPU execution provider."""

    formats: ClassVar[tuple[str, ...]] = ("onnx",)

    def open(self, artifact: Artifact, threads: int) -> OrtSession:
        """Load model.onnx."""
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

        feeds = dict(inputs)
        timing = latency(lambda: self.session.run(None, feeds), runs, warmup)
        path = self.artifact.folder / "model.onnx"
        return Profile(
            target="host",
            format=self.artifact.format,
            kind="measured",
            latency_ms=timing,
            peak_memory_bytes=peak_memory(),
            file_bytes=path.stat().st_size,
            layers=_layers(path, feeds, self.threads, self.artifact.manifest.get("macs", {})),
            environment=machine(self.threads, artifact_target=self.artifact.target, onnxruntime=ort.__version__),
        )


def create(model: Path | bytes, threads: int, **settings: Any) -> Any:
    """An onnxruntime.InferenceSession with a fixed thread count; PlanishError when the file cannot be loaded."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for name, value in settings.items():
        setattr(options, name, value)
    try:
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises bare RuntimeError subclasses of its own for every fault
        name = f"'{model}'" if isinstance(model, Path) else "the model"
        raise PlanishError(f"ONNX Runtime cannot load {name}: {str(error).splitlines()[0][:300]}") from error


def run(session: Any, inputs: Arrays, batch: int = 256) -> dict[str, np.ndarray]:
    """Outputs of an InferenceSession for (n, ...) inputs, at most `batch` samples at a time (1 for a fixed batch of 1)."""
    first = session.get_inputs()[0]
    if first.shape and isinstance(first.shape[0], int):
        batch = max(1, first.shape[0])
    names = [o.name for o in session.get_outputs()]
    n = len(next(iter(inputs.values())))
    parts = [
        session.run(names, {k: np.ascontiguousarray(v[i : i + batch]) for k, v in inputs.items()})
        for i in range(0, n, batch)
    ]
    return {name: np.concatenate([p[i] for p in parts]) for i, name in enumerate(names)}


def _layers(path: Path, feeds: Arrays, threads: int, macs: dict[str, int]) -> tuple[Layer, ...]:
    """Median milliseconds of every node over 20 profiled runs, in the order in which they ran."""
    times: dict[str, list[float]] = defaultdict(list)
    ops: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        session = create(path, threads, enable_profiling=True, profile_file_prefix=str(Path(scratch) / "p"))
        for _ in range(20):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time").partition("_token_")[0].removesuffix("_nchwc")
            times[name].append(event["dur"] / 1e3)
            ops[name] = event["args"]["op_name"]
    return tuple(Layer(n, ops[n], macs.get(n), statistics.median(t)) for n, t in times.items())
