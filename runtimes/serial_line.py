"""Runtime `serial_line`: a board on a serial line that runs the `c` artifact's own firmware (firmware/serial.c in the artifact).

The lines that go to and fro are described in that file. Cycles are the core's counter around each layer, so the profile is
`measured`; milliseconds follow where the board tells its clock.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import parse_qs

import numpy as np

from ..common.errors import PlanishError, missing_extra
from ..export import firmware
from ..export.artifact import Artifact
from ..export.serial import BAUD, CHUNK, VERSION, frame, identity, unframe
from . import c_model
from .session import Arrays, Latency, Layer, Profile, Runtime, Session

SCHEME = "serial://"
REPLY, INFERENCE = 5.0, 60.0
"""seconds that the board may take for a line, and for an inference"""
LONGEST = 1024
"""bytes of a line; the firmware's have at most 250"""
RUNS = 5
"""inferences that are timed, at most: the counter is exact, and each must be fed anew over the line"""


class SerialLine(Runtime):
    """A board at the end of a serial line."""

    formats: ClassVar[tuple[str, ...]] = ("c",)

    def __init__(self, address: str | None = None) -> None:
        self.address = address

    def open(self, artifact: Artifact, threads: int) -> SerialSession:
        """Open the port and greet the board. Raises PlanishError when it is silent, garbled or runs another model."""
        if self.address is None:
            raise PlanishError("the runtime 'serial_line' needs a port: --on serial://PORT, e.g. serial:///dev/ttyACM0")
        if threads != 1:
            raise PlanishError(f"{threads} threads were asked for; a microcontroller has one core")
        return SerialSession(artifact, *_parse(self.address))


def _parse(address: str) -> tuple[str, int, float]:
    """Port, baud and seconds to wait for an inference of 'serial://PORT?baud=115200&timeout=60'."""
    port, _, query = address.removeprefix(SCHEME).partition("?")
    given = {k: v[-1] for k, v in parse_qs(query, keep_blank_values=True).items()}
    unknown = sorted(set(given) - {"baud", "timeout"})
    try:
        baud, seconds = int(given.get("baud", BAUD)), float(given.get("timeout", INFERENCE))
    except ValueError:
        baud, seconds = 0, 0.0
    if not address.startswith(SCHEME) or not port or unknown or baud <= 0 or not 0 < seconds < 1e6:
        raise PlanishError(
            f"'{address}' is not understood; serial://PORT is accepted, e.g. serial:///dev/ttyACM0 or serial://COM3, with "
            "?baud=115200&timeout=60 behind it"
        )
    return port, baud, seconds


@dataclass(frozen=True)
class Board:
    """What a board says of itself."""

    identity: str
    layers: int
    counter: str
    clock_hz: int | None


class Line:
    """Lines with checksums to and from a port."""

    def __init__(self, port: str, baud: int) -> None:
        try:
            import serial
        except ImportError:
            raise missing_extra("pyserial", "mcu", "a board on a serial line") from None
        self.name, self.baud = port, baud
        self.error: type[Exception] = serial.SerialException
        try:
            self.port: Any = serial.Serial(port, baud, timeout=0.1, write_timeout=REPLY)
        except (serial.SerialException, ValueError) as error:
            raise PlanishError(f"the port '{port}' cannot be opened: {_first(error)}") from None

    def ask(self, text: str, seconds: float = REPLY) -> str:
        """The answer to a line. Raises PlanishError when none comes in time, when it is garbled, and for an ERROR."""
        try:
            self.port.write(frame(text))
            line = self._read(time.monotonic() + seconds)
        except (self.error, OSError) as error:
            raise PlanishError(f"the line '{self.name}' broke: {_first(error)}") from None
        if not line.endswith(b"\n"):
            what = f"only {line[:40]!r}" if line else "nothing"
            raise PlanishError(
                f"the board on '{self.name}' answered {what} within {seconds:g} s; is the serial firmware on it (make serial), "
                f"and does it run at {self.baud} baud?"
            )
        answer = unframe(line)
        if answer is None:
            raise PlanishError(
                f"the line '{self.name}' is garbled: {line[:60]!r} does not fit its checksum; is {self.baud} the board's baud?"
            )
        if answer.startswith("ERROR"):
            raise PlanishError(f"the board on '{self.name}' refused '{text[:40]}': {answer.removeprefix('ERROR ')}")
        return answer

    def clear(self) -> None:
        """End a line that was begun, and forget what the board said so far."""
        try:
            self.port.write(b"\n")
            deadline = time.monotonic() + REPLY
            while self.port.read(4096) and time.monotonic() < deadline:  # until a tenth of a second is silent
                pass
        except (self.error, OSError) as error:
            raise PlanishError(f"the line '{self.name}' broke: {_first(error)}") from None

    def close(self) -> None:
        """Give the port back."""
        self.port.close()

    def _read(self, deadline: float) -> bytes:
        """Bytes up to a newline; fewer when time or room is over."""
        found = bytearray()
        while time.monotonic() < deadline and len(found) < LONGEST:
            found += self.port.read_until(b"\n", LONGEST - len(found))
            if found.endswith(b"\n"):
                break
        return bytes(found)


class SerialSession(Session):
    """A board that answered."""

    def __init__(self, artifact: Artifact, port: str, baud: int, seconds: float) -> None:
        self.artifact, self.seconds = artifact, seconds
        self.model = c_model.load(artifact)
        self.line = Line(port, baud)
        try:
            self.line.clear()
            self.board = self._greet()
        except BaseException:
            self.line.close()
            raise

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch, one sample after another."""
        packed = self.model.pack(inputs)
        memory = [np.empty((len(packed[0]), b.size), np.int8) for b in self.model.outputs]
        for i in range(len(packed[0])):
            self._infer([p[i] for p in packed])
            for k, m in enumerate(memory):
                m[i] = self._output(k, m.shape[1])
        return self.model.unpack(memory)

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Cycles of the first sample: the median of up to RUNS inferences, after one that fills the caches."""
        packed = [p[0] for p in self.model.pack(inputs)]
        totals: list[int] = []
        layers: list[list[int]] = []
        for k in range(min(warmup, 1) + min(runs, RUNS)):
            total = self._infer(packed)
            if k >= min(warmup, 1):
                totals.append(total)
                layers.append([self._number("CYCLES", f"CYCLES {i}") for i in range(self.board.layers)])
        clock = self.board.clock_hz
        middle = [int(statistics.median_low(column)) for column in zip(*layers, strict=True)]
        elf = self.artifact.folder / "firmware.elf"
        sizes = firmware.sizes(elf) if elf.is_file() else None
        return Profile(
            target=self.artifact.target,
            format=self.artifact.format,
            kind="measured",
            cycles=int(statistics.median_low(totals)),
            latency_ms=None if clock is None else _latency(np.array(totals) * (1e3 / clock)),
            macs=self.model.macs,
            ram_bytes=None if sizes is None else sizes.ram + firmware.STACK,
            flash_bytes=None if sizes is None else sizes.flash,
            layers=tuple(
                Layer(x["name"], x["op"], x["macs"], None if clock is None else n * 1e3 / clock, measured_cycles=n)
                for x, n in zip(self.model.layers, middle, strict=True)
            ),
            environment={
                "port": self.line.name,
                "baud": self.line.baud,
                "counter": {"dwt": "DWT CYCCNT", "systick": "SysTick"}.get(self.board.counter, self.board.counter),
                "clock_hz": clock,
            },
        )

    def close(self) -> None:
        """Give the port back."""
        self.line.close()

    def _greet(self) -> Board:
        words = self.line.ask("HELLO").split(" ")
        if len(words) != 6 or words[:2] != ["PLANISH", str(VERSION)] or not (words[3] + words[5]).isdigit():
            raise PlanishError(
                f"the board on '{self.line.name}' greets with '{' '.join(words)[:60]}'; 'PLANISH {VERSION} ...' is understood"
            )
        found = Board(words[2], int(words[3]), words[4], int(words[5]) or None)
        own = identity(self.artifact.folder, self.model.name)
        if (found.identity, found.layers) != (own, len(self.model.layers)):
            raise PlanishError(
                f"the board on '{self.line.name}' runs another model ({found.identity}, {found.layers} layers) than the artifact "
                f"'{self.artifact.folder}' ({own}, {len(self.model.layers)}); build its serial firmware and flash it"
            )
        return found

    def _infer(self, inputs: list[np.ndarray]) -> int:
        """Load the codes and run: cycles of the inference."""
        for k, x in enumerate(inputs):
            for at in range(0, x.size, CHUNK):
                answer = self.line.ask(f"INPUT {k} {at} {x[at : at + CHUNK].tobytes().hex().upper()}")
                if answer != "OK":
                    raise self._strange("INPUT", answer)
        return self._number("DONE", "RUN", self.seconds)

    def _output(self, k: int, size: int) -> np.ndarray:
        found = bytearray()
        for at in range(0, size, CHUNK):
            answer = self.line.ask(f"OUTPUT {k} {at} {min(CHUNK, size - at)}")
            word, _, digits = answer.partition(" ")
            if word != "DATA" or not re.fullmatch(f"([0-9A-F]{{2}}){{{min(CHUNK, size - at)}}}", digits):
                raise self._strange("OUTPUT", answer)
            found += bytes.fromhex(digits)
        return np.frombuffer(bytes(found), np.int8)

    def _number(self, word: str, question: str, seconds: float = REPLY) -> int:
        answer = self.line.ask(question, seconds)
        first, _, number = answer.partition(" ")
        if first != word or not number.isdigit():
            raise self._strange(question, answer)
        return int(number)

    def _strange(self, question: str, answer: str) -> PlanishError:
        return PlanishError(
            f"the board on '{self.line.name}' answered '{question}' with '{answer[:60]}', which does not fit"
        )


def _latency(ms: np.ndarray) -> Latency:
    p10, p50, p90, p99 = (float(v) for v in np.percentile(ms, (10, 50, 90, 99)))
    return Latency(p50, p90, p99, len(ms), (p90 - p10) / p50 if p50 else 0.0)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
