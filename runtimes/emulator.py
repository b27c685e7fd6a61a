"""Runtime `emulator`: the firmware of a `c` artifact in an emulated Cortex-M, memories at the device's own addresses.

Instruction counts are exact and the same in every repeat; they are not cycles. The count is taken by basic block: a block
runs from its first instruction to its last, so its instructions may be added when it is entered (an instruction whose
condition fails takes its place in the pipeline and counts). The firmware calls an
empty function after every layer, which starts a block of its own, so that the counts at layer borders are exact too.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from ..common.errors import Missing, PlanishError, missing_extra
from ..export import firmware
from ..export.artifact import Artifact
from ..targets import target as targets
from . import c_model, cycles, qemu_system, thumb
from .image import PAINT, Image, used_stack
from .session import Arrays, Layer, Profile, Runtime, Session
from .tally import Counts, Tally

SYSTEM = 0xE000E000
"""system control space: start-up switches the floating-point unit on there"""
PAGE = 4096


class Emulator(Runtime):
    """Cortex-M0+, M3, M4, M7 and M33 in the `unicorn` package, other cores on a board of QEMU: what the target names."""

    formats: ClassVar[tuple[str, ...]] = ("c",)

    def open(self, artifact: Artifact, threads: int) -> EmulatorSession:
        """Load firmware.elf and start it. Raises Missing for a core that is not emulated here."""
        if threads != 1:
            raise PlanishError(f"{threads} threads were asked for; an emulated microcontroller has one core")
        return EmulatorSession(artifact)


class EmulatorSession(Session):
    """Firmware that waits for a sample."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.model = c_model.load(artifact)
        qemu = targets.load(artifact.target).emulator == "qemu-system"
        self.machine = qemu_system.Machine(artifact, self.model) if qemu else Machine(artifact, self.model)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch, one sample after another as on the device."""
        packed = self.model.pack(inputs)
        memory = [np.empty((len(packed[0]), b.size), np.int8) for b in self.model.outputs]
        for i in range(len(packed[0])):
            for m, code in zip(memory, self.machine.infer([p[i] for p in packed]), strict=True):
                m[i] = code
        return self.model.unpack(memory)

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Exact instruction counts for the first sample; `runs` and `warmup` change nothing about them."""
        packed = self.model.pack(inputs)
        counts = self.machine.count([p[0] for p in packed])
        expected = list(range(len(self.model.layers)))
        if counts.order != expected:
            raise PlanishError(f"the firmware reported its layers in the order {counts.order}; {expected} was expected")
        stack = self.machine.stack_bytes()
        target = self.machine.target
        total, *layers = (cycles.estimate(n, target.core, target.wait_states) for n in (counts.total, *counts.layers))
        latency = _scaled(total, 1e3, target.clock_hz)
        microjoules = None if target.power is None else target.power.milliamperes * target.power.volts
        sizes = firmware.sizes(self.machine.elf_path)
        toolchain = self.model.facts.get("toolchain") or {}
        return Profile(
            target=self.artifact.target,
            format=self.artifact.format,
            kind="emulated",
            instructions=counts.total.instructions,
            loads=counts.total.loads,
            stores=counts.total.stores,
            branches=counts.total.branches,
            cycles_estimate=_pair(total),
            latency_estimate_ms=latency,
            energy_estimate_uj=None
            if latency is None or microjoules is None
            else (latency[0] * microjoules, latency[1] * microjoules),
            macs=self.model.macs,
            ram_bytes=sizes.ram + stack,
            stack_bytes=stack,
            flash_bytes=sizes.flash,
            file_bytes=self.machine.elf_path.stat().st_size,
            layers=tuple(
                Layer(x["name"], x["op"], x["macs"], None, n.instructions, n.loads, n.stores, n.branches, _pair(band))
                for x, n, band in zip(self.model.layers, counts.layers, layers, strict=True)
            ),
            environment={
                "emulator": self.machine.emulator,
                "core": target.core,
                "wait_states": target.wait_states,
                "current": None if target.power is None else target.power.source,
                **toolchain,
            },
        )

    def close(self) -> None:
        """End the emulator."""
        self.machine.close()


def _pair(band: cycles.Band | None) -> tuple[int, int] | None:
    return None if band is None else (band.low, band.high)


def _scaled(band: cycles.Band | None, factor: float, clock: int | None) -> tuple[float, float] | None:
    """The band's ends in seconds times `factor`."""
    return None if band is None or clock is None else (band.low * factor / clock, band.high * factor / clock)


class Machine:
    """An emulated microcontroller that runs one firmware."""

    def __init__(self, artifact: Artifact, model: c_model.CModel) -> None:
        self.model = model
        self.target = targets.load(artifact.target)
        self.flash, self.ram = model.regions or firmware.regions(self.target)
        if self.target.emulator != "unicorn":
            raise Missing(
                f"target '{self.target.name}' ({self.target.core}) needs {self.target.emulator}: the unicorn package has no "
                f"such core ({', '.join(sorted(cores()))} it has)"
            )
        self.image = Image(artifact.folder / "firmware.elf")
        self.elf_path, self.symbols = self.image.path, self.image.symbols
        unicorn = _unicorn()
        from unicorn import arm_const

        self.registers = arm_const
        known = cores()
        if self.target.emulator_cpu not in known:
            raise Missing(f"unicorn has no core '{self.target.emulator_cpu}'; it has {', '.join(sorted(known))}")
        self.uc: Any = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        self.uc.ctl_set_cpu_model(known[self.target.emulator_cpu])
        self._load()
        fault = self.symbols["planish_fault"]  # an endless loop on the device
        self.uc.hook_add(unicorn.UC_HOOK_CODE, lambda uc, *_: uc.emu_stop(), begin=fault, end=fault)
        self._start()

    @property
    def emulator(self) -> str:
        """Name and version."""
        return f"unicorn {_unicorn().__version__}"

    def infer(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """int8 codes of the outputs for int8 codes (size,) of the inputs."""
        arena = self.symbols["arena"]
        for border, x in zip(self.model.inputs, inputs, strict=True):
            self.uc.mem_write(arena + border.offset, x.tobytes())
        self._until("planish_done")
        found = [np.frombuffer(bytes(self.uc.mem_read(arena + b.offset, b.size)), np.int8) for b in self.model.outputs]
        self._until("planish_ready")
        return found

    def count(self, inputs: list[np.ndarray]) -> Counts:
        """Instructions of one inference, from the entry of the model's run function to its return."""
        import unicorn

        counts = Counts()
        entry, mark, done = (self.symbols[s] for s in (f"{self.model.name}_run", "planish_layer_done", "planish_done"))
        blocks: dict[tuple[int, int], int] = {}  # how often each (address, size) was executed
        read: dict[tuple[int, int], thumb.Block] = {}
        running = False
        branches = 0
        expected = 0  # where the next block begins if no branch is taken; 0 after the mark, whose return is not model
        last = Tally(0, 0, 0, 0, Counter())

        def tally() -> Tally:
            found: Counter[thumb.Kind] = Counter()
            loads = stores = 0
            for key, times in blocks.items():
                if key not in read:
                    read[key] = thumb.read(bytes(self.uc.mem_read(*key)), key[0])
                loads += times * read[key].load_words
                stores += times * read[key].store_words
                for kind, n in read[key].counts.items():
                    found[kind] += times * n
            return Tally(found.total(), loads, stores, branches, found)

        def block(uc: Any, address: int, size: int, _: Any) -> None:
            nonlocal running, branches, expected, last
            if address == entry:
                running, expected = True, address
            elif address == done:
                running = False
            if not running:
                return
            branches += bool(expected) and address != expected
            if address == mark:
                now = tally()
                counts.order.append(uc.reg_read(self.registers.UC_ARM_REG_R0))
                counts.layers.append(now - last)
                last, expected = now, 0
                return  # the function itself is measuring, not model
            expected = address + size
            key = (address, size)
            blocks[key] = blocks.get(key, 0) + 1

        with self._hook(unicorn.UC_HOOK_BLOCK, block):
            self.infer(inputs)
        counts.total = tally()
        return counts

    def count_steps(self, inputs: list[np.ndarray]) -> int:
        """The total of `count`, by looking at every single instruction: slow, for checking."""
        import unicorn

        state = {"running": False, "total": 0}
        conditional = (
            0,
            0,
        )  # addresses under an IT instruction, which the hook does not see when their condition fails
        entry, mark, done = (self.symbols[s] for s in (f"{self.model.name}_run", "planish_layer_done", "planish_done"))
        after = mark + self.image.lengths["planish_layer_done"]

        def step(uc: Any, address: int, _size: int, _: Any) -> None:
            nonlocal conditional
            if address in (entry, done):
                state["running"] = address == entry
            if not state["running"] or mark <= address < after or conditional[0] <= address < conditional[1]:
                return
            state["total"] += 1
            code = bytes(uc.mem_read(address, 18))  # an IT instruction and four of 32 bits
            mask = code[0] & 0xF
            if code[1] == 0xBF and mask:
                count = 4 - ((mask & -mask).bit_length() - 1)
                length = 0
                for _ in range(count):
                    length += 4 if _wide(code[2 + length + 1]) else 2
                conditional = (address + 2, address + 2 + length)
                state["total"] += count

        with self._hook(unicorn.UC_HOOK_CODE, step):
            self.infer(inputs)
        return state["total"]

    def stack_bytes(self) -> int:
        """Most bytes of stack used since the start."""
        bottom, top = self.image.stack
        return used_stack(bytes(self.uc.mem_read(bottom, top - bottom)))

    def close(self) -> None:
        """Nothing: the emulator lives in this process."""

    @contextlib.contextmanager
    def _hook(self, kind: int, callback: Callable[..., None]) -> Iterator[None]:
        """A hook while the context lasts. (Not one on memory reads: unicorn 2.1.4 then runs LDM wrongly.)"""
        hook = self.uc.hook_add(kind, callback)
        try:
            yield
        finally:
            self.uc.hook_del(hook)

    def _load(self) -> None:
        """Map the memories and write the program."""
        import unicorn

        readable = unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC
        for memory, rights in ((self.flash, readable), (self.ram, unicorn.UC_PROT_ALL)):
            self.uc.mem_map(memory.origin, -(-memory.length // PAGE) * PAGE, rights)
        self.uc.mem_map(SYSTEM, PAGE)
        for address, data in self.image.segments:
            self.uc.mem_write(address, data)

    def _start(self) -> None:
        """Paint the stack and run from reset until the firmware waits for its first sample."""
        bottom, top = self.image.stack
        self.uc.mem_write(bottom, bytes([PAINT]) * (top - bottom))
        stack, reset = (
            int.from_bytes(self.uc.mem_read(self.flash.origin + at, 4), "little") for at in (0, 4)
        )  # the core reads both from the vector table
        self.uc.reg_write(self.registers.UC_ARM_REG_SP, stack)
        self.uc.reg_write(self.registers.UC_ARM_REG_PC, reset)
        self._until("planish_ready")

    def _until(self, symbol: str) -> None:
        """Run to the entry of a function. Raises PlanishError for a fault, with the address it happened at."""
        program_counter = self.registers.UC_ARM_REG_PC
        end = self.symbols[symbol]
        self.uc.ctl_flush_tb()  # the stop is translated into the code, so code translated for another stop would run on
        try:
            self.uc.emu_start(self.uc.reg_read(program_counter) | 1, end)
        except _unicorn().UcError as error:
            raise PlanishError(f"the firmware faulted {self._where()}: {error}") from None
        if self.uc.reg_read(program_counter) & ~1 != end:
            raise PlanishError(f"the firmware did not reach {symbol}; it stopped {self._where()}")

    def _where(self) -> str:
        return self.image.where(self.uc.reg_read(self.registers.UC_ARM_REG_PC) & ~1)


def _wide(high_byte: int) -> bool:
    return high_byte >> 3 in (0b11101, 0b11110, 0b11111)


def cores() -> dict[str, int]:
    """Cortex-M cores that unicorn emulates, by the name that targets use."""
    _unicorn()
    from unicorn import arm_const

    return {
        "cortex-m0": arm_const.UC_CPU_ARM_CORTEX_M0,
        "cortex-m3": arm_const.UC_CPU_ARM_CORTEX_M3,
        "cortex-m4": arm_const.UC_CPU_ARM_CORTEX_M4,
        "cortex-m7": arm_const.UC_CPU_ARM_CORTEX_M7,
        "cortex-m33": arm_const.UC_CPU_ARM_CORTEX_M33,
    }


def _unicorn() -> Any:
    try:
        import unicorn
    except ImportError:
        raise missing_extra("unicorn", "mcu", "emulating a microcontroller") from None
    return unicorn
