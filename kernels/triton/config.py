"""How a kernel is specialized for a shape: `Config`, the shipped tables of tuned ones, and the launch.

`kernels/triton/tables/<core>.json` is written by benchmarks/tune_gpu.py. Keys: op (with what distinguishes its variants, e.g.
`linear_wna16.4`), then the bucket of the shape. A shape without an entry takes the op's own `default`. Nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..gpu.core import CORES, Core, of_device
from .record import OPEN

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Config:
    """One specialization of an op's kernels."""

    form: str
    """which of the op's kernels: gemv, split_k, gemm, ... as its file says"""
    constants: Mapping[str, int] = field(default_factory=dict)
    """compile-time arguments by name: block sizes, parts of a split sum"""
    warps: int = 4
    stages: int = 3
    """depth of the software pipeline"""


def bucket(m: int, n: int, k: int) -> str:
    """The table's key of a product (m, k) x (k, n): m up to the next power of two, n and k to the nearest half octave."""
    return f"m{1 << max(0, m - 1).bit_length()}_n{_half_octave(n)}_k{_half_octave(k)}"


def _half_octave(size: int) -> int:
    return round(2 ** (round(2 * math.log2(size)) / 2))


@dataclass
class Forced:
    """A choice, and how often it was asked for."""

    op: str
    config: Config
    uses: int = 0


FORCED: ContextVar[Forced | None] = ContextVar("FORCED", default=None)
"""a choice for one op that goes before the tables"""


@contextlib.contextmanager
def forced(op: str, config: Config) -> Iterator[Forced]:
    """Take this configuration for every shape of an op (by its key in the tables) meanwhile: for tuning and tests."""
    choice = Forced(op, config)
    token = FORCED.set(choice)
    try:
        yield choice
    finally:
        FORCED.reset(token)


def tuned(op: str, core: Core, m: int, n: int, k: int) -> Config | None:
    """The shipped choice for a shape, None where the table of the nearest core at or below has none."""
    asked = FORCED.get()
    if asked is not None and asked.op == op:
        asked.uses += 1
        return asked.config
    found = _table(_nearest(core)).get(op, {}).get(bucket(m, n, k))
    return None if found is None else Config(found["form"], found["constants"], found["warps"], found["stages"])


def _nearest(core: Core) -> str:
    older = [c for c in CORES.values() if c.capability <= core.capability]
    return max(older, key=lambda c: c.capability).name


@functools.cache
def _table(core: str) -> dict[str, dict[str, Any]]:
    path = TABLES / f"{core}.json"
    return json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else {}


def core_of(x: torch.Tensor) -> Core:
    """The core that x lives on; for CPU tensors, which Triton's interpreter takes, Hopper, or what a recorder (record.py) records for."""
    recorder = OPEN.get()
    if recorder is not None:
        return recorder.core
    return of_device(x.device) if x.is_cuda else CORES["sm_90"]


def on_gpu(x: torch.Tensor) -> bool:
    """Whether kernels for x are compiled, and may hold inline assembly; the interpreter knows none."""
    recorder = OPEN.get()
    return x.is_cuda if recorder is None else not recorder.interpreted


def launch(
    kernel: Any, grid: tuple[int, ...] | Callable[..., tuple[int, ...]], config: Config, *args: Any, **constants: Any
) -> None:
    """Run a kernel: positional arguments, then compile-time ones by name; `config.constants` are not passed by themselves.

    Where a recorder (record.py) is open it is noted instead.
    """
    recorder = OPEN.get()
    if recorder is not None:
        recorder.launch(kernel, grid, config.warps, config.stages, args, constants)
        return
    kernel[grid](*args, **constants, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
