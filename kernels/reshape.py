"""Reshape, Flatten, Squeeze, Unsqueeze: the same codes in ONNX order under another shape.

In the C layout (channels last) a copy is needed only where that order differs, for example to flatten (1, c, h, w)
with c and h * w above 1. Codes are rescaled by a table where input and output differ in quantization.
"""

from __future__ import annotations

import math

from . import integer, lookup
from .op import Array, Call, FloatOp, Node, Op, Unsupported
from .parsing import only, tables


class Reshape(Op):
    """Reshape, Flatten, Squeeze, Unsqueeze."""

    onnx_types = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. The target shape is the output's."""
        x = only(node)
        if x.size != node.output.size:
            raise Unsupported(f"shape {x.shape} cannot become {node.output.shape}")
        if not x.shape or not node.output.shape or x.shape[0] != 1 or node.output.shape[0] != 1:
            raise Unsupported(f"shape {x.shape} to {node.output.shape}; the first dimension must stay the batch")
        return Node("reshape", node.name, (x,), node.output, {}, tables(node))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs
        return integer.look_up(x, node.constants.get("table")).reshape(len(x), *node.output.shape[1:])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        if _plain(node.inputs[0].shape, node.output.shape):
            return lookup.call(node)
        x, y = _image(node.inputs[0].shape), _image(node.output.shape)
        return Call(
            kernel="reshape",
            sources=("reshape.c",),
            fields={
                "in_channels": x[0],
                "in_pixels": x[1],
                "out_channels": y[0],
                "out_pixels": y[1],
            },
            arrays=dict(node.constants),
            comments={"table": "new code for every code from -128 on"},
        )

    def alias(self, node: Node) -> bool:
        """See Op."""
        return "table" not in node.constants and _plain(node.inputs[0].shape, node.output.shape)


def _image(shape: tuple[int, ...]) -> tuple[int, int]:
    """(channels, pixels) whose channels-last order is the order of memory; other ranks count as one pixel row."""
    return (shape[1], shape[2] * shape[3]) if len(shape) == 4 else (math.prod(shape), 1)


def _plain(x: tuple[int, ...], y: tuple[int, ...]) -> bool:
    """Whether the codes already lie in the output's order."""
    transposed = [_image(s) for s in (x, y) if len(s) == 4 and s[1] > 1 and s[2] * s[3] > 1]
    return not transposed or (len(transposed) == 2 and transposed[0] == transposed[1])
