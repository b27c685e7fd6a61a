"""`Artifact`: a folder with a manifest, the files for the device, and golden inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..common import files
from ..common.errors import PlanishError, listed

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. `load` reads the manifest only; `check` compares every file with its hash."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def format(self) -> str:
        """onnx, onnx_standard, tvm, c, pt2 or bitsandbytes."""
        return self.manifest["format"]

    @property
    def target(self) -> str:
        """Name of the target it was made for."""
        return self.manifest["target"]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """One {name, shape, dtype, [scale, zero_point, layout]} each."""
        return self.manifest["inputs"]

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """Like `inputs`."""
        return self.manifest["outputs"]

    def golden(self) -> dict[str, np.ndarray]:
        """Arrays `input.<name>`, `original.<name>` and `expected.<name>` (n, ...)."""
        return load_file(self.folder / "golden.safetensors")

    def check(self) -> dict[str, bool]:
        """{file: hash agrees}. Raises PlanishError naming files that the manifest lists and the folder lacks."""
        lacking = [n for n in self.manifest["files"] if not (self.folder / n).is_file()]
        if lacking:
            raise PlanishError(f"artifact '{self.folder}' lacks {listed(lacking)}")
        return {n: files.sha256(self.folder / n) == f["sha256"] for n, f in self.manifest["files"].items()}


def load(folder: Path) -> Artifact:
    """The artifact in `folder`. Raises PlanishError when it is not one, or is of a newer format version."""
    if not folder.is_dir():
        raise PlanishError(f"artifact '{folder}' is not a folder")
    manifest = files.read_json(folder / "manifest.json")
    lacking = [k for k in ("format", "format_version", "target", "inputs", "outputs", "files") if k not in manifest]
    if lacking:
        raise PlanishError(f"'{folder}/manifest.json' is not an artifact's: it lacks {listed(lacking)}")
    if manifest["format_version"] > FORMAT_VERSION:
        raise PlanishError(
            f"artifact '{folder}' has format version {manifest['format_version']}; this planish reads up to {FORMAT_VERSION}"
        )
    return Artifact(folder, manifest)
