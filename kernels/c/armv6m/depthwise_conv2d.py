"""depthwise_conv2d on Armv6-M: two pixels of a row in one product, requantized without floating point.

One channel after another, so that the channel's weights stay at hand; the output may therefore lie in the input's place when both
have one size. Where the image's columns are longer than its rows, they take the rows' part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import weights, window
from ...op import Array, Call, Node
from ..version import Version
from . import pairs, requantize

MOST_TAPS = 5
"""of a kernel, in either direction"""
MOST_SCRATCH = 4096
"""bytes of rows"""
MOST = 2**15 - 1
"""what a dimension may be: the layer struct holds 16 bits"""
ROW_COST, PAIR_COST, PIXEL_COST = 110, 110, 8
"""instructions for a row of outputs, two outputs and an input, about"""


class DepthwiseConv2d(Version):
    """Multiplier 1, kernels up to 5 x 5, stride 1 or 2 along one direction, weights without zero points."""

    op: ClassVar[str] = "depthwise_conv2d"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        shape = window.of(node)
        weight = node.constants["weight"]  # (c, 1, kh, kw)
        channels = node.inputs[0].shape[1]
        if len(weight) != channels or node.constants["weight_zero_point"].any() or shape.dilation != (1, 1):
            return None
        if min(node.inputs[0].bits, node.output.bits) != 8 or max(shape.kernel) > MOST_TAPS:
            return None
        sums = requantize.of(node)
        possible = [g for g in (_geometry(node, False), _geometry(node, True)) if g.possible]
        if sums is None or not possible or channels > MOST:
            return None
        g = min(possible, key=lambda g: g.cost)
        kernel = sums.weight[:, 0].transpose(0, 2, 1) if g.turned else sums.weight[:, 0]  # (c, kh, kw)
        if not _pairs_fit(kernel):
            return None
        width = weights.bits(kernel)
        return Call(
            kernel="armv6m_depthwise_conv2d",
            sources=(requantize.SOURCE, "armv6m/depthwise.c"),
            template="armv6m/depthwise_conv2d.c",
            headers=("armv6m/depthwise_conv2d.h",),
            defines={
                "KERNEL_ROWS": g.kernel[0],
                "KERNEL_COLUMNS": g.kernel[1],
                "COLUMN_STRIDE": g.stride[1],
                **sums.scale.defines,
            },
            fields={
                "channels": channels,
                "in_rows": g.size[0],
                "in_columns": g.size[1],
                "out_rows": g.out[0],
                "out_columns": g.out[1],
                "kernel_rows": g.kernel[0],
                "kernel_columns": g.kernel[1],
                "pad_rows": g.pads[0],
                "pad_columns": g.pads[1],
                "row_stride": g.stride[0],
                "column_stride": g.stride[1],
                "weight_bits": width,
                "x_zero_point": node.inputs[0].zero_point,
                "in_row_step": g.steps[0],
                "in_column_step": g.steps[1],
                "out_row_step": g.out_steps[0],
                "out_column_step": g.out_steps[1],
                "scale": sums.scale.initializer,
            },
            arrays={"weight": pack(kernel.reshape(channels, -1), width), "channel": sums.channel},
            comments={
                "weight": f"channels {channels}, kernel {g.kernel[0]} x {g.kernel[1]}, {width} bits",
                "channel": f"channels {channels}: bias with x_zero_point folded in, word of the rescale",
            },
            scratch=g.scratch,
            in_place=(0,) if node.inputs[0].shape == node.output.shape and shape.stride == (1, 1) and g.early else (),
        )


@dataclass(frozen=True)
class _Geometry:
    """The window as the kernel sees it: pairs are (rows, columns). Turned: the image's columns are its rows."""

    turned: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int]
    size: tuple[int, int]
    out: tuple[int, int]
    steps: tuple[int, int]
    out_steps: tuple[int, int]

    @property
    def row_words(self) -> int:
        """Words of a row in scratch: pairs of outputs begin 2 * stride apart, and as many as the stride lie before."""
        return ((self.out[1] + 1) // 2 - 1) * 2 * self.stride[1] + self.kernel[1] + self.stride[1]

    @property
    def scratch(self) -> int:
        """Bytes of the kernel's rows and one of padding."""
        return (self.kernel[0] + 1) * self.row_words * 4

    @property
    def possible(self) -> bool:
        """Whether the code takes it."""
        rows = max(*self.size, *self.out, *self.pads, *self.stride)
        return self.stride[1] <= 2 and self.scratch <= MOST_SCRATCH and rows <= MOST

    @property
    def early(self) -> bool:
        """Whether a row of the input has been read when the output's row of the same number is written."""
        return self.pads[0] < self.kernel[0]

    @property
    def cost(self) -> int:
        """Instructions, about."""
        pairs_ = (self.out[1] + 1) // 2
        return self.out[0] * (ROW_COST + pairs_ * PAIR_COST) + self.size[0] * self.size[1] * PIXEL_COST


def _geometry(node: Node, turned: bool) -> _Geometry:
    shape = window.of(node)
    _, channels, height, width = node.inputs[0].shape
    _, _, out_height, out_width = node.output.shape

    def pair(rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if turned else (rows, columns)

    return _Geometry(
        turned,
        pair(*shape.kernel),
        pair(*shape.stride),
        pair(*shape.pads[:2]),
        pair(height, width),
        pair(out_height, out_width),
        pair(width * channels, channels),
        pair(out_width * channels, channels),
    )


def _pairs_fit(kernel: Array) -> bool:
    """Whether two products can always be summed within 16 bits: with two weights of -128 side by side they cannot."""
    columns = np.pad(kernel.astype(np.int16), ((0, 0), (0, 0), (0, 1)))
    return all(pairs.fits(columns[:, :, i : i + 2]).all() for i in range(kernel.shape[2]))


def pack(rows: Array, width: int) -> Array:
    """uint8: codes (n, k) in `width` bits each, the first in the lowest bits, every row in whole bytes."""
    per_byte = 8 // width
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per_byte))).astype(np.int64) & ((1 << width) - 1)
    grouped = padded.reshape(len(rows), -1, per_byte) << np.arange(0, 8, width)
    return grouped.sum(axis=2).astype(np.uint8)
