"""Convolution with MVE, sixteen products an instruction: three pixels against two outputs, or short windows kept in registers."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ... import window
from ...op import Array, Call, Node
from ...window import Window
from .. import overlap
from ..version import Version
from . import stream

WINDOWS = {1: 4, 2: 2}
"""output pixels that are computed together where windows take one or two vectors (resident.h)"""
LONG_WINDOWS = 3
"""output pixels that are computed together where they take more (windows.h)"""
CONSTANT = 64
"""longest run of bytes that code is compiled for; longer ones gain little"""
SPARE = 16
"""bytes after the windows, into which whole vectors are stored"""


class Conv2d(Version):
    """One group, weights without zero points, activations of 8 bits."""

    op: ClassVar[str] = "conv2d"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu", "mve")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        weight = node.constants["weight"]  # (out, in, kh, kw)
        if (
            node.attributes["groups"] != 1
            or node.constants["weight_zero_point"].any()
            or min(node.inputs[0].bits, node.output.bits) != 8
        ):
            return None
        shape = window.of(node)
        x, y = node.inputs[0].shape[1:], node.output.shape[1:]
        call = call_of(node, weight, shape, (x[0], x[1], x[2]), (y[0], y[1], y[2]))
        ends = overlap.blocks(y[1] * y[2], together(weight))
        late = is_pointwise(shape) and not resident(weight)  # then windows are read again for every four outputs
        return replace(call, overlap=(overlap.of_pixels_read_late if late else overlap.of_pixels)(node, ends))


def call_of(node: Node, weight: Array, shape: Window, x: tuple[int, int, int], y: tuple[int, int, int]) -> Call:
    """The call for `weight` int8 (out, in, kh, kw), without `overlap`; `x` and `y` are (channels, height, width)."""
    outputs, depth, kh, kw = weight.shape
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)  # (out, kh * kw * in)
    steps = resident(weight)
    if steps:
        packed = stream.blocks(node, rows, stream.WINDOW_LEVELS, narrow=False)
        words, form = stream.resident(packed), {"PLANISH_STEPS": steps}
    else:
        packed = stream.blocks(node, rows, stream.WINDOW_LEVELS)
        words, form = stream.windows(packed), _loop(rows.shape[1]) if packed.bits == 8 else {}
    pointwise = is_pointwise(shape)
    return Call(
        kernel="mve_conv2d",
        sources=(),
        template="mve/conv2d.c",
        headers=("mve/conv2d.h",),
        defines={**form, **_windows(shape, depth), **defines(node, packed.bits, outputs)},
        fields={
            "in_height": x[1],
            "in_width": x[2],
            "in_channels": x[0],
            "out_height": y[1],
            "out_width": y[2],
            "out_channels": outputs,
            **shape.fields(),
            "x_zero_point": node.inputs[0].zero_point,
            "y_zero_point": node.output.zero_point,
            "low": node.attributes["low"],
            "high": node.attributes["high"],
            "words": words.size,
        },
        arrays={"weight": words},
        comments={"weight": f"out {outputs}, kernel {kh} x {kw}, in {depth}; packed, with bias and rescale"},
        scratch=0 if pointwise else together(weight) * -(-rows.shape[1] // 4) * 4 + SPARE,
    )


def resident(weight: Array) -> int:
    """Vectors of a window of weights (out, in, kh, kw), when it stays in registers; else 0.

    There every weight takes a byte; two vectors of 2-bit weights would cost more flash than they save time.
    """
    steps = -(-weight[0].size // stream.STEP)
    packed = steps == 2 and int(weight.min()) >= -2 and int(weight.max()) <= 1
    return steps if steps in WINDOWS and len(weight) % stream.BLOCK == 0 and not packed else 0


def together(weight: Array) -> int:
    """Output pixels that are computed together."""
    return WINDOWS.get(resident(weight), LONG_WINDOWS)


def _loop(size: int) -> dict[str, int]:
    """How the loop over windows of `size` codes is cut (windows.h)."""
    if size <= stream.STEP:
        return {}
    steps = size // stream.STEP
    if size % stream.STEP or steps < 3:
        return {"PLANISH_PEEL": 1}
    return {"PLANISH_PEEL": 2 - steps % 2, "PLANISH_UNROLLED": 1}


def _windows(shape: Window, depth: int) -> dict[str, int]:
    """How windows are gathered."""
    if is_pointwise(shape):
        return {"PLANISH_POINTWISE": 1}
    rows, columns = shape.kernel
    run, step = columns * depth, shape.stride[1] * depth
    if columns > 1 and shape.dilation[1] > 1:
        return {"PLANISH_FORM": 0, "PLANISH_DILATED": 1}
    form = 1 if run == 4 else 2 if run < 16 and rows <= 4 else 3 if run <= CONSTANT else 0
    return {"PLANISH_FORM": form, **({"PLANISH_ROWS": rows, "PLANISH_RUN": run, "PLANISH_STEP": step} if form else {})}


def defines(node: Node, bits: int, outputs: int) -> dict[str, int]:
    """What the code of a product is specialised for."""
    clamp = (node.attributes["low"], node.attributes["high"]) != (-128, 127)
    found = {"PLANISH_BITS": bits, "PLANISH_RAGGED": int(outputs % stream.BLOCK != 0), "PLANISH_CLAMP": int(clamp)}
    return {name: value for name, value in found.items() if value}


def is_pointwise(shape: Window) -> bool:
    """Whether a window is a pixel of the input."""
    return shape.kernel == (1, 1) and shape.pads == (0, 0, 0, 0)
