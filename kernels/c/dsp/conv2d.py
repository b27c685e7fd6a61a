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

BLOCK = 2
"""output pixels that are computed together"""


class Conv2d(Version):
    """Weights without zero points; one group of any channels, or groups of multiples of 4. Activations may have 4 or 2 bits."""

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
    pointwise = shape.kernel == (1, 1) and shape.pads == (0, 0, 0, 0) and groups == 1
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
    whole = depth * x_bits % (8 * UNIT) == 0
    if (groups > 1 and (not whole or y_bits < 8)) or (not whole and x_bits < 8):
        return None
    if whole:
        rows = weight.reshape(outputs, -1)
        streams = packing.pack(
            node, rows[:, packing.order(x_bits, rows.shape[1])], groups, added=(1 << x_bits - 1) * (x_bits < 8)
        )
        gather = {"POINTWISE": int(pointwise), "SEGMENT": 0}
        work = 0 if pointwise else depth * x_bits // 8
    else:
        contiguous = kw == 1 or shape.dilation[1] == 1
        segment, segments = (kw * depth, 1) if contiguous else (depth, kw)
        pieces = weight.reshape(outputs, kh * segments, segment)
        split = segment - segment % UNIT
        rows = np.concatenate(
            [pieces[..., :split].reshape(outputs, -1), pieces[..., split:].reshape(outputs, -1)], axis=1
        )
        streams = packing.pack(node, rows)
        gather = {"POINTWISE": 0, "SEGMENT": segment, "SEGMENTS": segments}
        gather |= {name.upper(): value for name, value in geometry.items() if name != "groups"}
        work = BLOCK * UNIT * streams.units
    limits = (node.attributes["low"], node.attributes["high"])
    staged = limits != (-128, 127) or y_bits < 8 or outputs // groups % GROUP > 0
    return Call(
        kernel="dsp_conv2d",
        sources=("dsp/expand.c", f"dsp/product_{streams.form}.c"),
        template="dsp/conv2d.c",
        headers=("dsp/conv2d.h",),
        defines={**defines(node, streams, staged), **gather},
        fields={
            **geometry,
            "y_zero_point": node.output.zero_point,
            "low": limits[0],
            "high": limits[1],
            "units": streams.units,
        },
        arrays={"weight": streams.words},
        comments={"weight": f"out {outputs}, kernel {kh} x {kw}, in {depth}; packed, with bias and rescale"},
        scratch=4 * UNIT * streams.units + BLOCK * GROUP * streams.groups * staged + work,
        overlap=distance,
    )


def defines(node: Node, streams: Streams, staged: bool) -> dict[str, int]:
    """Widths that the templates are compiled for."""
    return {
        "WEIGHT_BITS": streams.bits,
        "FAR": int(streams.far),
        "STAGED": int(staged),
        "X_BITS": node.inputs[0].bits,
        "Y_BITS": node.output.bits,
    }
