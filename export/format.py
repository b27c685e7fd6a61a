"""`Format`: one way to write an artifact. One file of this folder a format; its name is the file's."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..targets.target import Target
from .graph import Graph


@dataclass(frozen=True)
class Source:
    """What is exported: the model as ONNX, and samples to prove the result with."""

    onnx: onnx.ModelProto
    """float or QDQ, batch-dynamic where the model is; inputs, outputs and states alone for a format that `reads` no graph"""
    golden_inputs: Mapping[str, np.ndarray]
    """(n, ...) by input name"""
    name: str
    """used for generated identifiers and file names: letters, digits, underscore"""
    program: Path | None = None
    """the compressed model's .pt2, when the source is one"""
    fused: onnx.ModelProto | None = None
    """`onnx` before its fused low-bit ops were lowered: one node of the domain planish each; None where there is none"""
    macs: Mapping[str, int] | None = None
    """multiply-accumulates of each layer for one sample; None: counted on `onnx`"""
    origin: Mapping[str, str] | None = None
    """small files of the Hugging Face folder that the model comes from, config.json among them, content by name"""
    graph: Graph | None = None
    """the integer network that format c writes instead of `onnx`: one that was narrowed or cut into patches for a device"""


@dataclass(frozen=True)
class Written:
    """What a format wrote into its folder, for the manifest."""

    inputs: list[dict[str, Any]]
    """{name, shape, dtype} each; integer inputs also scale, zero_point, layout"""
    outputs: list[dict[str, Any]]
    flash_bytes: int | None = None
    """bytes of code and constants on the device"""
    ram_bytes: int | None = None
    """bytes of working memory on the device"""
    details: Mapping[str, Any] = field(default_factory=dict)
    """format-specific facts: memory plan, toolchain, fused layers, schedule, numeric bound"""
    warnings: tuple[str, ...] = ()
    max_error: float = 0.0
    """largest absolute difference of an output to the golden answers that the format allows; 0: bit for bit"""
    answers: Mapping[str, np.ndarray] | None = None
    """golden answers by output name where the format defines its numbers itself; None: those of ONNX Runtime"""


class Format(abc.ABC):
    """Writes an artifact's files. The pipeline adds manifest.json and golden.safetensors."""

    def reads(self, target: Target) -> bool:
        """Whether `write` reads the model as an ONNX graph; where it does not, a model of any size is taken."""
        return True

    @abc.abstractmethod
    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Write the files into `folder` (empty, temporary). Same source and target: the same bytes.

        Raises PlanishError for an op that the format does not know (naming the node and listing the ops) and for a
        model that is too large for the target.
        """
