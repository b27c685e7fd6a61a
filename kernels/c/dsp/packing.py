"""Weights as the DSP products read them: the streams of `dsp/product.h`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ... import weights
from ...op import Array, Node

UNIT = 4
"""depths that are multiplied together"""
GROUP = 4
"""outputs that are computed together"""
POWERS = {
    "8": (256, 1, 256, 1),
    "8_far": (1, 1, 1, 1),
    "4": (4096, 256, 16, 1),
    "4_far": (16, 1, 16, 1),
    "2": (64, 16, 4, 1),
}
"""by form: what the sums of the four outputs are multiplied by until they meet their factors"""
CODE_LIMIT = 32000
"""bound on codes before saturation, except in the far forms: with a zero point added they must fit 16 bits"""
ORDERS = {8: (0, 1, 2, 3), 4: (0, 1, 4, 5, 2, 3, 6, 7), 2: (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)}
"""by bits of the activations: the order in which the codes of a word stand in units, each two pairs (d0, d2), (d1, d3)"""


@dataclass(frozen=True)
class Streams:
    """Packed weights, start values and factors."""

    words: Array
    """uint32 (groups, 8 + units * words of a unit)"""
    form: str
    units: int
    groups: int

    @property
    def bits(self) -> int:
        """Of the weights."""
        return int(self.form[0])

    @property
    def far(self) -> bool:
        """Whether the sums may be of any size."""
        return self.form.endswith("far")


def pack(node: Node, rows: Array, parts: int = 1, added: int = 0, even: bool = False) -> Streams:
    """Streams of the weights of a node, int8 `rows` (out, depth) in the order in which their depths are gathered.

    `parts`: groups of a convolution, each of which fills whole groups of four outputs; `added`: to all codes when they are
    expanded; `even`: an even number of units, as the products with one column take.
    """
    outputs, depth = rows.shape
    each = outputs // parts
    units, groups = -(-depth // UNIT), -(-each // GROUP)
    units += units % 2 if even else 0

    def spread(values: Array) -> Array:
        """(out, ...) to (parts * groups * 4, ...), filled up with zeros."""
        shaped = values.reshape(parts, each, *values.shape[1:])
        widths = [(0, 0), (0, groups * GROUP - each)] + [(0, 0)] * (values.ndim - 1)
        return np.pad(shaped, widths).reshape(-1, *values.shape[1:])

    bias, factor, varies = weights.effective(node, rows)
    w = np.pad(rows.astype(np.int64) * varies[:, None], ((0, 0), (0, units * UNIT - depth)))
    bias = bias - added * w.sum(axis=1)
    w, bias, factor = spread(w), spread(bias), spread(factor)
    lanes = w.reshape(parts * groups, GROUP, -1, UNIT).transpose(0, 2, 3, 1)  # (groups, units, depth, output)
    form = _form(w, bias, factor)
    packed = {"8": _eight, "8_far": _eight_far, "4": _four, "4_far": _four_far, "2": _two}[form](lanes)
    power = np.array(POWERS[form])
    start = bias.reshape(-1, GROUP) * power
    if form in ("8", "4_far"):
        start[:, 0::2] += start[:, 1::2]
    elif form != "8_far":
        start = np.cumsum(start[:, ::-1], axis=1)[:, ::-1]
    scaled = (factor.reshape(-1, GROUP) / power.astype(np.float32)).astype(np.float32)
    words = [(start & 0xFFFFFFFF).astype(np.uint32), packed.reshape(len(packed), -1), scaled.view(np.uint32)]
    return Streams(np.concatenate(words, axis=1), form, units, groups)


def order(bits: int, count: int) -> Array:
    """Positions of `count` codes, whole words of activations of `bits`, in the order in which they are gathered."""
    one = np.array(ORDERS[bits])
    return (np.arange(0, count, len(one))[:, None] + one).reshape(-1)


def _form(w: Array, bias: Array, factor: Array) -> str:
    """The narrowest form that is exact for weights (out, depth), bias (out,) and factors (out,)."""
    narrow = weights.bits(w)
    ends = [np.abs(bias + pick(-128 * w, 127 * w).sum(axis=1)) for pick in (np.minimum, np.maximum)]
    reach = np.maximum(*ends)
    for form in (str(narrow), "4_far"):
        power = np.tile(np.array(POWERS[form]), len(w) // GROUP)
        exact = (reach * power < 2**31) & ((factor == 0) | (factor >= np.finfo(np.float32).tiny * power))
        near = form == "4_far" or (reach * factor < CODE_LIMIT).all()
        halves = form != "8" or (256 * w[0::2] + w[1::2] >= -(2**15)).all()
        if exact.all() and near and halves and narrow <= int(form[0]):
            return form
    return "8_far"


def _words(halves: Array) -> Array:
    """uint32 (..., 2, n) from 16-bit numbers (..., 4, n): depths (0, 2), then (1, 3)."""
    h = halves & 0xFFFF
    return (h[..., :2, :] | h[..., 2:, :] << 16).astype(np.uint32)


def _eight(lanes: Array) -> Array:
    """(groups, units, 2, 2) words of weights (groups, units, 4, 4)."""
    return _words(256 * lanes[..., 0::2] + lanes[..., 1::2])


def _eight_far(lanes: Array) -> Array:
    """(groups, units, 2, 2) words of weights (groups, units, 4, 4)."""
    return _words(256 * lanes[..., 0::2] + (lanes[..., 1::2] & 255))


def _four(lanes: Array) -> Array:
    """(groups, units, 2, 1) words of weights (groups, units, 4, 4)."""
    return _words((lanes * POWERS["4"]).sum(axis=-1, keepdims=True) + 8 * (256 + 16 + 1))


def _four_far(lanes: Array) -> Array:
    """(groups, units, 2, 1) words of weights (groups, units, 4, 4)."""
    numbers = (16 * lanes[..., 0::2] + lanes[..., 1::2] + 8) & 255  # (groups, units, depth, 2)
    return _words((numbers << np.array([0, 8])).sum(axis=-1, keepdims=True))


def _two(lanes: Array) -> Array:
    """(groups, units) words of weights (groups, units, 4, 4)."""
    numbers = ((lanes * POWERS["2"]).sum(axis=-1) + 2 * (16 + 4 + 1)) & 255  # (groups, units, depth)
    return (numbers << np.arange(0, 32, 8)).sum(axis=-1).astype(np.uint32)
