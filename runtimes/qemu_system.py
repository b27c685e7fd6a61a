"""Firmware on a microcontroller board that `qemu-system-arm` emulates: the cores that unicorn lacks (Cortex-M55).

QEMU is driven through its GDB stub: the firmware stops where it waits for a sample, the sample is written into the arena, and the
output is read when the firmware hands it out. Counts come from a second QEMU with a counting plugin (qemu/profile.c).
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..common.errors import Missing, PlanishError
from ..export import firmware
from ..export.artifact import Artifact
from ..targets import target as targets
from . import qemu_user
from .c_model import CModel
from .gdb import Gdb, Lost
from .image import PAINT, Image, used_stack
from .tally import Counts, Tally

PROGRAM = "qemu-system-arm"
ENDING = 5.0
"""seconds that QEMU may take to end by itself"""
TIMEOUT = 120.0
"""seconds that the firmware may take between two stops"""
STACK_POINTER, PROGRAM_COUNTER = 13, 15
"""registers by GDB's numbers"""
STACKED_PC = 24
"""bytes from the stack pointer to the return address that an exception leaves there (Armv8-M ARM, B3.18)"""


class Board:
    """One QEMU process that runs one firmware and is stopped at `planish_ready`, where it waits for a sample."""

    def __init__(self, program: str, machine: str, image: Image, plugin: str | None = None) -> None:
        self.image = image
        ours, theirs = socket.socketpair()
        command = [program, "-M", machine, "-display", "none", "-monitor", "none", "-serial", "none", "-S"]
        command += ["-chardev", f"socket,id=gdb,fd={theirs.fileno()}", "-gdb", "chardev:gdb"]
        command += ["-kernel", str(image.path), *(["-plugin", plugin] if plugin else [])]
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.close = weakref.finalize(self, _end, self.process, ours, self.log)
        try:
            self.gdb = Gdb(ours, TIMEOUT)
        except Lost as error:
            raise Missing(f"{version(program)} did not start the board '{machine}': {self._said(error)}") from None
        bottom, top = image.stack
        try:
            self.gdb.write(bottom, bytes([PAINT]) * (top - bottom))
            self.gdb.break_at(image.symbols["planish_fault"])
        except Lost as error:
            raise PlanishError(f"QEMU stopped: {self._said(error)}") from None
        self.run_to("planish_ready")

    def run_to(self, symbol: str) -> None:
        """Run to the entry of a function. Raises PlanishError for a fault, with the address it happened at."""
        end, fault = self.image.symbols[symbol], self.image.symbols["planish_fault"]
        try:
            self.gdb.break_at(end)
            try:
                self.gdb.resume()
            except Lost as error:
                if self.process.poll() is not None:
                    raise
                self.gdb.interrupt()
                place = self.image.where(self.gdb.register(PROGRAM_COUNTER))
                raise PlanishError(f"the firmware did not reach {symbol}: {error}; it stopped {place}") from None
            at = self.gdb.register(PROGRAM_COUNTER)
            if at == fault:
                stack = self.gdb.register(STACK_POINTER)
                place = int.from_bytes(self.gdb.read(stack + STACKED_PC, 4), "little")
                raise PlanishError(f"the firmware faulted {self.image.where(place)}")
            self.gdb.pass_by(end)
        except Lost as error:
            raise PlanishError(f"the firmware stopped QEMU before {symbol}: {self._said(error)}") from None

    def infer(self, inputs: Sequence[tuple[int, np.ndarray]], outputs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """int8 codes of (address, size) after a run on the codes given as (address, values)."""
        for address, x in inputs:
            self.gdb.write(address, x.tobytes())
        self.run_to("planish_done")
        found = [np.frombuffer(self.gdb.read(address, size), np.int8) for address, size in outputs]
        self.run_to("planish_ready")
        return found

    def stack_bytes(self) -> int:
        """Most bytes of stack used since the start."""
        bottom, top = self.image.stack
        return used_stack(self.gdb.read(bottom, top - bottom))

    def _said(self, error: Lost) -> str:
        """QEMU's own message where there is one."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING)
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return lines[0][:300] if lines else f"{error} (status {self.process.returncode})"


class Machine:
    """An emulated microcontroller that runs one firmware; the same calls as `emulator.Machine`."""

    def __init__(self, artifact: Artifact, model: CModel) -> None:
        self.model = model
        self.target = targets.load(artifact.target)
        firmware.regions(self.target)
        self.image = Image(artifact.folder / "firmware.elf")
        self.elf_path = self.image.path
        found = shutil.which(PROGRAM)
        if found is None:
            raise Missing(
                f"target '{self.target.name}' ({self.target.core}) runs in {PROGRAM}: apt-get install {PROGRAM}"
            )
        self.program = found
        self.board = Board(self.program, self.target.emulator_cpu or "", self.image)
        self.counted_stack = 0

    @property
    def emulator(self) -> str:
        """Name and version."""
        return version(self.program)

    def infer(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """int8 codes of the outputs for int8 codes (size,) of the inputs."""
        return self._infer(self.board, inputs)

    def count(self, inputs: list[np.ndarray]) -> Counts:
        """One inference, from the entry of the model's run function to its return. Raises Missing without the plugin."""
        plugin = qemu_user.built("profile", qemu_user.native(), ["-O2", "-shared", "-fPIC"], [], "mcu")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "counts"
            marks = {"run": f"{self.model.name}_run", "mark": "planish_layer_done", "done": "planish_done"}
            places = {
                k: (self.image.symbols[s], self.image.symbols[s] + self.image.lengths[s]) for k, s in marks.items()
            }
            options = [f"{k}={first:x}" + (f"-{end:x}" if k != "run" else "") for k, (first, end) in places.items()]
            board = Board(
                self.program,
                self.target.emulator_cpu or "",
                self.image,
                ",".join([str(plugin), f"out={out}", *options]),
            )
            try:
                self._infer(board, inputs)
                self.counted_stack = board.stack_bytes()
            finally:
                board.close()
            return _counts(out.read_text(encoding="utf-8"))

    def stack_bytes(self) -> int:
        """Most bytes of stack used since the start."""
        return max(self.board.stack_bytes(), self.counted_stack)

    def close(self) -> None:
        """End QEMU."""
        self.board.close()

    def _infer(self, board: Board, inputs: list[np.ndarray]) -> list[np.ndarray]:
        arena = self.image.symbols["arena"]
        given = [(arena + b.offset, x) for b, x in zip(self.model.inputs, inputs, strict=True)]
        return board.infer(given, [(arena + b.offset, b.size) for b in self.model.outputs])


def version(program: str) -> str:
    """'QEMU 7.2.22'."""
    run = subprocess.run([program, "-version"], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    words = run.stdout.split()
    return f"QEMU {words[3]}" if len(words) > 3 else program


def _counts(text: str) -> Counts:
    """The plugin's lines for one run: "run", one "mark" a layer, "done"."""
    counts = Counts()
    start = last = Tally()
    for line in text.splitlines():
        name, *numbers = line.split()
        instructions, loads, stores, branches = map(int, numbers)
        now = Tally(instructions, loads, stores, branches)
        if name == "run":
            start = last = now
        elif name == "mark":
            counts.order.append(len(counts.order))
            counts.layers.append(now - last)
            last = now
        else:
            counts.total = now - start
    return counts


def _end(process: subprocess.Popen[bytes], connection: socket.socket, log: IO[str]) -> None:
    connection.close()
    process.kill()
    process.wait()
    log.close()
