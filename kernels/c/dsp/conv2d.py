"""Convolution with SMLAD: two pixels and four outputs at a time, the weights packed for it (dsp/product.h)."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from ... import window
from ...op import Array, Call, Node
from ...window import Window
from .. import overlap
from ..version import Version
from . import packing
from .packing import GROUP, UNIT, Streams

POINT = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
BLOCK = 2
"""output pixels that are computed together"""


class Conv2d(Version):
    """Weights without zero points; in several groups, input channels that are multiples of 4 in each. Activations may have 4 or 2
    bits where their channels fill whole words.
    """

    op: ClassVar[str] = "conv2d"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if node.constants["weight_zero_point"].any():
            return None
        weight = node.constants["weight"].transpose(0, 2, 3, 1)  # (out, kh, kw, depth)
        groups = node.attributes["groups"]
        blocks = overlap.blocks(math.prod(node.output.shape[2:]), BLOCK)
        distance = overlap.of_pixels(node, blocks) if groups == 1 else None
        shapes = (node.inputs[0].shape[1:], node.output.shape[1:])
        return call_of(node, weight, window.of(node), *shapes, groups, distance)


def call_of(
    node: Node,
    weight: Array,
    shape: Window,
    x: tuple[int, ...],
    y: tuple[int, ...],
    groups: int,
    distance: int | None,
) -> Call | None:
    """The convolution of int8 `weight` (out, kh, kw, depth) over an input of shape `x` to an output of shape `y`, both
    (channels, height, width), with the bias, factors and codes of `node`; None where its activations are not taken.

    `distance`: the overlap of the call.
    """
    outputs, kh, kw, depth = weight.shape
    x_bits, y_bits = node.inputs[0].bits, node.output.bits
    geometry = {
        "in_height": x[1],
        "in_width": x[2],
        "in_channels": x[0],
        "out_height": y[1],
        "out_width": y[2],
        "out_channels": outputs,
        "groups": groups,
        **shape.fields(),
        "x_zero_point": node.inputs[0].zero_point,
    }
    whole_words = depth * x_bits % (8 * UNIT) == 0
    if (not whole_words and (groups > 1 or x_bits < 8)) or (groups > 1 and y_bits < 8):
        return None
    if whole_words:
        pointwise = shape == POINT and groups == 1
        rows = weight.reshape(outputs, -1)[:, packing.order(x_bits, kh * kw * depth)]
        gather = {"POINTWISE": int(pointwise), "SEGMENT": 0}
        work = 0 if pointwise else depth * x_bits // 8
    else:
        rows, segment, segments = _segments(weight, shape)
        gather = {"POINTWISE": 0, "SEGMENT": segment, "SEGMENTS": segments}
        gather |= {name.upper(): value for name, value in geometry.items()}
        work = BLOCK * UNIT * -(-rows.shape[1] // UNIT)
    streams = packing.pack(node, rows, groups, added=0 if x_bits == 8 else 1 << x_bits - 1)
    staged = is_staged(node, outputs // groups)
    return Call(
        kernel="dsp_conv2d",
        sources=("dsp/expand.c", f"dsp/product_{streams.form}.c"),
        template="dsp/conv2d.c",
        headers=("dsp/conv2d.h",),
        defines={**defines(node, streams, staged), **gather},
        fields={
            **geometry,
            "y_zero_point": node.output.zero_point,
            "low": node.attributes["low"],
            "high": node.attributes["high"],
            "units": streams.units,
        },
        arrays={"weight": streams.words},
        comments={"weight": f"out {outputs}, kernel {kh} x {kw}, in {depth}; packed, with bias and rescale"},
        scratch=4 * UNIT * streams.units + BLOCK * GROUP * streams.groups * staged + work,
        overlap=distance,
    )


def is_staged(node: Node, outputs: int) -> bool:
    """Whether codes of `outputs` neighbours go through work memory: they are clamped, packed, or do not fill whole words."""
    limits = (node.attributes["low"], node.attributes["high"])
    return limits != (-128, 127) or node.output.bits < 8 or outputs % GROUP > 0


def defines(node: Node, streams: Streams, staged: bool) -> dict[str, int]:
    """Widths that the templates are compiled for."""
    return {
        "WEIGHT_BITS": streams.bits,
        "FAR": int(streams.far),
        "STAGED": int(staged),
        "X_BITS": node.inputs[0].bits,
        "Y_BITS": node.output.bits,
    }


def _segments(weight: Array, shape: Window) -> tuple[Array, int, int]:
    """Rows (out, depth) of weights (out, kh, kw, depth) in the order of dsp/gather_segments.h: whole words of all segments, then
    what is left of each; the bytes of a segment; and the segments of a kernel row.
    """
    outputs, kh, kw, depth = weight.shape
    without_gaps = kw == 1 or shape.dilation[1] == 1
    segment, segments = (kw * depth, 1) if without_gaps else (depth, kw)
    pieces = weight.reshape(outputs, kh * segments, segment)
    words, rest = np.split(pieces, [segment - segment % UNIT], axis=2)
    return np.concatenate([words.reshape(outputs, -1), rest.reshape(outputs, -1)], axis=1), segment, segments
