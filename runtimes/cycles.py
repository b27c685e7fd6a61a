"""Cycle estimates for a Cortex-M from counted work: a band, from the best to the worst that the core's manual allows.

    cycles = sum over kinds of count * cycles of the kind + words moved + taken branches * refill + flash waits

The low end takes loads and stores as pipelined (one cycle a word), the shortest refill, and no flash waits: code in a zero-wait
memory or a flash accelerator that always hits. The high end takes two cycles for a lone load or store, the longest refill, and
`wait_states` cycles for every taken branch (a new flash line) and every fourth word loaded (a line of 16 bytes, as if all loads
came from flash). Sources:

    cortex-m0plus  Arm DDI 0484 (Cortex-M0+ TRM r0p1), table 3-1: loads and stores 2, LDM/STM 1 + N, taken branches 2, BL 3, MULS 1
    cortex-m3, m4  Arm 100165 and 100166 (TRM), table "instruction set summary": loads 2 or pipelined 1, LDM 1 + N, taken branches
                   1 + P with P = 1..3, SDIV 2..12, on the M3 multiplications 1 to 7; FPU: VDIV and VSQRT 14, fused multiply-add 3, VLDM 1 + N
    cortex-m33     Arm 100230: as the M4 with one-cycle folding of some branches; the same table is used
    cortex-m7      Arm publishes no timings: the band is two instructions a cycle (dual issue) to one a cycle plus the waits
    cortex-m55     Arm publishes no table: a vector operation takes two cycles and overlaps its neighbours, so the band is one cycle an
                   instruction to two, and refills

It is an estimate of a range, not a measurement. `benchmarks/mcu.py --cycles` holds it against published board results.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tally import Tally
from .thumb import Kind


@dataclass(frozen=True)
class Band:
    """Cycles, at least and at most."""

    low: int
    high: int


@dataclass(frozen=True)
class Core:
    """Cycles of one core by its manual. A pair is (low, high)."""

    kinds: dict[Kind, tuple[float, float]]
    """per instruction; 1 where a kind is not named. Loads and stores: what an instruction costs besides its words"""
    refill: tuple[float, float]
    """added by a taken branch"""
    word: tuple[float, float] = (1, 1)
    """per word that a load or store moves"""
    issue: float = 1
    """instructions that may start together in the best case: the low end is divided by it"""


LINE = 4
"""words of a flash line: 128 bits on the STM32 devices here"""
ONE: tuple[float, float] = (1, 1)
M4 = Core(
    kinds={
        "load": (0, 1),
        "store": (0, 1),
        "div": (2, 12),
        "fma": (3, 3),
        "fdiv": (14, 14),
    },
    refill=(1, 3),
)
CORES = {
    "cortex-m0plus": Core(kinds={"load": (1, 1), "store": (1, 1)}, refill=(1, 2)),
    "cortex-m3": Core(kinds={**M4.kinds, "mul": (1, 7)}, refill=(1, 3)),
    "cortex-m4": M4,
    "cortex-m33": M4,
    "cortex-m7": Core(
        kinds={"load": (0, 1), "store": (0, 1), "div": (2, 12), "fdiv": (14, 14)}, refill=(0, 2), issue=2
    ),
    "cortex-m55": Core(kinds={}, refill=(0, 2)),
}


def estimate(work: Tally, core: str, wait_states: int | None = None) -> Band | None:
    """Cycles of `work` on a core, None for one without a model. `wait_states` of the flash count at the high end only.

    Work that was counted without kinds (QEMU) takes one to two cycles an instruction.
    """
    model = CORES.get(core)
    if model is None:
        return None
    words = (work.loads or 0) + (work.stores or 0)
    branches = work.branches or 0
    ends: list[float] = []
    for end in (0, 1):
        if work.kinds is None:
            total = work.instructions * (1 + end)
        else:
            total = sum(n * model.kinds.get(kind, ONE)[end] for kind, n in work.kinds.items()) + words * model.word[end]
        ends.append(total + branches * model.refill[end])
    waits = (wait_states or 0) * (branches + (work.loads or 0) / LINE)
    return Band(round(ends[0] / model.issue), round(ends[1] + waits))
