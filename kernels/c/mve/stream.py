"""Weights, biases and factors in one stream, in the order in which the MVE kernels read them (windows.h, resident.h,
fully_connected.c, narrow.h).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ... import weights
from ...op import Array, Node

STEP = 16
"""products of one instruction"""
BLOCK = 4
"""outputs whose sums are requantized together"""
ROW_LEVELS = {8: (0, 0, 0, 0), 4: (0, 1, 0, 1), 2: (0, 1, 2, 3)}
WINDOW_LEVELS = {8: (0, 0, 0, 0), 4: (0, 0, 1, 1), 2: (0, 2, 1, 3)}
"""by width: the places of four outputs' weights in their byte, counted from the lowest bits; fully_connected.c and windows.h"""


@dataclass(frozen=True)
class Blocks:
    """A node's constants by blocks of four outputs, zero where there is no output or input."""

    bits: int
    codes: Array
    """int8 (blocks, 4, steps, 16)"""
    bias: Array
    """int32 (blocks, 4): folded, times the power of the output's place in its byte"""
    rescale: Array
    """float32 (blocks, 4), divided by that power"""


def blocks(node: Node, rows: Array, levels: Mapping[int, Sequence[int]], narrow: bool = True) -> Blocks:
    """The constants of a node whose weights are `rows` int8 (out, k) in the order in which inputs are read.

    `levels`: by width, for each of four outputs, how many other weights lie below its own in the byte. The width is 8 without
    `narrow`, and where sums of narrow weights could leave 32 bits, or a factor its exact range.
    """
    outputs, depth = rows.shape
    low, high = int(rows.min()), int(rows.max())
    bits = next(b for b in (2, 4, 8) if low >= -(1 << b - 1) and high < 1 << b - 1)
    count, steps = -(-outputs // BLOCK), -(-depth // STEP)
    start, scale, varies = weights.effective(node, rows)
    codes = np.zeros((count * BLOCK, steps * STEP), np.int8)
    codes[:outputs, :depth] = rows * varies[:, None]
    more = (0, count * BLOCK - outputs)
    bias = np.pad(start, more).reshape(count, BLOCK)
    factor = np.pad(scale, more).reshape(count, BLOCK)
    power = np.array([1 << bits * level for level in levels[bits]])
    reach = np.abs(bias) + 128 * np.abs(codes.reshape(count, BLOCK, -1).astype(np.int64)).sum(axis=2)
    scaled = factor / power.astype(np.float32)
    if not narrow or (reach * power >= 2**31).any() or ((scaled != 0) & (scaled < np.finfo(np.float32).tiny)).any():
        bits, power, scaled = 8, np.ones(BLOCK, np.int64), factor
    scaled = scaled.astype(np.float32)
    return Blocks(bits, codes.reshape(count, BLOCK, steps, STEP), (bias * power).astype(np.int32), scaled)


def shared(parts: Sequence[Array], bits: int) -> Array:
    """int8 bytes (...) that hold weights int8 (...) of several outputs, the first in the lowest bits (narrow.h)."""
    total = np.zeros(parts[0].shape, np.int16)
    for level, part in enumerate(parts):
        offset = 0 if level + 1 == len(parts) else 1 << bits - 1
        total += (part.astype(np.int16) + offset) << bits * level
    return total.astype(np.int8)


def windows(b: Blocks) -> Array:
    """uint32 (words,): the stream of windows.h."""
    w = b.codes
    pairs = ((0, 2), (1, 3))
    if b.bits == 8:  # for every step the 16 weights of each of the two outputs
        parts = [words(w[:, pair].transpose(0, 2, 1, 3)) for pair in pairs]
    elif b.bits == 4:
        parts = [words(shared([w[:, o] for o in pair], 4)) for pair in pairs]
    else:
        parts = [words(shared([w[:, o] for o in (0, 2, 1, 3)], 2))]
    return np.concatenate([*parts, words(b.bias), words(b.rescale)], axis=1).reshape(-1)


def resident(b: Blocks) -> Array:
    """uint32 (words,): the stream of resident.h, for one or two steps."""
    w = b.codes[:, [0, 2, 1, 3]]  # (blocks, 4, steps, 16)
    if w.shape[2] == 2:
        return np.concatenate([words(w), words(b.bias), words(b.rescale)], axis=1).reshape(-1)
    parts: list[Array] = []
    for pair in ((0, 2), (1, 3)):
        numbers = np.stack([b.bias.view(np.uint32), b.rescale.view(np.uint32)], axis=2)[:, pair]  # (blocks, 2, 2)
        parts += [words(b.codes[:, pair]), words(numbers)]
    return np.concatenate(parts, axis=1).reshape(-1)


def row(b: Blocks) -> Array:
    """uint32 (words,): the stream of fully_connected.c."""
    w, each = b.codes, 8 // b.bits
    if b.bits == 8:
        parts = [words(b.bias), words(w.transpose(0, 2, 1, 3)), words(b.rescale)]
    else:
        groups = [shared([w[:, o + i] for i in range(each)], b.bits) for o in range(0, BLOCK, each)]
        parts = [words(np.stack(groups, axis=2)), words(b.bias), words(b.rescale)]
    return np.concatenate(parts, axis=1).reshape(-1)


def words(values: Array) -> Array:
    """uint32 (blocks, words) for values (blocks, ...), the first in the lowest bits."""
    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint32)
