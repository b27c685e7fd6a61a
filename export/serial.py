"""The serial line between a board and `planish ... --on serial://PORT`: what both sides agree on.

The firmware's side is c_templates/serial.c.jinja, the host's runtimes/serial_line.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

BAUD = 115200
CHUNK = 96
"""codes in a line, at most"""
VERSION = 1


def identity(folder: Path, name: str) -> str:
    """16 digits that stand for the model in an artifact's folder: of the files that hold its layers and its weights."""
    found = hashlib.sha256()
    for file in (f"{name}.c", f"{name}_weights.c"):
        found.update((folder / file).read_bytes())
    return found.hexdigest()[:16]


def crc(text: bytes) -> int:
    """CRC-16/CCITT-FALSE: polynomial 0x1021, start 0xFFFF."""
    total = 0xFFFF
    for byte in text:
        total ^= byte << 8
        for _ in range(8):
            total = (total << 1 ^ 0x1021 if total & 0x8000 else total << 1) & 0xFFFF
    return total


def frame(text: str) -> bytes:
    """A line as it is sent."""
    content = text.encode("ascii")
    return content + b"*%04X\n" % crc(content)


def unframe(line: bytes) -> str | None:
    """The text of a line as it came; None when its checksum is not right."""
    content, star, digits = line.rstrip(b"\r\n").rpartition(b"*")
    good = star and len(digits) == 4 and digits == b"%04X" % crc(content) and content.isascii()
    return content.decode("ascii") if good else None
