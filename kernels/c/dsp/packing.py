"""Weights as the DSP products read them: the streams of `dsp/product.h`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ... import integer, weights
from ...op import Array, Node

UNIT = 4
"""depths that are multiplied together"""
GROUP = 4
"""outputs that are computed together"""
POWERS = {8: (256, 1, 256, 1), 4: (4096, 256, 16, 1), 2: (64, 16, 4, 1)}
"""by width: what the four outputs' weights are multiplied by in a packed number"""
CODE_LIMIT = 32000
"""bound on codes before saturation: with a zero point added they must fit 16 bits"""


@dataclass(frozen=True)
class Streams:
    """Packed weights, start values and factors of `groups * 4` outputs over `units * 4` depths."""

    words: Array
    """uint32 (groups, 8 + units * bits / 2)"""
    bits: int
    units: int
    groups: int


def width(rows: Array) -> int:
    """The least of 8, 4 and 2 bits that holds all weights."""
    low, high = int(rows.min()), int(rows.max())
    return next(b for b in (2, 4, 8) if low >= -(1 << b - 1) and high < 1 << b - 1)


def pack(node: Node, rows: Array, even: bool = False) -> Streams | None:
    """Streams of the weights of a node, int8 `rows` (out, depth) in the order in which their depths are gathered.

    `even`: an even number of units, as the products with one column take. None where a sum could leave the range in which the
    packed form is exact.
    """
    outputs, depth = rows.shape
    bits = width(rows)
    units, groups = -(-depth // UNIT), -(-outputs // GROUP)
    units += units % 2 if even else 0
    w = np.zeros((groups * GROUP, units * UNIT), np.int64)
    b, factor = np.zeros(groups * GROUP, np.int64), np.zeros(groups * GROUP, np.float32)
    w[:outputs, :depth], b[:outputs], factor[:outputs] = _without_constants(node, rows)
    power = np.tile(np.array(POWERS[bits], np.int64), groups)  # (groups * 4,)
    scaled = factor / power.astype(np.float32)
    reach = np.abs(b) + 128 * np.abs(w).sum(axis=1)
    exact = (scaled == 0) | (scaled >= np.finfo(np.float32).tiny)
    if (reach * power >= 2**31).any() or (reach * factor >= CODE_LIMIT).any() or not exact.all():
        return None
    lanes = w.reshape(groups, GROUP, units, UNIT).transpose(0, 2, 3, 1)  # (groups, units, depth, output)
    packed = {8: _eight, 4: _four, 2: _two}[bits](lanes)
    if packed is None:
        return None
    start = b.reshape(groups, GROUP) * np.array(POWERS[bits])
    if bits == 8:
        start[:, 0::2] += start[:, 1::2]
    else:
        start = np.cumsum(start[:, ::-1], axis=1)[:, ::-1]
    words = np.concatenate(
        [
            (start & 0xFFFFFFFF).astype(np.uint32),
            packed.reshape(groups, -1),
            scaled.reshape(groups, GROUP).astype(np.float32).view(np.uint32),
        ],
        axis=1,
    )
    return Streams(words, bits, units, groups)


def _without_constants(node: Node, rows: Array) -> tuple[Array, Array, Array]:
    """Weights (out, depth), bias (out,) and factors (out,), made small where an output has the same code for every input.

    Pruned and dead channels are such: a bias far beyond the range of codes, at a tiny scale.
    """
    w, b = rows.astype(np.int64), weights.folded_bias(node).astype(np.int64)
    factor = node.constants["rescale"].copy()
    zero, low, high = node.output.zero_point, node.attributes["low"], node.attributes["high"]
    least = b + np.minimum(-128 * w, 127 * w).sum(axis=1)
    most = b + np.maximum(-128 * w, 127 * w).sum(axis=1)
    first, last = (integer.requantize(a, factor, zero, low, high).astype(np.int64) for a in (least, most))
    same = first == last
    w[same], b[same], factor[same] = 0, first[same] - zero, 1
    return w, b, factor


def _words(halves: Array) -> Array:
    """uint32 (..., 2, n) from 16-bit numbers (..., 4, n): depths (0, 2), then (1, 3)."""
    h = halves & 0xFFFF
    return (h[..., :2, :] | h[..., 2:, :] << 16).astype(np.uint32)


def _eight(lanes: Array) -> Array | None:
    """(groups, units, 2, 2) words of weights (groups, units, 4, 4); None where a pair does not fit 16 bits."""
    halves = 256 * lanes[..., 0::2] + lanes[..., 1::2]  # (groups, units, depth, 2)
    return None if (halves < -(2**15)).any() else _words(halves)


def _four(lanes: Array) -> Array:
    """(groups, units, 2) words of weights (groups, units, 4, 4)."""
    return _words((lanes * POWERS[4]).sum(axis=-1, keepdims=True) + 8 * (256 + 16 + 1))


def _two(lanes: Array) -> Array:
    """(groups, units) words of weights (groups, units, 4, 4)."""
    numbers = ((lanes * POWERS[2]).sum(axis=-1) + 2 * (16 + 4 + 1)) & 255  # (groups, units, depth)
    return (numbers << np.arange(0, 32, 8)).sum(axis=-1).astype(np.uint32)
