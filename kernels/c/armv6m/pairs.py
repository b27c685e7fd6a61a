"""Weights for dot products of two pixels in one 32-bit product (pairs.h): chunks whose sums fit 16 bits, and what is too much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ... import weights
from ...op import Array

TAPS = {8: (2, 3, 4, 8), 4: (8,), 2: (16,)}
"""of a chunk, by the bits of a weight; narrow weights fill one word"""
UNROLL = {2: 8, 3: 8, 4: 8, 8: 4, 16: 2}
"""chunks in the loop, by taps; all there are where they are fewer"""
COST = {2: 10, 3: 13, 4: 16, 8: 29, 16: 55}
"""instructions of a chunk"""
EXTRA_COST = 15
"""instructions that an extra chunk takes beside its own"""
EXTRA_CHECK = 6
"""instructions for every output where there are extra chunks"""
STAGED = 14
"""instructions for every input of two windows that go through scratch code by code"""
MOST_CHUNKS = 255
"""that an extra chunk's index can name"""


@dataclass(frozen=True)
class Chunks:
    """Weights in chunks of `taps`."""

    bits: int
    taps: int
    weight: Array
    """8 bits: uint8 (out, chunks * taps), plus 128; fewer: int32 (out, chunks), plus half the range, packed"""
    extra: Array | None
    """uint8: for every output (chunk, taps weights)..., 255; None where there are none"""

    @property
    def count(self) -> int:
        """Chunks of an output."""
        return self.weight.shape[1] // (self.taps if self.bits == 8 else 1)

    @property
    def skips(self) -> bool:
        """Whether the chunks are no multiple of those in the loop."""
        return self.count > UNROLL[self.taps] and self.count % UNROLL[self.taps] > 0

    @property
    def defines(self) -> dict[str, int]:
        """What the assembly is specialised for."""
        return {
            "WEIGHT_BITS": self.bits,
            "TAPS": self.taps,
            "EXTRA": int(self.extra is not None),
            "UNROLL": min(UNROLL[self.taps], self.count),
            "LOOPS": int(self.count > UNROLL[self.taps]),
            "SKIPS": int(self.skips),
        }


def fits(chunks: Array) -> Array:
    """Whether the sum of x * w stays within int16 for all int8 x: bool (...) for weights int (..., taps)."""
    up = np.maximum(chunks, 0).sum(axis=-1, dtype=np.int64)
    down = np.maximum(-chunks.astype(np.int64), 0).sum(axis=-1)
    return (127 * up + 128 * down < 1 << 15) & (128 * up + 127 * down <= 1 << 15)


def split(rows: Array, taps: int) -> Chunks | None:
    """Weights int8 (out, k) in chunks of 8-bit weights; None when an extra chunk would have an index beyond 254."""
    chunks = _chunks(rows, taps)
    heavy = ~fits(chunks)
    extra: list[int] = []
    for o in range(len(chunks)):
        for c in np.flatnonzero(heavy[o]):
            first, *others = parts(chunks[o, c])
            chunks[o, c] = first
            for other in others:
                extra += [int(c), *(int(v) + 128 for v in other)]
        extra.append(255)
    if heavy.any() and chunks.shape[1] > MOST_CHUNKS:
        return None
    stored = (chunks + 128).astype(np.uint8).reshape(len(chunks), -1)
    return Chunks(8, taps, stored, np.array(extra, np.uint8) if heavy.any() else None)


def narrow(rows: Array, width: int) -> Chunks:
    """Weights int8 (out, k) that hold in 4 or 2 bits, one word a chunk."""
    (taps,) = TAPS[width]
    chunks = _chunks(rows, taps).astype(np.int64) + (1 << width - 1)
    words = (chunks << np.arange(0, 32, width)[:taps]).sum(axis=2)
    return Chunks(width, taps, words.astype(np.uint32).view(np.int32), None)


def _chunks(rows: Array, taps: int) -> Array:
    """int16 (out, chunks, taps), filled up with zeros."""
    filled = np.pad(rows.astype(np.int16), ((0, 0), (0, -rows.shape[1] % taps)))
    return filled.reshape(len(rows), -1, taps)


def parts(chunk: Array) -> list[Array]:
    """Chunks that fit and add up to `chunk` (taps,)."""
    if fits(chunk):
        return [chunk]
    half = chunk >> 1
    return [*parts(half), *parts(chunk - half)]


def best(rows: Array, depth: int) -> Chunks | None:
    """The chunks with the fewest instructions for weights int8 (out, k) of pixels with `depth` channels."""
    width = weights.bits(rows)
    if width < 8:
        return narrow(rows, width)

    def cost(c: Chunks) -> float:
        return instructions(c, len(rows)) + (STAGED * rows.shape[1] if depth % c.taps else 0)

    found = [c for c in (split(rows, taps) for taps in TAPS[8]) if c is not None]
    return min(found, key=cost, default=None)


def instructions(chunks: Chunks, outputs: int) -> float:
    """Instructions of the dot products, about, for one pair of pixels."""
    loops = outputs * -(-chunks.count // UNROLL[chunks.taps])
    total = outputs * chunks.count * COST[chunks.taps] + 4 * loops + 4 * outputs * chunks.skips
    if chunks.extra is not None:
        extras = (len(chunks.extra) - outputs) // (chunks.taps + 1)
        total += EXTRA_CHECK * outputs + extras * (COST[chunks.taps] + EXTRA_COST)
    return total
