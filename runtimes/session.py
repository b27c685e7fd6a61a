"""`Runtime`, `Session` and `Profile`: running an artifact and measuring it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from ..export.artifact import Artifact

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Latency:
    """Milliseconds over `runs` single inferences after warm-up."""

    p50: float
    p90: float
    p99: float
    runs: int
    spread: float
    """(p90 - p10) / p50"""


@dataclass(frozen=True)
class Layer:
    """One row of the per-layer table; None where the runtime cannot tell."""

    name: str
    op: str
    macs: int | None = None
    ms: float | None = None
    instructions: int | None = None
    loads: int | None = None
    """words read: transfers of up to 32 bits"""
    stores: int | None = None
    """words written"""
    branches: int | None = None
    """taken branches, calls and returns"""
    cycles: tuple[int, int] | None = None
    """least and most, by the core's model"""
    measured_cycles: int | None = None
    """by the core's own counter"""


@dataclass(frozen=True)
class Profile:
    """What one runtime says about one artifact. None means not known; bytes, milliseconds, counts."""

    target: str
    format: str
    kind: Literal["measured", "emulated", "estimated"]
    """measured on the device that is named, emulated (exact instruction counts), or estimated by a stated model"""
    latency_ms: Latency | None = None
    instructions: int | None = None
    loads: int | None = None
    stores: int | None = None
    branches: int | None = None
    """words read and written, and taken branches, as in `Layer`"""
    cycles: int | None = None
    """measured by the core's own counter"""
    cycles_estimate: tuple[int, int] | None = None
    """least and most cycles by the core's model (runtimes/cycles.py)"""
    latency_estimate_ms: tuple[float, float] | None = None
    """the same at the target's clock"""
    energy_estimate_uj: tuple[float, float] | None = None
    """the same with the supply current of the device's datasheet"""
    macs: int | None = None
    ram_bytes: int | None = None
    stack_bytes: int | None = None
    flash_bytes: int | None = None
    file_bytes: int | None = None
    peak_memory_bytes: int | None = None
    layers: tuple[Layer, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    """runtime and package versions, CPU, threads, emulator"""


class Greedy(Protocol):
    """One text that a language model continues by the most likely token, its states kept where the model runs."""

    def read(self, tokens: torch.Tensor) -> int:
        """Tokens (1, t) int64 that join the text -> the most likely one behind them."""
        ...

    def next(self) -> int:
        """The token behind the one that was given last, which joins the text."""
        ...


class Session(abc.ABC):
    """A loaded artifact. `run` takes and returns arrays by the names in the artifact's manifest."""

    @abc.abstractmethod
    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch of any size (n, ...); a runtime with a fixed batch of 1 loops over the samples."""

    @abc.abstractmethod
    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Time single inferences (batch as given in `inputs`)."""

    def greedy(self, capacity: int) -> Greedy | None:
        """A faster way to continue a text of up to `capacity` tokens than `run` step by step; None where there is none."""
        return None

    def close(self) -> None:
        """Release what the session holds."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Runtime(abc.ABC):
    """A way to run artifacts. One file a runtime; its name is the file's."""

    formats: ClassVar[tuple[str, ...]]
    """artifact formats that it runs"""

    @abc.abstractmethod
    def open(self, artifact: Artifact, threads: int) -> Session:
        """Load the artifact. Raises common.errors.Missing when a package or tool is absent."""
