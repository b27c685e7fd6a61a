"""`Target`: what a device is. Each device is one TOML file in this folder; `host` is completed by looking at the CPU."""

from __future__ import annotations

import platform
import tomllib
from pathlib import Path
from typing import Literal

import pydantic

from ..common.errors import PlanishError

FOLDER = Path(__file__).parent


class Memory(pydantic.BaseModel):
    """One memory region of a microcontroller."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    origin: int
    """first address"""
    length: int
    """bytes"""


class Power(pydantic.BaseModel):
    """Supply while the core runs code from flash at the target's clock, from the device's datasheet."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    milliamperes: float
    """typical"""
    volts: float
    source: str
    """the datasheet's figure and its conditions"""


class Uart(pydantic.BaseModel):
    """The serial line of a board, as the generated firmware drives it after reset."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    driver: Literal["cmsdk", "stm32f4_usart2"]
    """the file export/c_templates/board_<driver>.c.jinja"""
    title: str
    """which UART of which board, and where its document says so"""
    base: int
    """address of its registers"""
    clock_hz: int
    """of the UART after reset"""
    core_hz: int
    """of the core after reset"""


class Target(pydantic.BaseModel):
    """A device: its core, its memories, and what planish does for it when the user names nothing else."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    """the device in words"""
    kind: Literal["gpu", "cpu", "mcu", "host"]
    core: str
    """core or architecture in lower case, e.g. cortex-m7, cortex-a72, x86-64, sm_90"""
    features: tuple[str, ...] = ()
    """ISA features that kernels ask for: dsp, mve, fpu, dotprod, i8mm, sve, avx512_vnni, ..."""
    clock_hz: int | None = None
    wait_states: int | None = None
    """cycles that a read from flash waits at `clock_hz` where neither cache nor prefetch has it; None: not known"""
    power: Power | None = None
    uart: Uart | None = None
    flash: Memory | None = None
    ram: Memory | None = None
    channel_multiple: int
    """channel counts are rounded to this multiple when pruning, because the target's kernels compute in such blocks"""
    recipe: str
    """bundled recipe that is used when none is named"""
    format: str
    """export format that is used when none is named"""
    runtime: str
    """runtime that runs the artifact on this machine"""
    triple: str | None = None
    """LLVM target triple"""
    cpu: str | None = None
    """LLVM name of the core"""
    zig_target: str | None = None
    """target of the zig compiler, which cross compiles without a system toolchain"""
    flags: tuple[str, ...] = ()
    """compiler flags for the core"""
    emulator: Literal["unicorn", "qemu-system", "qemu-user"] | None = None
    emulator_cpu: str | None = None
    source: str
    """where the facts come from (data sheet or manual, with its number)"""


def names() -> list[str]:
    """All target names, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def load(name: str) -> Target:
    """The target called `name`. Raises PlanishError listing the accepted names."""
    path = FOLDER / f"{name}.toml"
    if name not in names():
        raise PlanishError(f"unknown target '{name}'; accepted: {', '.join(names())}")
    fields = tomllib.loads(path.read_text(encoding="utf-8"))
    if fields.get("kind") == "host":
        fields |= _detect()
    return Target(name=name, **fields)


def _detect() -> dict[str, object]:
    """Core, features and triple of the machine that runs this process."""
    machine = platform.machine().lower()
    arch = {"amd64": "x86-64", "x86_64": "x86-64", "arm64": "aarch64", "aarch64": "aarch64"}.get(machine, machine)
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    known = {
        "avx2": "avx2",
        "avx512f": "avx512",
        "avx512_vnni": "avx512_vnni",
        "asimddp": "dotprod",
        "i8mm": "i8mm",
        "sve": "sve",
    }
    system = {"Linux": "linux-gnu", "Darwin": "apple-darwin"}.get(platform.system(), platform.system().lower())
    return {
        "core": arch,
        "features": tuple(sorted(known[f] for f in flags if f in known)),
        "triple": f"{arch.replace('-', '_')}-{system}",
    }
