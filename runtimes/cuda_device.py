"""Every call that only a machine with an NVIDIA GPU can run: what is there, memory, graphs, timing, kernels. Nothing else touches torch.cuda.

What is decided from these facts is decided elsewhere, in functions that a machine without a GPU tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import PlanishError

HANDING_OVER = 200_000
"""clocks, about 0.1 ms: longer than the host takes to launch a graph"""
WARMUP = 3
"""runs before a capture: kernels are compiled and libraries make their workspaces there"""


@dataclass(frozen=True)
class Facts:
    """What this machine has."""

    cuda: str | None
    """version of CUDA that torch was built with, None for a torch without"""
    available: bool
    name: str = ""
    capability: int = 0
    """compute capability times ten"""
    triton: bool = False


def facts() -> Facts:
    """What this machine has; asks no GPU where there is none."""
    triton = importlib.util.find_spec("triton") is not None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return Facts(torch.version.cuda, False, triton=triton)
    found = torch.cuda.get_device_properties(0)
    return Facts(torch.version.cuda, True, found.name, found.major * 10 + found.minor, triton)


def memory() -> tuple[int, int]:
    """(free, total) bytes."""
    return torch.cuda.mem_get_info()


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line: what asked for memory, and what is free."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        free, total = memory()
        reason = str(error).partition(". GPU")[0].removeprefix("CUDA out of memory. ")
        raise PlanishError(
            f"the GPU has too little memory for {what}: {reason}; {free:,} of {total:,} bytes are free now"
        ) from None


def synchronize() -> None:
    """Wait for everything that was launched."""
    torch.cuda.synchronize()


class Captured:
    """A run as a CUDA graph: the kernels of one call, launched again as they were, on the tensors that they read then."""

    def __init__(self, run: Callable[[], Any]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.result = run()

    def replay(self) -> Any:
        """Run again; the result's tensors are the same ones, with new values."""
        self._graph.replay()
        return self.result


def times(run: Callable[[], Any], runs: int, warmup: int, flush: bool = False) -> list[float]:
    """Milliseconds of `runs` calls between two events each. `flush`: the second-level cache holds none of its data before.

    The device is kept busy while a call is handed to it, so that the time of handing over is not counted.
    """
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    scratch = torch.empty(size, dtype=torch.int8, device="cuda") if flush else None
    found: list[float] = []
    for index in range(warmup + runs):
        if scratch is not None:
            scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HANDING_OVER)
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= warmup:
            found.append(start.elapsed_time(end))
    return found


def copy_rate(size: int = 1 << 30, runs: int = 20) -> float:
    """Bytes read and written a second by a copy of `size` bytes on the device: the best of `runs`."""
    free, _ = memory()
    size = min(size, free // 4)
    source, target = (torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * size / (min(times(lambda: target.copy_(source), runs, 3)) * 1e-3)


def product_rate(dtype: torch.dtype, side: int = 8192, runs: int = 20) -> float | None:
    """Operations a second of a square matrix product in 16 bits or int8: the best of `runs`; None where torch has none."""
    if dtype == torch.int8:
        integer = torch.ops.aten._int_mm.default
        a = torch.randint(-127, 128, (side, side), dtype=dtype, device="cuda")
        b = torch.randint(-127, 128, (side, side), dtype=dtype, device="cuda").t()
        try:
            integer(a, b)
        except RuntimeError:
            return None
        best = min(times(lambda: integer(a, b), runs, 3))
    else:
        x, y = (torch.randn((side, side), dtype=dtype, device="cuda") for _ in range(2))
        best = min(times(lambda: torch.matmul(x, y), runs, 3))
    return 2 * side**3 / (best * 1e-3)


def kernels(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds) of every kernel of one call, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        synchronize()
    rows = [
        (e.key, int(e.count), float(e.self_device_time_total))
        for e in recorded.key_averages()
        if str(e.device_type).endswith("CUDA")
    ]
    return sorted(rows, key=lambda row: (-row[2], row[0]))


def peak(run: Callable[[], Any]) -> int:
    """Most bytes of tensors alive during a call, weights included."""
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated()


def environment() -> dict[str, Any]:
    """Card, driver and versions, as a figure needs them."""
    found = torch.cuda.get_device_properties(0)
    driver = None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        driver = said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None
    import triton

    return {
        "card": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
