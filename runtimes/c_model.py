"""What a `c` artifact says about itself, and its samples as the generated code wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common import files
from ..common.errors import PlanishError, listed
from ..export import codes
from ..export.artifact import Artifact
from ..export.c import MODEL
from ..targets.target import Memory
from .session import Arrays

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Border:
    """An input or output of the model."""

    name: str
    shape: tuple[int, ...]
    """batch 1 included"""
    dtype: str
    scale: np.float32
    zero_point: int
    order: tuple[int, ...]
    """axes of `shape` in the order of memory"""
    function: str
    """C function that returns its address"""
    size: int
    offset: int
    """in the arena"""

    def pack(self, x: Array) -> Array:
        """int8 (n, size) in the order of memory, for values (n, ...)."""
        given = codes.to_codes(x, self.dtype, self.scale, self.zero_point)
        return np.ascontiguousarray(given.transpose(self.order).reshape(len(x), self.size))

    def unpack(self, memory: Array) -> Array:
        """Values (n, ...) for int8 (n, size) in the order of memory."""
        stored = memory.reshape(len(memory), *(self.shape[a] for a in self.order[1:]))
        return np.ascontiguousarray(
            codes.from_codes(stored.transpose(np.argsort(self.order)), self.dtype, self.scale, self.zero_point)
        )


@dataclass(frozen=True)
class CModel:
    """The project in a `c` artifact."""

    name: str
    sources: tuple[str, ...]
    inputs: tuple[Border, ...]
    outputs: tuple[Border, ...]
    layers: tuple[dict[str, Any], ...]
    """{name, op, kernel, macs} of every call, in order"""
    macs: int
    facts: dict[str, Any]
    """the whole file"""

    @property
    def regions(self) -> tuple[Memory, Memory] | None:
        """Flash and RAM that the firmware was linked for; None for a project of another kind of target."""
        found = self.facts.get("regions")
        return None if found is None else (Memory(**found["flash"]), Memory(**found["ram"]))

    def pack(self, inputs: Arrays) -> list[Array]:
        """int8 (n, size) of every input. Raises PlanishError for inputs that are missing or have another shape."""
        lacking = [b.name for b in self.inputs if b.name not in inputs]
        if lacking:
            raise PlanishError(
                f"input {listed(lacking)} is missing; the model takes {listed(b.name for b in self.inputs)}"
            )
        arrays = [np.asarray(inputs[b.name]) for b in self.inputs]
        for border, x in zip(self.inputs, arrays, strict=True):
            if x.ndim != len(border.shape) or x.shape[1:] != border.shape[1:]:
                raise PlanishError(
                    f"input '{border.name}' has shape {x.shape}; (n, {', '.join(map(str, border.shape[1:]))}) is accepted"
                )
        if len({len(x) for x in arrays}) > 1:
            raise PlanishError(f"the inputs have different numbers of samples: {[len(x) for x in arrays]}")
        return [b.pack(x) for b, x in zip(self.inputs, arrays, strict=True)]

    def unpack(self, memory: list[Array]) -> dict[str, Array]:
        """Outputs by name for int8 (n, size) of each."""
        return {b.name: b.unpack(m) for b, m in zip(self.outputs, memory, strict=True)}


def load(artifact: Artifact) -> CModel:
    """The model of a `c` artifact."""
    facts = files.read_json(artifact.folder / MODEL)
    inputs, outputs = (tuple(_border(b) for b in facts[side]) for side in ("inputs", "outputs"))
    return CModel(facts["name"], tuple(facts["sources"]), inputs, outputs, tuple(facts["layers"]), facts["macs"], facts)


def _border(b: dict[str, Any]) -> Border:
    shape, order = tuple(b["shape"]), tuple(b["order"])
    return Border(
        b["name"],
        shape,
        b["dtype"],
        np.float32(b["scale"]),
        b["zero_point"],
        order,
        b["function"],
        b["size"],
        b["offset"],
    )
