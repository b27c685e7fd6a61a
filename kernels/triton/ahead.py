"""Compilation without a GPU: cubins, and what they use (registers, shared memory, spills, tensor cores).

Compilation runs in processes of its own (worker.py): two at a time, out of reach of the interpreter that a process may have Triton in, and
a compiler that crashes is an error of one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...common.errors import PlanishError, missing_extra

TENSOR_CORES = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "OMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
"""machine instructions that multiply matrices: of a warp, then of a group of warps, then Blackwell's"""
LOCAL = ("LDL", "STL")
"""machine instructions that read and write spilled registers"""


@dataclass(frozen=True)
class Variant:
    """One specialization of one kernel."""

    module: str
    """file in kernels/triton/"""
    kernel: str
    """function in it"""
    types: Mapping[str, str]
    """type of each run-time argument by name: '*bf16', '*fp16', '*fp32', '*i8', '*u8', '*i32', '*fp8e4nv', 'i32', 'fp32'"""
    constants: Mapping[str, Any]
    """every other argument by name: numbers, strings, None for an absent pointer; together with `types` all of the function's"""
    warps: int = 4
    stages: int = 3
    matrix: bool = True
    """whether it must use tensor cores"""
    label: str = ""
    """what it is for, e.g. 'w4a16 g128, up to 16 tokens'"""
    unaligned: tuple[str, ...] = ()
    """run-time arguments that are not known to be multiples of 16 (bytes for pointers)"""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant for one core."""

    core: str
    registers: int
    """of one thread"""
    shared_bytes: int
    """of one block"""
    stack_bytes: int
    spills: int
    """machine instructions that read or write spilled registers"""
    tensor_cores: Mapping[str, int]
    """number of matrix instructions by mnemonic"""
    instructions: Mapping[str, int]
    """number of all machine instructions by mnemonic, without modifiers"""
    threads: int
    name: str
    """of the function in the cubin"""
    files: Mapping[str, str] = field(default_factory=dict)
    """paths of ptx, cubin, sass and ttgir where `keep` was given"""


def compile_all(variants: Sequence[Variant], core: str, keep: Path | None = None, workers: int = 2) -> list[Compiled]:
    """Every variant for a core, in order; `keep` is a folder for the compiler's outputs.

    Raises PlanishError with the compiler's last line for one that it refuses.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise missing_extra("triton", "gpu", "compiling GPU kernels") from error
    if not variants:
        return []
    parts = [list(range(len(variants)))[i::workers] for i in range(min(workers, len(variants)))]
    with tempfile.TemporaryDirectory() as scratch:
        running = [
            _start(core, {i: variants[i] for i in part}, keep, Path(scratch) / f"{p}") for p, part in enumerate(parts)
        ]
        found: dict[int, Compiled] = {}
        for process, answer, errors in running:
            code = process.wait()
            lines = answer.read_text(encoding="utf-8").splitlines() if answer.exists() else []
            for line in lines:
                item = json.loads(line)
                if "error" in item:
                    failed = variants[item["index"]]
                    raise PlanishError(
                        f"{failed.module}.{failed.kernel} ({failed.label}) does not compile for {core}: {item['error']}"
                    )
                found[item["index"]] = Compiled(**item["compiled"])
            if code:
                said = errors.read_text(encoding="utf-8").strip().splitlines()
                raise PlanishError(
                    f"the compiler of GPU kernels ended with {code}: {said[-1] if said else 'no message'}"
                )
    return [found[i] for i in range(len(variants))]


def _start(
    core: str, variants: Mapping[int, Variant], keep: Path | None, scratch: Path
) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """A worker on some variants; the files that its answers and its errors go to."""
    scratch.mkdir()
    jobs, answer, errors = (scratch / n for n in ("jobs.json", "answer.jsonl", "errors.txt"))
    jobs.write_text(
        json.dumps({"core": core, "keep": keep and str(keep), "variants": {i: asdict(v) for i, v in variants.items()}})
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", f"{__package__}.worker", str(jobs), str(answer)]
    with errors.open("wb") as sink:
        return subprocess.Popen(command, env=environment, stdout=sink, stderr=sink), answer, errors
