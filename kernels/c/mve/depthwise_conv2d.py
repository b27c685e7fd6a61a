"""Depthwise convolution with MVE: windows of four rows in a vector, a multiply-accumulate across it a window (depthwise_conv2d.c)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ... import weights, window
from ...op import Array, Call, Node
from .. import overlap
from ..version import Version

ROWS = COLUMNS = 4
"""pixels in a vector"""
CHANNELS = 16
"""that are interleaved together"""
PITCH = ROWS * CHANNELS
"""bytes of scratch for a column"""
SCRATCH = 1536
"""bytes that are used for several rows of tiles at a time; a single one may take more"""


class DepthwiseConv2d(Version):
    """Multiplier 1, no dilation, kernels of up to 4 x 4, weights without zero points, activations of 8 bits."""

    op: ClassVar[str] = "depthwise_conv2d"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        weight = node.constants["weight"]  # (c, 1, kh, kw)
        _, channels, height, width = node.inputs[0].shape
        _, _, out_height, out_width = node.output.shape
        shape = window.of(node)
        kh, kw = shape.kernel
        if (
            len(weight) != channels
            or node.constants["weight_zero_point"].any()
            or shape.dilation != (1, 1)
            or kh > ROWS
            or kw > COLUMNS
            or shape.stride[1] > 7  # the gathering load's offset
            or min(node.inputs[0].bits, node.output.bits) != 8
        ):
            return None
        tiled = shape.stride == (1, 1) and max(kh, kw) <= 3 and min(out_height, out_width) >= 2
        step = 2 if tiled else 1  # output rows of a row of tiles
        columns = out_width + 2 if tiled else (-(-out_width // 4) * 4 - 1) * shape.stride[1] + COLUMNS
        strip = min(max(SCRATCH // (columns * PITCH), 1), out_height // step)
        odd = out_height % step
        in_place = tiled and (out_height, out_width) == (height, width) and shape.pads[0] <= 1
        starts = np.arange(0, out_height - odd, strip * step)
        ends = np.append(starts[1:], out_height)
        distance = overlap.least(ends * out_width * channels, overlap.needed(node)[starts * out_width])
        words = 3 if tiled else kw
        defines = {"PLANISH_COLUMNS": words, "PLANISH_TILES": int(tiled), "PLANISH_ODD": int(tiled and out_width % 2)}
        defines["PLANISH_IN_PLACE"] = int(in_place)
        defines["PLANISH_STRIDE"] = 0 if tiled else shape.stride[1]
        low, high = int(weight.min()), int(weight.max())
        narrow = kh < ROWS and low >= -8 and high <= 7
        defines["PLANISH_NARROW"] = int(narrow)
        defines["PLANISH_CLAMP"] = int((node.attributes["low"], node.attributes["high"]) != (-128, 127))
        return Call(
            kernel="mve_depthwise_conv2d",
            sources=(),
            template="mve/depthwise_conv2d.c",
            headers=("mve/depthwise_conv2d.h",),
            defines={k: v for k, v in defines.items() if v},
            fields={
                "in_height": height,
                "in_width": width,
                "channels": channels,
                "out_height": out_height,
                "out_width": out_width,
                "kernel_height": kh,
                "kernel_width": kw,
                "stride_height": shape.stride[0],
                "stride_width": shape.stride[1],
                "pad_top": shape.pads[0],
                "pad_left": shape.pads[1],
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "strip": strip,
            },
            arrays={
                "weight": records(weight[:, 0], weights.folded_bias(node), node.constants["rescale"], words, narrow)
            },
            comments={
                "weight": f"channels {channels}: bias, rescale, a word for every column of the {kh} x {kw} kernel"
            },
            scratch=(strip + odd) * columns * PITCH + in_place * width * CHANNELS,
            overlap=None if in_place else distance,
            in_place=(0,) if in_place else (),
        )


def records(weight: Array, bias: Array, rescale: Array, columns: int, narrow: bool) -> Array:
    """uint32 (channels, words): bias, rescale and the columns' weights, for `weight` int8 (channels, kh, kw)."""
    channels, kh, kw = weight.shape
    codes = np.zeros((channels, columns, ROWS), np.int8)
    codes[:, :kw, :kh] = weight.transpose(0, 2, 1)
    if narrow:  # a halfword a column: rows 0, 2 and 1 from bit 4 on
        halves = np.zeros((channels, COLUMNS), np.uint16)
        for place, row in ((4, 0), (8, 2), (12, 1)):
            halves[:, :columns] |= (codes[:, :, row].astype(np.uint16) & 15) << place
        packed = halves.view(np.uint32)
    else:
        packed = codes.view(np.uint32)[:, :, 0]
    parts = [bias.astype(np.int32)[:, None], rescale.astype(np.float32)[:, None], packed]
    return np.concatenate([p.view(np.uint32) for p in parts], axis=1)
