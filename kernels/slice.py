"""Slice: a box of the input, with steps. A copy in the order of memory."""

from __future__ import annotations

import numpy as np

from . import integer, layout
from .op import Array, Call, FloatOp, Node, Op, Unsupported
from .parsing import integers, only, tables


class Slice(Op):
    """Slice with constant bounds; steps may be negative. The batch stays whole."""

    onnx_types = ("Slice",)
    packed = True

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        rank = len(x.shape)
        starts, ends = integers(node, "starts", 1), integers(node, "ends", 2)
        if starts is None or ends is None or len(starts) != len(ends):
            raise Unsupported("its starts and ends are missing or differ in length")
        axes = integers(node, "axes", 3) or list(range(len(starts)))
        steps = integers(node, "steps", 4) or [1] * len(starts)
        if rank > layout.MOST_DIMENSIONS + 1:
            raise Unsupported(f"it has {rank} dimensions; up to {layout.MOST_DIMENSIONS + 1} are supported")
        first, step = [0] * rank, [1] * rank
        for a, begin, end, by in zip(axes, starts, ends, steps, strict=True):
            if by == 0:
                raise Unsupported("a step is 0")
            size = x.shape[a % rank]
            # ONNX counts negative bounds from the end once, and then clamps them
            low, high = (0, size) if by > 0 else (-1, size - 1)
            first[a % rank], last = (int(np.clip(v + size if v < 0 else v, low, high)) for v in (begin, end))
            kept = len(range(first[a % rank], last, by))
            if kept != node.output.shape[a % rank]:
                raise Unsupported(f"axis {a} keeps {kept} elements; its output has shape {node.output.shape}")
            step[a % rank] = by
        if x.shape[0] != node.output.shape[0] or step[0] != 1:
            raise Unsupported("it slices the batch")
        if node.output.size == 0:
            raise Unsupported("it keeps no element")
        return Node("slice", node.name, (x,), node.output, {"first": tuple(first), "step": tuple(step)}, tables(node))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs
        a = node.attributes
        for axis in range(1, x.ndim):
            index = a["first"][axis] + a["step"][axis] * np.arange(node.output.shape[axis])
            x = x.take(index, axis)
        return integer.look_up(x, node.constants.get("table"))

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        x, a = node.inputs[0], node.attributes
        box = layout.block(x.shape, x.bits, a["first"], node.output.shape)
        if box is not None and set(a["step"]) == {1} and not node.constants:
            return layout.copy_block(node.output.shape[2], box[1], (box[0], box[2]), (0, box[1]))
        strides = layout.strides(x.shape)
        offset = sum(f * s for f, s in zip(a["first"], strides, strict=True))
        return layout.strided_copy(node, offset, [t * s for t, s in zip(a["step"], strides, strict=True)])

    def view(self, node: Node) -> int | None:
        """See Op. Only where attribute `view` asks for it: the whole input then lives as long as the slice does."""
        x, a = node.inputs[0], node.attributes
        box = layout.block(x.shape, x.bits, a["first"], node.output.shape)
        if not a.get("view") or box is None or set(a["step"]) != {1} or node.constants:
            return None
        begin, width, stride = box
        return begin if width == stride and begin % layout.ALIGNMENT == 0 else None
