"""What kind of work each Thumb instruction is: the input of the cycle models. Decoded by the capstone package."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..common.errors import missing_extra

Kind = Literal["alu", "mul", "div", "load", "store", "branch", "fp", "fma", "fdiv"]
"""fp: one-cycle float operations and moves; fdiv: division and square root"""

MULTIPLY = ("mul", "mla", "mls", "smul", "smla", "smml", "smus", "smls", "umull", "umlal", "umaal", "smmul", "smua")
LOADS = ("ldr", "ldm", "pop", "vldr", "vldm", "vpop")
STORES = ("str", "stm", "push", "vstr", "vstm", "vpush")
BRANCHES = ("b", "bl", "bx", "blx", "cbz", "cbnz", "tbb", "tbh", "le", "letp", "wls", "wlstp", "dls", "dlstp")
CONDITIONS = ("eq", "ne", "hs", "lo", "mi", "pl", "vs", "vc", "hi", "ls", "ge", "lt", "gt", "le")


@dataclass(frozen=True)
class Block:
    """Instructions of a straight piece of code: how many of each kind, and the words that they move."""

    counts: Counter[Kind]
    load_words: int
    """32-bit words, or single accesses of fewer bits"""
    store_words: int

    @property
    def instructions(self) -> int:
        """All of them."""
        return self.counts.total()


@cache
def _disassembler() -> Any:
    try:
        import capstone
    except ImportError:
        raise missing_extra("capstone", "mcu", "estimating cycles") from None
    machine = capstone.Cs(capstone.CS_ARCH_ARM, capstone.CS_MODE_THUMB | capstone.CS_MODE_MCLASS)
    machine.skipdata = True
    return machine


def read(code: bytes, address: int = 0) -> Block:
    """The kinds of the instructions in `code`."""
    counts: Counter[Kind] = Counter()
    loads = stores = 0
    for _, _, mnemonic, operands in _disassembler().disasm_lite(code, address):
        kind = classify(mnemonic)
        counts[kind] += 1
        if kind in ("load", "store"):
            words = _words(mnemonic, operands)
            loads += words if kind == "load" else 0
            stores += words if kind == "store" else 0
    return Block(counts, loads, stores)


def classify(mnemonic: str) -> Kind:
    """Kind of an instruction by its mnemonic (conditions and widths may follow)."""
    name = mnemonic.split(".", maxsplit=1)[0]
    if name.startswith(LOADS):
        return "load"
    if name.startswith(STORES):
        return "store"
    if name in BRANCHES or (name[:1] == "b" and name[1:] in CONDITIONS):
        return "branch"
    if name.startswith(("vdiv", "vsqrt")):
        return "fdiv"
    if name.startswith(("vfm", "vfnm", "vmla", "vmls", "vnml")):
        return "fma"
    if name.startswith("v"):
        return "fp"
    if name.startswith(("sdiv", "udiv")):
        return "div"
    return "mul" if name.startswith(MULTIPLY) else "alu"


def _words(mnemonic: str, operands: str) -> int:
    """Words that a load or store moves: the length of its register list, 2 for LDRD and STRD and doubles, else 1."""
    if "{" in operands:
        inside = operands[operands.index("{") + 1 : operands.index("}")]
        total = 0
        for part in inside.split(","):
            first, _, last = (p.strip() for p in part.partition("-"))
            total += 1 if not last else int(last[1:]) - int(first[1:]) + 1
            total += first[:1] == "d" and (1 if not last else int(last[1:]) - int(first[1:]) + 1)
        return total
    return 2 if mnemonic.startswith(("ldrd", "strd")) or operands.startswith("d") else 1
