"""Depthwise convolution with SMLAD: rows of four channels at a time in a small work memory, two taps an instruction.

Multiplier 1, no weight zero points, no dilation. Two orders of work. With row stride 1 four channels of the whole image come
before the next four: every row is brought in once, and the output may lie in the input's place, whose bytes are then read
already. With a larger stride it goes row by row with all channels, so that the output may follow the input's rows that
are done with.
"""

from __future__ import annotations

import numpy as np

from ... import weights, window
from ...op import Array, Call, Node
from .. import multiplier, overlap
from ..version import Version

GROUP = 4
"""channels at a time"""
ROW_BYTES = (56, 104)
"""lengths of work rows that the code is compiled for; longer ones are a multiple of 64. Few, so that layers share code"""
LONGEST = 2048
"""bytes of a work row at most"""
RECORD_BYTES = 32
"""of a channel's record in the work memory (channel_t), before its weights"""

SCALE = {8: 1, 4: 4, 2: 16}
"""what weights of a width are multiplied by: the factors of narrow ones would be too large for a multiplier below 2^31"""


class DepthwiseConv2d(Version):
    """3 x 3 in assembly, other kernels in C on the same rows."""

    op = "depthwise_conv2d"
    features = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        shape = window.of(node)
        weight = node.constants["weight"]  # (c, 1, kh, kw)
        channels = node.inputs[0].shape[1]
        bits = node.inputs[0].bits, node.output.bits
        if (
            len(weight) != channels
            or node.constants["weight_zero_point"].any()
            or shape.dilation != (1, 1)
            or (min(bits) < 8 and channels % GROUP)
            or not _in_reach(node)
        ):
            return None
        rows_first = shape.stride[0] > 1
        both = [_Geometry(node, False), _Geometry(node, True)]
        found = [g for g in both if g.possible and (not g.turned if rows_first else g.stride[0] == 1)]
        if not found:
            return None
        g = min(found, key=lambda g: g.cost)
        kh, kw = g.kernel
        turns = kh if rows_first else 2 * kh - 1
        scratch = GROUP * (kh * g.row_bytes + RECORD_BYTES + 4 * turns * max(kw - 1, 1))
        scratch += 0 if bits[1] == 8 else GROUP * g.out[1]
        kernel = weight[:, 0].transpose(0, 2, 1) if g.turned else weight[:, 0]  # (c, kh, kw)
        width = weights.bits(weight)
        scale = SCALE[width]
        bias = weights.folded_bias(node) * np.int32(scale)
        rescale = node.constants["rescale"] / np.float32(scale)
        low, high = node.attributes["low"], node.attributes["high"]
        largest = (1 << bits[1] - 1) - 1
        return Call(
            kernel="dsp_depthwise_conv2d",
            sources=(),
            fields={
                **g.fields(),
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": low,
                "high": high,
            },
            arrays={
                "weight": pack(kernel.reshape(channels, -1), width),
                "bias": bias,
                "factor": multiplier.words(rescale, *_sums(kernel * scale, bias), node.output.zero_point, low, high),
            },
            comments={
                "weight": f"groups of 4 channels, kernel {kh} x {kw}{' (columns first)' if g.turned else ''}, {width} bits",
                "bias": f"channels {channels}; with x_zero_point folded in",
                "factor": f"channels {channels}; x_scale * w_scale / y_scale times 2^32, or a float's bits and the top bit",
            },
            scratch=scratch,
            template="dsp/depthwise_conv2d.c",
            defines={
                "KERNEL_HEIGHT": kh,
                "KERNEL_WIDTH": kw,
                "COLUMN_STRIDE": g.stride[1],
                "ROW_BYTES": g.row_bytes,
                "WEIGHT_BITS": width,
                "X_BITS": bits[0],
                "Y_BITS": bits[1],
                "WORDS": int(channels % GROUP == 0),
                "ROWS_FIRST": int(rows_first),
                "SATURATE": {(-largest - 1, largest): 0, (0, largest): 1}.get((low, high), 2),
            },
            headers=("dsp/depthwise_conv2d.h",),
            overlap=_overlap(node) if rows_first else None,
            in_place=(0,) if not rows_first and _same_place(node) and g.pads[0] < kh else (),
        )


class _Geometry:
    """The window as the kernel sees it; turned: the image's columns are its rows."""

    def __init__(self, node: Node, turned: bool) -> None:
        shape = window.of(node)
        _, channels, height, width = node.inputs[0].shape
        _, _, out_height, out_width = node.output.shape
        order = slice(None, None, -1 if turned else 1)
        self.turned = turned
        self.channels = channels
        self.kernel = shape.kernel[order]
        self.stride = shape.stride[order]
        self.pads = shape.pads[:2][order]
        self.size = (height, width)[order]
        self.out = (out_height, out_width)[order]
        bits = node.inputs[0].bits, node.output.bits
        self.steps = tuple(s * bits[0] // 8 for s in (width * channels, channels))[order]
        self.out_steps = tuple(s * bits[1] // 8 for s in (out_width * channels, channels))[order]

    @property
    def row_bytes(self) -> int:
        """Of a work row: the columns that are read, as int16 in whole words."""
        columns = (self.out[1] - 1) * self.stride[1] + self.kernel[1]
        least = -(-columns // 2) * 4
        return next((b for b in ROW_BYTES if b >= least), -(-least // 64) * 64)

    @property
    def possible(self) -> bool:
        """Whether the kernel's code takes it."""
        return self.stride[1] <= 2 and self.row_bytes <= LONGEST

    @property
    def cost(self) -> float:
        """Instructions for a channel, roughly: by its rows, their pairs of outputs, and what has to be brought in."""
        pairs, single = divmod(self.out[1], 2)
        row = 45 + 25 * pairs + 18 * single + 2 * self.stride[0] * self.size[1]
        return row * self.out[0]

    def fields(self) -> dict[str, int]:
        """As members of the layer struct."""
        return {
            "in_rows": self.size[0],
            "in_columns": self.size[1],
            "out_rows": self.out[0],
            "out_columns": self.out[1],
            "channels": self.channels,
            "in_row_step": self.steps[0],
            "in_column_step": self.steps[1],
            "out_row_step": self.out_steps[0],
            "out_column_step": self.out_steps[1],
            "row_stride": self.stride[0],
            "pad_top": self.pads[0],
            "pad_left": self.pads[1],
        }


def pack(weight: Array, width: int) -> Array:
    """uint32 (groups * words,) of weights (channels, taps): for every 4 channels the taps, 4 bytes each, or 2 or 4 taps to a word.

    Narrow codes are moved to 0 and up; tap t * (8 / width) + i lies `i * width` bits up in the bytes of word t.
    """
    channels, taps = weight.shape
    groups, each = -(-channels // GROUP), 8 // width
    codes = np.zeros((groups * GROUP, -(-taps // each) * each), np.int16)
    codes[:channels, :taps] = weight
    codes += 0 if width == 8 else 1 << width - 1
    codes = codes.reshape(groups, GROUP, -1, each)  # (groups, channel, word, tap of it)
    packed = (codes << np.arange(each) * width).sum(axis=3).astype(np.uint8)  # (groups, channel, word)
    return np.ascontiguousarray(packed.transpose(0, 2, 1)).view("<u4").reshape(-1).astype(np.uint32)


def _sums(kernel: Array, bias: Array) -> tuple[Array, Array]:
    """int64 (channels,) twice: the least and the most that sums with the bias can be; kernel (channels, kh, kw)."""
    taps = kernel.reshape(len(bias), -1).astype(np.int64)
    ends = np.stack([-128 * taps, 127 * taps])  # (2, channels, taps)
    return bias + ends.min(axis=0).sum(axis=1), bias + ends.max(axis=0).sum(axis=1)


def _in_reach(node: Node) -> bool:
    """Whether no sum can leave int32, scaled or not, whatever the input: codes are saturated after rounding."""
    weight = node.constants["weight"]
    least, most = _sums(weight[:, 0].astype(np.int64), weights.folded_bias(node).astype(np.int64))
    reach = np.maximum(-least, most) * SCALE[weights.bits(weight)]
    return bool((reach < 2**31).all() and (reach * node.constants["rescale"].astype(np.float64) < 2**30).all())


def _same_place(node: Node) -> bool:
    """Whether every output lies where its channel's input of the same position does."""
    return node.inputs[0].shape == node.output.shape and node.inputs[0].bits == node.output.bits


def _overlap(node: Node) -> int:
    """Bytes by which the output must precede the input: a row of outputs is written before its windows are all read."""
    _, channels, rows, columns = node.output.shape
    row = np.arange(rows)
    return overlap.least((row + 1) * columns * channels * node.output.bits // 8, overlap.needed(node)[row * columns])
