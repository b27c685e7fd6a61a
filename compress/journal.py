"""`Journal`: what a run has made so far, in a folder beside its output, so that memory is let go and an interrupted run goes on.

    identity.json                    what the run was given: model, data, recipe, target, seed (hashes of what is large)
    <step>/<block>.safetensors       what a pass made of one block: tensors, and a JSON of facts in the file's metadata

A pass hands a block's result over and gets the same tensors back, mapped from the file. The next run with the same input finds
the file and takes the result from there; passes are deterministic, so its output has the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.fx import GraphModule

from ..common import files
from ..common.errors import PlanishError, listed
from ..common.progress import say
from . import layers
from .mapped import Mapped, safetensors_file
from .model import Model

IDENTITY, SUFFIX = "identity.json", ".safetensors"
SPILL = 1 << 26
"""bytes of new tensors in memory from which `spill` writes them out"""
GENERATOR = "generator"
"""tensor of a record: state of the random generator behind a block, where it drew"""


@dataclass(frozen=True)
class Record:
    """What a pass made of one block."""

    tensors: Mapping[str, torch.Tensor]
    facts: Any
    """anything that JSON can hold"""


@dataclass(frozen=True)
class Journal:
    """The part of the folder that one pass writes; without a folder nothing is kept."""

    folder: Path | None = None
    step: str = ""
    maps: list[Mapped] = field(default_factory=list)
    """files that the model's tensors are read from; grows"""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """what the run was given"""

    def section(self, name: str) -> Journal:
        """The part that belongs to a pass, or to a pass inside a pass."""
        return replace(self, step=f"{self.step}/{name}" if self.step else name)

    def knows(self, block: str) -> bool:
        """Whether an earlier run, or this one, has a block's result."""
        return self.folder is not None and self._file(block).is_file()

    def once(self, block: str, what: Sequence[str], make: Callable[[], Record], generator: torch.Generator) -> Record:
        """The block's result as stored; made now, and stored, when there is none. `what` names the layers that it is of.

        Raises PlanishError for a file that is damaged or of other layers, and for a full disk.
        """
        if self.folder is None:
            return make()
        path = self._file(block)
        if not path.is_file():
            self._start()
            before = generator.get_state()
            record = make()
            tensors = {n: t.detach().contiguous() for n, t in record.tensors.items()}
            after = generator.get_state()
            if not torch.equal(before, after):
                tensors[GENERATOR] = after
            _write(path, tensors, {"layers": list(what), "made": record.facts})
        tensors = self._map(path)
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        if facts["layers"] != list(what):
            raise PlanishError(
                f"'{path}' was made of {listed(facts['layers'])}, not of {listed(what)}; remove the folder '{self.folder}'"
            )
        if GENERATOR in tensors:
            generator.set_state(tensors.pop(GENERATOR).clone())
        return Record(tensors, facts["made"])

    def release(self) -> None:
        """Let go of the pages of all mapped tensors."""
        for mapped in self.maps:
            mapped.release()

    def spill(self, module: GraphModule) -> None:
        """Write the tensors that live in memory to a file without a name and map them from there, when they have grown large."""
        if self.folder is None:
            return
        every = [*module.named_parameters(), *module.named_buffers()]
        own = {n: t for n, t in every if not any(m.holds(t) for m in self.maps)}
        if sum(t.numel() * t.element_size() for t in own.values()) < SPILL:
            return
        self._start()
        handle, name = tempfile.mkstemp(dir=self.folder)
        os.close(handle)
        path = Path(name)
        try:
            safetensors.torch.save_file({n: t.detach().contiguous() for n, t in own.items()}, path)
            tensors = self._map(path)
        finally:
            path.unlink()
        for name, tensor in tensors.items():
            layers.set_tensor(module, name, tensor)
        for node in module.graph.nodes:
            if node.op == "get_attr" and str(node.target) in tensors:
                node.meta["val"] = layers.tensor(module, str(node.target))

    def _map(self, path: Path) -> dict[str, torch.Tensor]:
        mapped, tensors = safetensors_file(path)
        self.maps.append(mapped)
        return tensors

    def _start(self) -> None:
        """Make the folder, which says at once what it belongs to."""
        root = self.folder
        if root is None or (root / IDENTITY).is_file():
            return
        with files.new_folder(root) as work:
            (work / IDENTITY).write_text(files.to_json(self.identity), encoding="utf-8")

    def _file(self, block: str) -> Path:
        assert self.folder is not None
        return self.folder / self.step / (block + SUFFIX)


@contextlib.contextmanager
def opened(output: Path | None, given: Callable[[], Mapping[str, Any]], force: bool, model: Model) -> Iterator[Journal]:
    """The journal of a run that writes to `output`: in the folder `<output>.partial`, which goes when the run ends well.

    A run that stops leaves it once a block is done. `given` tells what identifies the input. Raises PlanishError when the folder
    belongs to a run with other input (with `force` it is removed).
    """
    if output is None:
        yield Journal(maps=list(model.mapped))
        return
    folder = output.with_name(output.name + ".partial")
    identity = json.loads(json.dumps(given()))
    if folder.exists():
        found = files.read_json(folder / IDENTITY) if (folder / IDENTITY).is_file() else {}
        other = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
        if other and not force:
            raise PlanishError(
                f"'{folder}' holds what an interrupted run made of other input (not the same: {listed(other)}); repeat that command "
                "to finish it, or remove the folder, or pass --force to begin anew"
            )
        if other:
            shutil.rmtree(folder)
        else:
            blocks = len(list(folder.rglob("*" + SUFFIX)))
            say(f"resuming: {blocks} blocks are taken from '{folder}'")
    journal = Journal(folder, maps=list(model.mapped), identity=identity)
    try:
        yield journal
    except BaseException:
        if folder.exists():
            if any(folder.rglob("*" + SUFFIX)):
                say(f"what is done is in '{folder}'; the same command goes on from there")
            else:
                shutil.rmtree(folder)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def digest(arrays: Mapping[str, np.ndarray], labels: np.ndarray | None) -> str:
    """Hash of samples with their names, shapes and types."""
    found = hashlib.sha256()
    for name, array in [*sorted(arrays.items()), *([] if labels is None else [("labels", labels)])]:
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def model_digest(model: Model) -> str:
    """Hash of a model's graph and of its tensors, whose pages are let go again."""
    found = hashlib.sha256(str(model.graph.graph).encode())
    for name, tensor in [*model.graph.named_parameters(), *model.graph.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        model.release()
    return found.hexdigest()


def _write(path: Path, tensors: dict[str, torch.Tensor], facts: Any) -> None:
    """Whole or not at all, also when the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".part")
    try:
        safetensors.torch.save_file(tensors, work, {"facts": json.dumps(facts)})
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        work.unlink(missing_ok=True)
        raise PlanishError(f"'{path}' cannot be written: {getattr(error, 'strerror', None) or error}") from None
