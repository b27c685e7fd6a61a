"""Client of GDB's remote serial protocol (GDB manual, appendix E), as far as driving an emulator takes it."""

from __future__ import annotations

import socket

from ..common.errors import PlanishError

CHUNK = 1024
"""bytes of memory in one packet; QEMU takes packets of 4096 characters"""


class Lost(Exception):
    """The other side closed the connection, or said nothing in time; the message says which."""


class Gdb:
    """One connection. Addresses and sizes in bytes; registers by GDB's number (Arm: 13 is sp, 15 is pc)."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self.connection = connection
        self.connection.settimeout(timeout)
        self.pending = b""
        self._ask("?")  # an answer says that the other side is there

    def read(self, address: int, size: int) -> bytes:
        """Bytes of memory."""
        parts = [
            bytes.fromhex(self._ask(f"m{at:x},{min(CHUNK, address + size - at):x}"))
            for at in range(address, address + size, CHUNK)
        ]
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Set bytes of memory."""
        for at in range(0, len(data), CHUNK):
            part = data[at : at + CHUNK]
            self._ask(f"M{address + at:x},{len(part):x}:{part.hex()}")

    def register(self, number: int) -> int:
        """One of the first registers, which are Arm's sixteen of 32 bits."""
        return int.from_bytes(bytes.fromhex(self._ask("g"))[4 * number : 4 * number + 4], "little")

    def break_at(self, address: int) -> None:
        """Stop before the instruction at `address` is executed."""
        self._ask(f"Z0,{address:x},2")

    def pass_by(self, address: int) -> None:
        """Take `break_at` back."""
        self._ask(f"z0,{address:x},2")

    def resume(self) -> None:
        """Run until a stop. Raises Lost when there is none in time: `interrupt` stops it then."""
        self._send("c")
        self._stopped()

    def interrupt(self) -> None:
        """Stop a core that runs."""
        self._put(b"\x03")
        self._stopped()

    def _stopped(self) -> None:
        reply = self._receive()
        if reply[:1] not in ("T", "S"):
            raise Lost(f"it ended ({reply})")

    def _ask(self, command: str) -> str:
        self._send(command)
        reply = self._receive()
        if not reply or reply[0] == "E":
            raise PlanishError(f"the emulator's debugger refused '{command[:40]}' ({reply or 'not known'})")
        return reply

    def _send(self, command: str) -> None:
        self._put(f"${command}#{sum(command.encode()) % 256:02x}".encode())

    def _put(self, data: bytes) -> None:
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise Lost(f"it ended ({error.strerror})") from None

    def _receive(self) -> str:
        """The text of the next packet; acknowledgements before it are skipped."""
        while True:
            start, end = self.pending.find(b"$"), self.pending.find(b"#")
            if 0 <= start < end and len(self.pending) >= end + 3:
                text = self.pending[start + 1 : end].decode()
                self.pending = self.pending[end + 3 :]
                self._put(b"+")
                return text
            try:
                part = self.connection.recv(1 << 16)
            except TimeoutError:
                raise Lost(f"it said nothing for {self.connection.gettimeout():g} s") from None
            except OSError as error:
                raise Lost(f"it ended ({error.strerror})") from None
            if not part:
                raise Lost("it ended")
            self.pending += part
