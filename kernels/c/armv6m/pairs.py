"""Weights for dot products of two pixels in one 32-bit product (pairs.h): chunks whose sums fit 16 bits, and what is too much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...op import Array

TAPS = (2, 4, 8)
UNROLL = {2: 8, 4: 8, 8: 4}
COST = {2: 10, 4: 16, 8: 29}
"""instructions of a chunk"""
EXTRA_COST = 15
"""instructions that an extra chunk takes beside its own"""
EXTRA_CHECK = 6
"""instructions for every output where there are extra chunks"""
MOST_CHUNKS = 255
"""that an extra chunk's index can name"""


@dataclass(frozen=True)
class Chunks:
    """Weights in chunks of `taps`."""

    taps: int
    weight: Array
    """uint8 (out, chunks * taps), plus 128"""
    extra: Array | None
    """uint8: for every output (chunk, taps weights)..., 255; None where there are none"""

    @property
    def count(self) -> int:
        """Chunks of an output."""
        return self.weight.shape[1] // self.taps


def fits(chunks: Array) -> Array:
    """Whether the sum of x * w stays within int16 for all int8 x: bool (...) for weights int (..., taps)."""
    up = np.maximum(chunks, 0).sum(axis=-1, dtype=np.int64)
    down = np.maximum(-chunks.astype(np.int64), 0).sum(axis=-1)
    return (127 * up + 128 * down < 1 << 15) & (128 * up + 127 * down <= 1 << 15)


def split(rows: Array, taps: int) -> Chunks | None:
    """Weights int8 (out, k) in chunks; None when an extra chunk would have an index beyond 254."""
    outputs, k = rows.shape
    count = -(-k // taps)
    chunks = np.zeros((outputs, count * taps), np.int16)
    chunks[:, :k] = rows
    chunks = chunks.reshape(outputs, count, taps)
    heavy = ~fits(chunks)
    extra: list[int] = []
    for o in range(outputs):
        for c in np.flatnonzero(heavy[o]):
            first, *others = parts(chunks[o, c])
            chunks[o, c] = first
            for other in others:
                extra += [int(c), *(int(v) + 128 for v in other)]
        extra.append(255)
    if heavy.any() and count > MOST_CHUNKS:
        return None
    stored = (chunks + 128).astype(np.uint8).reshape(outputs, -1)
    return Chunks(taps, stored, np.array(extra, np.uint8) if heavy.any() else None)


def parts(chunk: Array) -> list[Array]:
    """Chunks that fit and add up to `chunk` (taps,)."""
    if fits(chunk):
        return [chunk]
    half = chunk >> 1
    return [*parts(half), *parts(chunk - half)]


def best(rows: Array) -> Chunks | None:
    """The chunks with the fewest instructions."""
    found = [c for c in (split(rows, taps) for taps in TAPS) if c is not None]
    return min(found, key=lambda c: instructions(c, len(rows)), default=None)


def instructions(chunks: Chunks, outputs: int) -> float:
    """Instructions of the dot products, about, for one pair of pixels."""
    loops = outputs * -(-chunks.count // UNROLL[chunks.taps])
    total = outputs * chunks.count * COST[chunks.taps] + 4 * loops
    if chunks.extra is not None:
        extras = (len(chunks.extra) - outputs) // (chunks.taps + 1)
        total += EXTRA_CHECK * outputs + extras * (COST[chunks.taps] + EXTRA_COST)
    return total
