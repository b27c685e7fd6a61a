"""`Image`: the firmware's ELF file as an emulator needs it: segments, symbols, and which function an address lies in."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..common.errors import PlanishError
from ..export import firmware

PAINT = 0xA5
"""fills the free RAM before the start; what differs afterwards was stack"""


class Image:
    """firmware.elf of a `c` artifact. Raises PlanishError where it is missing or has no symbols."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise PlanishError(f"artifact '{path.parent}' has no firmware.elf; export it again with ziglang installed")
        self.path = path
        elf = firmware.elf_file(path)
        table = elf.get_section_by_name(".symtab")
        if table is None:
            raise PlanishError(f"'{path}' has no symbols")
        self.segments: list[tuple[int, bytes]] = [
            (s["p_paddr"], s.data()) for s in elf.iter_segments() if s["p_type"] == "PT_LOAD" and s["p_filesz"]
        ]
        """(address, bytes) of what is loaded"""
        self.lengths: dict[str, int] = {s.name: s["st_size"] for s in table.iter_symbols()}
        self.symbols: dict[str, int] = {
            s.name: s["st_value"] & ~1 if s["st_info"]["type"] == "STT_FUNC" else s["st_value"]
            for s in table.iter_symbols()
        }
        """addresses, without the Thumb bit"""

    @property
    def stack(self) -> tuple[int, int]:
        """First address of the RAM that the stack may use, and the one after its last."""
        return self.symbols["planish_stack_bottom"], self.symbols["planish_stack_top"]

    def where(self, address: int) -> str:
        """'at pc 0x00001234 in planish_conv2d'."""
        inside = [n for n, a in self.symbols.items() if n and a <= address < a + max(self.lengths[n], 1)]
        return f"at pc 0x{address:08x}" + (f" in {inside[-1]}" if inside else "")


def used_stack(memory: bytes) -> int:
    """Most bytes of stack that were used, for the painted RAM as it is now. Raises PlanishError when that is all."""
    touched = np.flatnonzero(np.frombuffer(memory, np.uint8) != PAINT)
    used = len(memory) - int(touched[0]) if touched.size else 0
    if used >= len(memory):
        raise PlanishError(f"the stack ran out: it used all {len(memory)} bytes that the arena leaves")
    return used
