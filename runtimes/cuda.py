"""Runtime `cuda`: a program that was exported for a GPU, on the GPU of this machine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.fx.node import map_aggregate

from ..common.errors import PlanishError, missing_extra
from ..common.progress import say
from ..compress import layers, program_file
from ..compress.model import Model, from_program, predict
from ..export.artifact import Artifact
from ..export.gpu_tidy import CHECKS
from ..export.pt2 import PROGRAM, with_dims
from ..kernels.gpu.core import CORES, OLDEST
from . import cuda_decode, cuda_device
from .cuda_device import Facts
from .cuda_figures import Ceilings, achieved, grouped, work
from .measure import percentiles
from .session import Arrays, Greedy, Layer, Profile, Runtime, Session

REFERENCE = "--runtime pt2 runs its reference on the CPU"
PREFILL, CONTEXT = 512, 512
"""tokens of the prompt, and tokens before the one that is decoded, in a language model's profile"""
STEPS = 64
"""decoding steps that are timed, each of one token"""


class Cuda(Runtime):
    """PyTorch on an NVIDIA GPU, every planish op by its Triton kernel."""

    formats: ClassVar[tuple[str, ...]] = ("pt2",)

    def open(self, artifact: Artifact, threads: int) -> CudaSession:
        """Load model.pt2 into the GPU's memory. Raises PlanishError, one line, where this machine or the artifact does not allow it."""
        core = artifact.manifest.get("details", {}).get("core")
        check(artifact, core, cuda_device.facts())
        model = read(artifact)
        needed = model.bytes()
        free, total = cuda_device.memory()
        if needed > free:
            raise PlanishError(
                f"artifact '{artifact.folder}' needs {needed:,} bytes for its weights; {free:,} of the GPU's {total:,} are free"
            )
        with cuda_device.bounded(f"the weights of '{artifact.folder}' ({needed:,} bytes)"):
            return CudaSession(artifact, on(model, torch.device("cuda", 0)))


def check(artifact: Artifact, core: str | None, facts: Facts) -> None:
    """Raise PlanishError unless a machine with these facts runs an artifact for `core` (None: it was exported for a CPU)."""
    where = f"artifact '{artifact.folder}'"
    if core is None:
        raise PlanishError(
            f"{where} was exported for '{artifact.target}' and has no GPU program; export it again with --target cuda-sm90, or run it "
            f"with --runtime pt2"
        )
    if facts.cuda is None:
        raise PlanishError(f"{where} needs a GPU, and this torch is built without CUDA; {REFERENCE}")
    if not facts.available:
        raise PlanishError(f"{where} needs a GPU, and torch finds none here; {REFERENCE}")
    if facts.capability < OLDEST:
        raise PlanishError(
            f"'{facts.name}' has compute capability {facts.capability // 10}.{facts.capability % 10}; the kernels need "
            f"{OLDEST // 10}.{OLDEST % 10} or newer; {REFERENCE}"
        )
    fitting = max((c for c in CORES.values() if c.capability <= facts.capability), key=lambda c: c.capability)
    if fitting.name != core:
        raise PlanishError(
            f"{where} was built for {core}, and '{facts.name}' is sm_{facts.capability}: export it again with --target "
            f"cuda-{fitting.name.replace('_', '')}"
        )
    if not facts.triton:
        raise missing_extra("triton", "gpu", "running on a GPU")


def read(artifact: Artifact) -> Model:
    """The artifact's program as a model, its inputs described as in the manifest."""
    program, mapped = program_file.open_mapped(artifact.folder / PROGRAM)
    model = from_program(program, None, str(artifact.folder))
    names = tuple(o["name"] for o in artifact.outputs)
    model = with_dims(model, artifact.inputs, artifact.manifest.get("states", []))
    return replace(model, names=names, mapped=(mapped,))


def on(model: Model, device: torch.device) -> Model:
    """A copy of the model whose constants live on `device`, and whose ops make their tensors there."""
    made = replace(model.editable(), mapped=())
    graph = made.graph.graph
    for node in list(graph.nodes):
        if layers.op(node) in CHECKS:
            graph.erase_node(node)
            continue
        node.args = map_aggregate(node.args, lambda a: device if isinstance(a, torch.device) else a)  # pyright: ignore[reportAttributeAccessIssue]
        node.kwargs = map_aggregate(node.kwargs, lambda a: device if isinstance(a, torch.device) else a)  # pyright: ignore[reportAttributeAccessIssue]
    for name in sorted({str(n.target) for n in graph.nodes if n.op == "get_attr"}):
        value = layers.tensor(made.graph, name)
        layers.set_tensor(made.graph, name, value.detach().to(device))
    made.graph.recompile()
    return made


class CudaSession(Session):
    """A program in a GPU's memory."""

    def __init__(self, artifact: Artifact, model: Model) -> None:
        self.artifact, self.model = artifact, model
        self.device = torch.device("cuda", 0)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch."""
        with cuda_device.bounded(f"a batch of {len(next(iter(inputs.values())))}"):
            return predict(self.model, inputs, device=self.device)

    def greedy(self, capacity: int) -> Greedy | None:
        """Decoding with keys and values that stay where they are, each token one replay of a CUDA graph; None for a model without."""
        if not self.artifact.manifest.get("states"):
            return None
        try:
            program = cuda_decode.static(self.model)
        except PlanishError as error:
            say(f"no CUDA graph for decoding, so every token is read with its whole past: {error}")
            return None
        with cuda_device.bounded(f"the keys and values of {capacity} tokens"):
            return cuda_decode.Decoder(program, capacity, self.device, lambda step: cuda_device.Captured(step).replay)

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """One inference as a CUDA graph, with its data in the caches (warm) and not (cold), against ceilings of the same run."""
        feeds = [x.to(self.device) for x in self.model.feeds(inputs)]

        def once() -> Any:
            with torch.no_grad():
                return self.model.graph(*feeds)

        with cuda_device.bounded("a profile"):
            peak = cuda_device.peak(once)
            replay = cuda_device.Captured(once).replay
            warm = percentiles(cuda_device.times(replay, runs, warmup))
            cold = percentiles(cuda_device.times(replay, runs, warmup, flush=True))
            ceilings = Ceilings(
                cuda_device.copy_rate(),
                cuda_device.product_rate(torch.bfloat16) or math.inf,
                cuda_device.product_rate(torch.int8),
            )
            kernels = grouped(cuda_device.kernels(once))
            needed = work(read(self.artifact), [x.cpu() for x in feeds])  # shapes alone: no device takes part
            language = self._language(runs) if self.artifact.manifest.get("states") else {}
        return Profile(
            target=self.artifact.target,
            format=self.artifact.format,
            kind="measured",
            latency_ms=warm,
            peak_memory_bytes=peak,
            file_bytes=(self.artifact.folder / PROGRAM).stat().st_size,
            layers=tuple(Layer(name, f"{calls} launches", ms=us * 1e-3) for name, calls, us in kernels),
            environment={
                **cuda_device.environment(),
                "cold_ms": {"p50": cold.p50, "p90": cold.p90, "p99": cold.p99},
                "ceilings": {
                    "copy_bytes_per_second": ceilings.copy,
                    "bfloat16_operations_per_second": ceilings.product,
                    "int8_operations_per_second": ceilings.integer,
                },
                "work": {"bytes": needed.bytes, "operations": needed.operations},
                "warm": achieved(needed, warm.p50, ceilings),
                "cold": achieved(needed, cold.p50, ceilings),
                **language,
            },
        )

    def _language(self, runs: int) -> dict[str, Any]:
        """Milliseconds of reading a prompt, and of a token behind a context, batch 1."""
        decoder = self.greedy(CONTEXT + STEPS + 1)
        if not isinstance(decoder, cuda_decode.Decoder):
            return {}
        prompt = torch.zeros((1, PREFILL), dtype=torch.int64, device=self.device)

        def read() -> None:
            decoder.rewind(0)
            decoder.read(prompt)

        prefill = percentiles(cuda_device.times(read, max(1, min(runs, 20)), 3))
        decoder.rewind(0)
        decoder.read(prompt[:, :CONTEXT])
        decoder.step()  # captured here
        steps = percentiles(cuda_device.times(decoder.step, STEPS - 1, 0))
        return {
            "prefill": {"tokens": PREFILL, "ms": prefill.p50, "tokens_per_second": PREFILL / (prefill.p50 * 1e-3)},
            "decode": {"context": CONTEXT, "ms": steps.p50, "p99_ms": steps.p99, "tokens_per_second": 1e3 / steps.p50},
        }
