"""Running an ONNX file in ONNX Runtime: what the exporter measures with, and what the runtime `ort` is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import PlanishError
from . import metadata

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
"""numpy types of states"""


def create(model: Path | bytes, threads: int, **settings: Any) -> Any:
    """An onnxruntime.InferenceSession with a fixed thread count; PlanishError when the file cannot be loaded."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.qdq_matmulnbits_accuracy_level", "0"
    )  # exact; nodes that say a level keep it
    for name, value in settings.items():
        setattr(options, name, value)
    with plain_errors(f"cannot load '{model}'" if isinstance(model, Path) else "cannot load the model"):
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
        )


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn every error of ONNX Runtime into a PlanishError that begins 'ONNX Runtime <what>'."""
    try:
        yield
    except Exception as error:  # onnxruntime raises bare RuntimeError subclasses of its own for every fault
        raise PlanishError(f"ONNX Runtime {what}: {(str(error).splitlines() or [''])[0][:300]}") from error


def feeds(session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs and, for each state of the file that is not among them, an empty one (zeros where nothing of it is dynamic)."""
    n = len(next(iter(inputs.values())))
    found = {k: np.ascontiguousarray(v) for k, v in inputs.items()}
    states = metadata.parsed(session.get_modelmeta().custom_metadata_map, metadata.STATES)
    for item in session.get_inputs():
        if item.name in states and item.name not in found:
            shape = (n, *(d if isinstance(d, int) else 0 for d in item.shape[1:]))
            found[item.name] = np.zeros(shape, TYPES[item.type])
    return found


def batches(session: Any, inputs: Mapping[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Feeds of at most `size` samples of (n, ...) inputs at a time; of the file's own batch where that is fixed."""
    first = session.get_inputs()[0]
    if first.shape and isinstance(first.shape[0], int):
        size = max(1, first.shape[0])
    n = len(next(iter(inputs.values())))
    for start in range(0, n, size):
        yield feeds(session, {k: v[start : start + size] for k, v in inputs.items()})


def run(session: Any, inputs: Mapping[str, np.ndarray], batch: int = 256) -> dict[str, np.ndarray]:
    """Outputs of an InferenceSession for (n, ...) inputs, at most `batch` samples at a time."""
    names = [o.name for o in session.get_outputs()]
    with plain_errors("cannot run the model"):
        parts = [session.run(names, part) for part in batches(session, inputs, batch)]
    return {name: np.concatenate([p[i] for p in parts]) for i, name in enumerate(names)}
