"""Kinds of instructions and the cycle bands built on them."""

from __future__ import annotations

from collections import Counter

import pytest
from planish.runtimes import cycles, thumb

capstone = pytest.importorskip("capstone", reason="capstone is not installed (extra 'mcu')")

CODES = {
    "22fb": ("alu", 0, 0),  # movs r2, #0xfb
    "e8b100f0": ("load", 4, 0),  # ldm.w r1!, {r4-r7}
    "e9d12300": ("load", 2, 0),  # ldrd r2, r3, [r1]
    "ec900a04": ("load", 4, 0),  # vldmia r0, {s0-s3}
    "b40f": ("store", 0, 4),  # push {r0-r3}
    "bdf4": ("load", 6, 0),  # pop {r2, r4-r7, pc}
    "7008": ("store", 0, 1),  # strb r0, [r1]
    "fb213402": ("mul", 0, 0),  # smlad r4, r1, r2, r3
    "fb91f0f2": ("div", 0, 0),  # sdiv r0, r1, r2
    "eeb50ac0": ("fp", 0, 0),  # vcmpe.f32 s0, #0
    "eea00a20": ("fma", 0, 0),  # vfma.f32 s0, s0, s1
    "ee800a20": ("fdiv", 0, 0),  # vdiv.f32 s0, s0, s1
    "4770": ("branch", 0, 0),  # bx lr
    "d1fe": ("branch", 0, 0),  # bne
}


def code(halfwords: str) -> bytes:
    return b"".join(int(halfwords[i : i + 4], 16).to_bytes(2, "little") for i in range(0, len(halfwords), 4))


@pytest.mark.parametrize("halfwords", CODES)
def test_kinds(halfwords: str) -> None:
    kind, loads, stores = CODES[halfwords]
    block = thumb.read(code(halfwords))
    assert block.counts == Counter({kind: 1})
    assert (block.load_words, block.store_words) == (loads, stores)


def test_a_block_is_the_sum_of_its_instructions() -> None:
    block = thumb.read(code("".join(CODES)))
    assert block.instructions == len(CODES)
    assert block.load_words == sum(loads for _, loads, _ in CODES.values())


def test_m4_table() -> None:
    """One load of a word takes 1 (pipelined) to 2 cycles, LDM of four 4 to 5, a taken branch 2 to 4 (Arm 100166)."""
    m4 = cycles.core("cortex-m4")
    assert m4 is not None
    ldr = cycles.Work(Counter(load=1), load_words=1)
    ldm = cycles.Work(Counter(load=1), load_words=4)
    branch = cycles.Work(Counter(branch=1), taken=1)
    assert cycles.estimate(ldr, m4) == cycles.Band(1, 2)
    assert cycles.estimate(ldm, m4) == cycles.Band(4, 5)
    assert cycles.estimate(branch, m4) == cycles.Band(2, 4)
    assert cycles.estimate(branch, m4, wait_states=5) == cycles.Band(2, 9)


def test_band_grows_with_work() -> None:
    work = cycles.Work(Counter(alu=10, load=3, branch=2), load_words=5, flash_words=2, taken=1)
    for model in cycles.CORES.values():
        one, two = cycles.estimate(work, model, 2), cycles.estimate(work + work, model, 2)
        assert one.low <= one.high
        assert two.low >= 2 * one.low - 1
        assert two.high == 2 * one.high
