"""`Paste`: a block of a map, put into its place in the map. The other elements stay, and are undefined before the first block.

ONNX has no such op: patch-based execution (export/patches.py) computes a map block by block. In C the output is the memory of the
map before it, of which the block's rows are written; a block of whole rows can be computed where it belongs, and then no code runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from . import layout
from .op import Array, Call, FloatOp, Node, Op, Unsupported


class Paste(Op):
    """Inputs: the block (1, c, rows, columns), and the map before it (1, c, h, w), which the first block has not.

    Attribute `first`: the map's row and column of the block's first pixel.
    """

    onnx_types: ClassVar[tuple[str, ...]] = ()
    packed = True

    def parse(self, node: FloatOp) -> Node | None:
        """Never: no ONNX node means this."""
        return None

    def reference(self, node: Node, *inputs: Array) -> Array:
        """int8 codes (n, c, h, w) of the map with the block in it."""
        block, before = inputs[0], inputs[1:]
        shape = (len(block), *node.output.shape[1:])
        y = before[0].copy() if before else np.zeros(shape, np.int8)
        row, column = node.attributes["first"]
        y[:, :, row : row + block.shape[2], column : column + block.shape[3]] = block
        return y

    def macs(self, node: Node) -> int:
        """None."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        box = _box(node)
        if box is None:
            raise Unsupported(f"its rows of {node.output.bits}-bit codes do not begin and end on whole bytes")
        begin, width, stride = box
        copy = layout.copy_block(node.inputs[0].shape[2], width, (0, width), (begin, stride))
        return replace(copy, updates=1 if len(node.inputs) > 1 else None)


def inside(node: Node) -> int | None:
    """Where the block can be computed inside the map: its first byte, when it is a run of whole rows at an aligned address."""
    box = _box(node)
    if box is None or box[1] != box[2] or box[0] % layout.ALIGNMENT:
        return None
    return box[0]


def _box(node: Node) -> tuple[int, int, int] | None:
    return layout.block(node.output.shape, node.output.bits, (0, 0, *node.attributes["first"]), node.inputs[0].shape)
