"""Timing of one inference at a time, and the facts about the machine that a figure needs."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.progress import track
from .session import Latency


def latency(run: Callable[[], object], runs: int, warmup: int) -> Latency:
    """Milliseconds of `runs` calls after `warmup` calls that are not counted."""
    for _ in range(warmup):
        run()
    times = []
    for _ in track(range(runs), "timing"):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return percentiles(times)


def percentiles(times: Sequence[float]) -> Latency:
    """The latency of single inferences that took these milliseconds."""
    p10, p50, p90, p99 = (float(v) for v in np.percentile(times, [10, 50, 90, 99]))
    return Latency(p50, p90, p99, len(times), (p90 - p10) / p50 if p50 else 0.0)


def peak_memory() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def machine(threads: int, **versions: str) -> dict[str, Any]:
    """CPU, operating system, thread count and package versions."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "python": platform.python_version(),
        **versions,
    }


def cpu_name() -> str:
    """The CPU as it names itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
