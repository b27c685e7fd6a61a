"""Kinds of instructions and the cycle bands built on them."""

from __future__ import annotations

from collections import Counter

import pytest
from planish.runtimes import cycles, thumb
from planish.runtimes.tally import Tally

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
    assert thumb.read(bytes.fromhex("0020dff804000020")).instructions == 3  # movs, ldr.w, movs
    assert block.load_words == sum(loads for _, loads, _ in CODES.values())


def band(core: str, waits: int = 0, **work: object) -> cycles.Band:
    found = cycles.estimate(Tally(**work), core, waits)  # pyright: ignore[reportArgumentType]
    assert found is not None
    return found


def test_m4_table() -> None:
    """One load of a word takes 1 (pipelined) to 2 cycles, LDM of four 4 to 5, a taken branch 2 to 4 (Arm 100166)."""
    assert band("cortex-m4", instructions=1, kinds=Counter(load=1), loads=1, stores=0, branches=0) == cycles.Band(1, 2)
    assert band("cortex-m4", instructions=1, kinds=Counter(load=1), loads=4, stores=0, branches=0) == cycles.Band(4, 5)
    assert band("cortex-m4", instructions=1, kinds=Counter(store=1), loads=0, stores=1, branches=0) == cycles.Band(1, 2)
    jump = {"instructions": 1, "kinds": Counter(branch=1), "loads": 0, "stores": 0, "branches": 1}
    assert band("cortex-m4", **jump) == cycles.Band(2, 4)
    assert band("cortex-m4", 5, **jump) == cycles.Band(2, 9)


def test_band_grows_with_work() -> None:
    one = {"kinds": Counter(alu=10, load=3, branch=2), "loads": 8, "stores": 0, "branches": 1}
    two = {"kinds": Counter(alu=20, load=6, branch=4), "loads": 16, "stores": 0, "branches": 2}
    for core in cycles.CORES:
        a, b = band(core, 2, instructions=15, **one), band(core, 2, instructions=30, **two)
        assert a.low <= a.high
        assert b.low >= 2 * a.low - 1
        assert b.high == 2 * a.high


def test_no_band_without_a_model() -> None:
    assert cycles.estimate(Tally(10), "cortex-a72") is None
