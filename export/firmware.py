"""Cross compiling a generated project for a microcontroller with the `ziglang` wheel, and reading sizes from the ELF."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import PlanishError, missing_extra
from ..targets.target import Memory, Target

STACK = 2048
"""bytes of RAM that the linker script keeps for the stack"""
OPTIMIZE = ("-std=c99", "-O3", "-ffp-contract=off")
"""for every compiler; the results do not depend on -O3, they do on -ffp-contract=off"""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the linked firmware."""

    code: int
    """instructions, vectors and start-up"""
    constants: int
    """read-only data: weights, layer structs"""
    data: int
    """initialized variables, which take flash and RAM"""
    bss: int
    """variables that start as zero: the arena"""

    @property
    def flash(self) -> int:
        """Bytes of flash."""
        return self.code + self.constants + self.data

    @property
    def ram(self) -> int:
        """Bytes of RAM without the stack."""
        return self.data + self.bss


def available() -> bool:
    """Whether the zig compiler is installed."""
    return importlib.util.find_spec("ziglang") is not None


def compiler() -> list[str]:
    """The zig C compiler as a command. Raises Missing without the package."""
    if not available():
        raise missing_extra("ziglang", "mcu", "cross compiling for a microcontroller")
    return [sys.executable, "-m", "ziglang", "cc"]


def version() -> str:
    """The compiler's name and version."""
    run = subprocess.run([*compiler()[:3], "version"], capture_output=True, text=True, check=True)
    return f"zig {run.stdout.strip()}"


def regions(target: Target) -> tuple[Memory, Memory]:
    """Flash and RAM of a microcontroller."""
    if target.flash is None or target.ram is None:
        raise PlanishError(f"target '{target.name}' has no flash and RAM; firmware is for microcontrollers")
    return target.flash, target.ram


def flags(target: Target) -> list[str]:
    """Options of the zig compiler for the target."""
    if target.zig_target is None:
        raise PlanishError(f"target '{target.name}' names no zig target")
    return ["-target", target.zig_target, *target.flags]


def gcc_flags(target: Target) -> list[str]:
    """Options of arm-none-eabi-gcc for the same core."""
    core = target.core
    units = {"cortex-m4": "fpv4-sp-d16", "cortex-m7": "fpv5-d16", "cortex-m33": "fpv5-sp-d16"}
    found = [f"-mcpu={core}", "-mthumb"]
    if "fpu" not in target.features:
        return [*found, "-mfloat-abi=soft"]
    unit = "fpv5-sp-d16" if any(f.endswith("-fp64") for f in target.flags) else units.get(core)
    return [*found, *([f"-mfpu={unit}"] if unit else []), "-mfloat-abi=hard"]


def link(folder: Path, sources: Sequence[str], script: str, target: Target, output: str) -> Sizes:
    """Compile `sources` (relative to `folder`) to the ELF file `output` there; sizes from its sections.

    Paths are relative and there is no debug information, so that the same sources give the same bytes in any folder.
    Raises PlanishError when the program does not fit: which memory, and how many bytes over.
    """
    command = [
        *compiler(),
        *flags(target),
        *OPTIMIZE,
        "-g0",
        "-fno-sanitize=all",
        "-fno-lto",
        "-ffunction-sections",
        "-fdata-sections",
        "-fdebug-prefix-map=" + str(folder) + "=.",
        "-DPLANISH_LAYER_DONE=planish_layer_done",
        "-I.",
        "-Ikernels",
        *sources,
        "-T",
        script,
        "-Wl,--gc-sections",
        "-Wl,-z,max-page-size=32",
        "-Wl,-e,Reset_Handler",
        "-o",
        output,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        # the compiler's own library brings debug sections, which name places of the machine that built it
        text = (folder / script).read_text(encoding="utf-8")
        plain = Path(scratch) / "plain.ld"
        plain.write_text(text.replace("*(.ARM.exidx*", "*(.debug*) *(.ARM.exidx*"), encoding="utf-8")
        command[command.index(script)] = str(plain)
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        over = re.findall(r"will not fit in region '(\w+)': overflowed by (\d+) bytes", run.stderr)
        if over:
            worst = {name: max(int(n) for m, n in over if m == name) for name, _ in over}
            text = ", ".join(f"{n} by {b} bytes" for n, b in sorted(worst.items()))
            raise PlanishError(f"the firmware is too large for target '{target.name}': it overflows {text}")
        raise PlanishError(f"the firmware does not compile for '{target.name}': {_first_error(run.stderr)}")
    return sizes(folder / output)


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["no message"]
    return lines[0][:300]


def sizes(elf: Path) -> Sizes:
    """Sizes of the allocated sections, the reserved stack left out."""
    code = constants = data = bss = 0
    for section in elf_file(elf).iter_sections():
        if not section["sh_flags"] & 2 or section.name == ".stack":  # SHF_ALLOC
            continue
        if section["sh_type"] == "SHT_NOBITS":
            bss += section["sh_size"]
        elif section["sh_flags"] & 1:  # SHF_WRITE
            data += section["sh_size"]
        elif section["sh_flags"] & 4:  # SHF_EXECINSTR
            code += section["sh_size"]
        else:
            constants += section["sh_size"]
    return Sizes(code, constants, data, bss)


def elf_file(path: Path) -> Any:
    """The ELF file, read by pyelftools."""
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise missing_extra("pyelftools", "mcu", "reading firmware") from None
    import io

    return ELFFile(io.BytesIO(path.read_bytes()))
