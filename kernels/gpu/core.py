"""`Core`: what a kernel and its selection must know of an NVIDIA GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ...common.errors import PlanishError

OLDEST = 80
"""compute capability times ten below which no kernel runs: bfloat16 and asynchronous copies begin there"""


@dataclass(frozen=True)
class Core:
    """One architecture, by its compute capability."""

    name: str
    """sm_80, sm_90, ..."""
    multiprocessors: int
    shared_bytes: int
    """shared memory that one block may ask for"""

    @property
    def capability(self) -> int:
        """Compute capability times ten: 90."""
        return int(self.name.removeprefix("sm_"))

    @property
    def fp8(self) -> bool:
        """Whether its tensor cores multiply 8-bit floats."""
        return self.capability >= 89

    @property
    def warp_groups(self) -> bool:
        """Whether it multiplies by groups of four warps (wgmma), with the left operand in registers."""
        return self.capability == 90


CORES = {
    c.name: c
    for c in (
        Core("sm_80", 108, 166_912),  # A100; CUDA C++ Programming Guide, table of technical specifications
        Core("sm_89", 128, 101_376),  # GeForce RTX 4090
        Core("sm_90", 132, 232_448),  # H100 SXM, H200
    )
}
"""the architectures that kernels are compiled for ahead of time"""


def core(name: str) -> Core:
    """The core called `name` (a target's `core`). Raises PlanishError for one that no kernel is compiled for."""
    if name not in CORES:
        raise PlanishError(f"no GPU kernels for '{name}'; there are for: {', '.join(CORES)}")
    return CORES[name]


def of_device(device: torch.device) -> Core:
    """The core of a CUDA device. Raises PlanishError for one that is too old."""
    return _of_index(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _of_index(index: int) -> Core:
    facts = torch.cuda.get_device_properties(index)
    number = facts.major * 10 + facts.minor
    if number < OLDEST:
        raise PlanishError(
            f"'{facts.name}' has compute capability {facts.major}.{facts.minor}; the kernels need {OLDEST // 10}.{OLDEST % 10} or newer"
        )
    return Core(f"sm_{number}", facts.multi_processor_count, facts.shared_memory_per_block_optin)
