"""Tiles of the products whose left operand is the weight: their order, and which sizes suit a shape where none is tuned.

A program computes a tile of y transposed, (BN rows of the weight, BM tokens), in steps of BK columns; SPLIT programs may share a tile's columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ..gpu.core import Core
from .config import Config

MACS = {80: 2048, 89: 1024, 90: 4096}
"""multiplications of bytes in a clock of a multiprocessor, by capability"""
L2, L2_ONE, DRAM = 4200, 64, 1900
"""bytes in a clock: from L2 to all multiprocessors, to one, from memory; of the order of an H100's, to be replaced by tuned tables"""
WAIT, LATENCY, START = 300, 1000, 2500
"""clocks: of a step's barriers and copies when nothing else runs meanwhile, until bytes arrive, of a launch"""
REGISTERS, OTHERS = 1 << 16, 60
"""registers of a multiprocessor; those of a thread besides its sums"""
MOST_SUMS = 128
"""of a thread"""
WIDE = [(128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 32, 4), (64, 32, 4), (128, 16, 4), (64, 16, 4)]  # fmt: skip
"""(BN, BM, warps) where groups of warps multiply out of shared memory"""
NARROW = [(128, 128, 8), (128, 64, 8), (64, 128, 8), (64, 64, 4), (64, 32, 4), (128, 16, 4), (64, 16, 4)]
"""the same where a warp holds its operands in registers beside the sums"""


@triton.jit
def tile(index, tokens, outs, BN: tl.constexpr, BM: tl.constexpr, BAND: tl.constexpr):
    """(row of tiles of the weight, of tokens) of the program `index`: BAND rows of the weight at a time, so that programs that run together share operands in L2."""
    tiles_n, tiles_m = tl.cdiv(outs, BN), tl.cdiv(tokens, BM)
    band = index // (BAND * tiles_m)
    high = tl.minimum(tiles_n - band * BAND, BAND)
    inside = index % (BAND * tiles_m)
    return band * BAND + inside % high, inside // high


@dataclass(frozen=True)
class Operands:
    """What a step costs."""

    weight: float
    """bytes of a weight"""
    x: float
    """bytes of an activation"""
    macs: float
    """multiplications in a clock of a multiprocessor"""
    scaled: float = 0
    """where the sums of a step are scaled and added to others: so many in a clock"""
    held: int = 1 << 16
    """weights of a step that a thread may hold in registers"""


def macs(core: Core) -> int:
    """Multiplications of bytes in a clock of a multiprocessor."""
    return MACS[max(known for known in MACS if known <= core.capability)]


def clocks(core: Core, config: Config, m: int, n: int, k: int, kind: Operands) -> float:
    """What a configuration may take for m tokens, n rows and k columns, to order them: products, or bytes, whichever is longer, and waits."""
    c = config.constants
    stage = c["BN"] * c["BK"] * kind.weight + c["BM"] * c["BK"] * kind.x  # bytes of a step
    programs = triton.cdiv(n, c["BN"]) * triton.cdiv(m, c["BM"]) * c["SPLIT"]
    registers = c["BN"] * c["BM"] * (2 if kind.scaled else 1) + OTHERS * 32 * config.warps
    fits = min(core.shared_bytes // (stage * config.stages), REGISTERS // registers)
    together = max(1, min(fits, triton.cdiv(programs, core.multiprocessors)))
    rate = min(L2_ONE, L2 / min(programs, core.multiprocessors), stage * (config.stages - 1) * together / LATENCY)
    products = c["BN"] * c["BM"] * c["BK"] / kind.macs + (c["BN"] * c["BM"] / kind.scaled if kind.scaled else 0)
    busy = max(products, stage / rate) + 0.1 * min(products, stage / rate)  # of the multiprocessor, for a step
    step = max(busy, (busy + WAIT) / together)
    rounds, steps = triton.cdiv(programs, core.multiprocessors), triton.cdiv(k // c["BK"], c["SPLIT"])
    added = 0 if c["SPLIT"] == 1 else START + 2 * c["SPLIT"] * m * n * 4 / L2
    inside, outside = rounds * steps * step, n * k * kind.weight / DRAM
    return max(inside, outside) + 0.1 * min(inside, outside) + START + added


def fitting(core: Core, k: int, divisor: int, kind: Operands) -> list[Config]:
    """Every sensible specialization for k columns; steps divide `divisor`."""
    depths = [d for d in (64, 128, 256, 512) if divisor % d == 0] or [32]
    made = []
    for rows, tokens, warps in WIDE if core.warp_groups else NARROW:
        if rows * tokens * (2 if kind.scaled else 1) > MOST_SUMS * 32 * warps:
            continue
        few = tokens <= 32  # little work in a step, so that steps are long
        for depth in [d for d in depths if (d * kind.x > 128) == few] or depths[-1:]:
            if rows * depth > kind.held * 32 * warps:
                continue
            most = core.shared_bytes // (rows * depth * kind.weight + tokens * depth * kind.x)
            made += [
                Config("tiles", {"BN": rows, "BM": tokens, "BK": depth, "BAND": 8, "SPLIT": split}, warps, stages)
                for split in (1, 2, 4, 8)
                if split == 1 or k // depth >= 4 * split
                for stages in ((3, 4, 5) if few else (3, 4))
                if stages <= most
            ]
    return made


def ordered(core: Core, m: int, n: int, k: int, divisor: int, kind: Operands) -> list[Config]:
    """The fitting specializations, the one first that `clocks` finds shortest."""
    return sorted(fitting(core, k, divisor, kind), key=lambda c: clocks(core, c, m, n, k, kind))
