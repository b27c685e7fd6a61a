"""Requantization for cores without an FPU: the float32 contract in one 32-bit product, and proof that no bit differs.

A channel's rescale is mantissa * 2^-(23 + E), mantissa in [2^23, 2^24). The word that the C code reads holds

    mantissa << 8 | s        s = E - 8 + g (fraction 23) or E - 7 (fraction 22)

and the fast product is c = ((sum << g >> s) * (word >> 16) + half) / 2^fraction, g >= 0 the least with s >= 0 for all channels.
Shifting the sum makes c smaller by less than 2^(s - g) * rescale (by nothing for s <= g), shifting the mantissa by less than 257 parts of the lost share:
together `error` (the second part makes c larger where sums are negative). float32 rounds a product below 256 by at most 2^-17.
`half` holds the zero point, 1/2 and error + 2^-16, so that floor(c) is the code wherever the fraction of c is at least
`window` = error + 2^-15 (and the second part again for negative sums); below it, for some 2 percent of all sums, the C code
multiplies all bits and rounds them as float32 does.

Sums of 2^24 and more would be rounded by float32 before the product. With rescale >= 2^-16 they saturate either way; else
`words` refuses channels whose sums can grow so large.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ... import integer, weights
from ...op import Array, Node

FLOAT_ROUNDING = 2.0**-16
REACH = 257
"""products that are not yet sure to saturate stay below"""
HEADER = "armv6m/requantize.h"
SOURCE = "armv6m/requantize.c"


@dataclass(frozen=True)
class Scale:
    """What planish_scale and the words hold."""

    words: Array
    """uint32 (channels,)"""
    fields: dict[str, int]
    """of planish_scale, in its order"""

    @property
    def one_sided(self) -> bool:
        """Whether the lowest code is the zero point, so that negative sums saturate at once."""
        return self.fields["fraction"] == 23

    @property
    def full(self) -> bool:
        """Whether all codes from -128 to 127 are kept."""
        return (self.fields["low"], self.fields["high"]) == (-128, 127)

    @property
    def defines(self) -> dict[str, int]:
        """What the assembly of the kernels is specialised for."""
        return {
            "ONE_SIDED": int(self.one_sided),
            "CLAMPED": int(not self.full),
            "BEFORE": int(self.fields["before"] > 0),
        }

    @property
    def initializer(self) -> str:
        """The struct in C."""
        parts = [f"{v}u" if k in ("limit", "half", "window") else str(v) for k, v in self.fields.items()]
        return "{" + ", ".join(parts) + "}"


@dataclass(frozen=True)
class Sums:
    """What makes the sums of a node with weights, and how they become codes."""

    weight: Array
    """int8, as in the node; 0 for outputs whose code is always the same"""
    bias: Array
    """int32 (out,), with x_zero_point folded in"""
    scale: Scale

    @property
    def channel(self) -> Array:
        """int32 (out, 2): bias and word of every output."""
        return np.stack([self.bias, self.scale.words.view(np.int32)], axis=1)


def of(node: Node) -> Sums | None:
    """The sums of a node whose weights have no zero points; None where the form does not fit.

    An output whose code is the same for the least and the greatest sum gets a bias that gives this code, and no weights:
    pruned and dead channels have such small factors that their sums would not fit otherwise.
    """
    a, zero_point = node.attributes, node.output.zero_point
    weight = node.constants["weight"].copy()  # (out, ...)
    bias = weights.folded_bias(node)
    rescale = node.constants["rescale"].astype(np.float32)
    rows = weight.reshape(len(weight), -1).astype(np.int64)
    up, down = np.maximum(rows, 0).sum(axis=1), np.maximum(-rows, 0).sum(axis=1)
    least, most = bias - 128 * up - 127 * down, bias + 127 * up + 128 * down
    codes = [integer.requantize(v, rescale, zero_point, a["low"], a["high"]) for v in (least, most)]
    same = codes[0] == codes[1]
    weight[same] = 0
    bias[same] = (codes[0][same].astype(np.int32) - zero_point) << 8
    rescale[same] = 2.0**-8
    largest = np.where(same, np.abs(bias), np.maximum(np.abs(least), np.abs(most)))
    scale = words(rescale, largest, zero_point, a["low"], a["high"])
    return None if scale is None else Sums(weight, bias, scale)


def words(
    rescale: Array, largest: Array, zero_point: int, low: int, high: int, more: float | None = None
) -> Scale | None:
    """For factors (channels,) and sums of magnitude up to `largest` (channels,); None where the form does not fit.

    `more`, for formulas that planish_exact_code is not: how far their result may be from sum * factor; fraction 22 then.
    """
    rescale = np.asarray(rescale, np.float64 if more else np.float32).astype(np.float64).reshape(-1)
    if (rescale < 0).any() or not np.isfinite(rescale).all():
        return None
    fraction, exponent = np.frexp(rescale)
    mantissa = (fraction * 2**24).astype(np.int64)
    e = 1 - exponent.astype(np.int64)
    one_sided = (zero_point, low, high) == (-128, -128, 127) and more is None
    bits = 23 if one_sided else 22
    base = bits - 15  # s = e - base + g
    alive = largest * rescale >= 0.5 - FLOAT_ROUNDING - (
        more or 0.0
    )  # other channels give the zero point whatever comes
    if (alive & (rescale < 2.0**-16) & (largest >= 2**24)).any():
        return None
    g = max(0, base - int(e[alive].min())) if alive.any() else 0
    if (largest >= 2 ** (31 - g)).any():
        return None
    s = e - base + g
    dead = ~alive
    s[dead], mantissa[dead] = 31, 1 << 23  # sums << g, which fit 32 bits, become 0 or -1
    if (s > 31).any():
        return None
    word = mantissa << 8 | s
    kept = word >> 16 << 8
    of_sum = (np.exp2(np.maximum(s - g, 0)) - 1) * rescale
    of_mantissa = REACH * (1 - kept / mantissa)
    error = float((of_sum + of_mantissa)[alive].max(initial=0.0))
    above = (
        0.0 if one_sided else float(of_mantissa[alive].max(initial=0.0))
    )  # products of negative sums come out too large
    rounding = FLOAT_ROUNDING + (more or 0.0)
    half = int(np.ceil((zero_point + 128 + 0.5 + error + rounding) * 2**bits))
    window = int(np.ceil((error + above + 2 * rounding) * 2**bits) + 1) << (32 - bits)
    if window >= 2**31:
        return None
    fields = {
        "half": half,
        "window": window,
        "limit": (1 << 16) - (1 << 7) - 1,
        "zero_point": zero_point,
        "low": low,
        "high": high,
        "before": g,
        "exponent": 23 + base - g,
        "fraction": bits,
    }
    return Scale(word.astype(np.uint32), fields)
