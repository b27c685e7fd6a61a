"""`Pass`: one compression method. A frozen, validated config whose fields are its only configuration, with `apply`."""

from __future__ import annotations

import abc
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pydantic
import torch

from ..targets.target import Target
from .data import Data
from .journal import Journal
from .model import Model


@dataclass(frozen=True)
class Context:
    """What a pass is given besides the model: the original, data, the device, and the only source of randomness."""

    original: Model
    """the uncompressed model, which distillation takes as teacher"""
    data: Data | None
    """calibration and training samples; None when the user gave none"""
    target: Target
    generator: torch.Generator
    time: Callable[[Model, Mapping[str, np.ndarray]], float] | None = None
    """milliseconds of a small model on inputs (n, ...) by name, as exported for and run on this machine; None where nothing measures"""
    journal: Journal = field(default_factory=Journal)
    """keeps what a pass made of each block, for memory and for resuming"""


@dataclass(frozen=True)
class Part:
    """What a pass will do to one block, in bytes."""

    layers: tuple[str, ...]
    """that are replaced"""
    stored: int
    """what the replaced layers take"""
    weights: int
    """what their weights take in float32, and as stored where that is something else"""
    work: int
    """temporaries, about"""


@dataclass(frozen=True)
class Foreseen:
    """What a pass will do, known from shapes alone."""

    blocks: Mapping[str, Part]
    """by block name"""
    samples: int
    """calibration samples that are run, at most; 0 for a pass that reads no data"""
    problems: tuple[str, ...] = ()
    """one line for each layer that it would refuse"""


class Pass(pydantic.BaseModel, abc.ABC):
    """A compression method. Its name in a recipe is its file's path below compress/, e.g. `quantize.static`."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    needs_data: ClassVar[bool] = False
    """whether `apply` fails without calibration data; checked before any work starts"""
    trains: ClassVar[bool] = False
    """whether the data is used for training, so that accuracy must be measured on samples held out"""

    def untrained(self) -> bool:
        """Whether the model that `apply` returns computes something else than the one given until it is trained."""
        return False

    def foresee(self, model: Model, taken: frozenset[str]) -> Foreseen | None:
        """What `apply` will do to a model whose layers in `taken` earlier passes have replaced; None for a pass that cannot tell.

        Raises PlanishError for what concerns no single layer, as `apply` does. No weight is read.
        """
        return None

    formats: ClassVar[tuple[str, ...]] = ("c", "onnx", "pt2", "tvm")
    """export formats that can run what the pass leaves behind"""

    @abc.abstractmethod
    def apply(self, model: Model, context: Context) -> Model:
        """The compressed model; the one given is not changed. Same inputs and generator state, same result."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer name matches one of the globs (`layer1.*`, `*conv*`)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
