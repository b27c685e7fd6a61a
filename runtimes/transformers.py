"""Runtime `transformers`: a bitsandbytes folder in transformers, its linears computed by bitsandbytes' own kernels on this CPU.

Everything is computed in float32, whatever config.json names, so that what differs from planish is what bitsandbytes computes otherwise.
For the same reason the product in bfloat16 that bitsandbytes takes on CPUs with AVX512-BF16 is switched off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from ..common import files
from ..common.errors import PlanishError, missing_extra
from ..compress import hugging_face
from ..compress.model import Input
from ..export.artifact import Artifact
from ..kernels import codebooks
from .measure import latency, machine, peak_memory
from .session import Arrays, Profile, Runtime, Session

BATCH = 256
"""samples that are computed at a time"""


class Transformers(Runtime):
    """transformers and bitsandbytes on the CPU."""

    formats: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    def open(self, artifact: Artifact, threads: int) -> TransformersSession:
        """Load the folder; no code of it is run. Raises PlanishError for a layer that bitsandbytes decodes wrongly on this CPU."""
        for package in ("bitsandbytes", "accelerate"):
            try:
                __import__(package)
            except ModuleNotFoundError as error:
                raise missing_extra(package, "gpu", f"running the bitsandbytes artifact '{artifact.folder}'") from error
        content = files.read_json(artifact.folder / "config.json")
        config, kind = hugging_face.architecture(content, artifact.folder)
        with _quiet():
            module: Any = kind.from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
                artifact.folder,
                dtype=torch.float32,
                device_map={"": "cpu"},
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
            )
        _in_float32(module)
        _check(module, artifact)
        module, inputs, outputs = hugging_face.in_form(module.eval(), config)
        return TransformersSession(artifact, module, inputs, outputs, threads)


class TransformersSession(Session):
    """A loaded model."""

    def __init__(self, artifact: Artifact, module: Any, inputs: tuple[Input, ...], outputs: Any, threads: int) -> None:
        self.artifact, self.module, self.inputs, self.outputs, self.threads = artifact, module, inputs, outputs, threads

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch."""
        n = len(next(iter(inputs.values())))
        parts = [self._batch({k: v[i : i + BATCH] for k, v in inputs.items()}) for i in range(0, n, BATCH)]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def _batch(self, inputs: Arrays) -> dict[str, np.ndarray]:
        n = len(next(iter(inputs.values())))
        feeds = [
            torch.from_numpy(np.ascontiguousarray(inputs[i.name])).to(i.dtype) if i.name in inputs else i.empty(n)
            for i in self.inputs
        ]
        with torch.no_grad():
            answers = self.module(*feeds)
        return {name: value.numpy() for name, value in zip(self.outputs, answers, strict=True)}

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Latency in PyTorch; no per-layer table."""
        import bitsandbytes
        import transformers

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            timing = latency(lambda: self.run(inputs), runs, warmup)
        finally:
            torch.set_num_threads(before)
        versions = {"transformers": transformers.__version__, "bitsandbytes": bitsandbytes.__version__}
        return Profile(
            target="host",
            format=self.artifact.format,
            kind="measured",
            latency_ms=timing,
            peak_memory_bytes=peak_memory(),
            file_bytes=(self.artifact.folder / hugging_face.SINGLE).stat().st_size,
            environment=machine(
                self.threads, artifact_target=self.artifact.target, torch=torch.__version__, **versions
            ),
        )


def _in_float32(module: Any) -> None:
    """Let every layer compute in float32, in place; codes stay as they are."""
    for layer in module.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = layer.compute_dtype = torch.float32
            layer.support_avx512bf16_for_cpu = False
    for parameter in module.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _check(module: torch.nn.Module, artifact: Artifact) -> None:
    """Raise PlanishError where bitsandbytes does not decode blocks that run over the end of a row."""
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in module.named_modules():
        weight: Any = getattr(layer, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None or state.shape[1] % state.blocksize == 0:
            continue
        codes = weight.data.reshape(-1).view(torch.uint8).reshape(state.shape[0], -1)
        second = offset = None
        if state.nested:
            second, offset = state.state2.absmax, state.offset
        wanted = codebooks.decode(codes, state.absmax, second, offset, state.quant_type, state.blocksize)
        if not torch.allclose(dequantize_4bit(weight.data, state), wanted, atol=1e-5):
            raise PlanishError(
                f"artifact '{artifact.folder}': bitsandbytes decodes '{name}' wrongly on this CPU, whose rows of {state.shape[1]} are no whole "
                f"blocks of {state.blocksize}; blocks that divide the rows are read"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and remarks of transformers."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
