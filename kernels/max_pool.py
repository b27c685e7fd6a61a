"""Largest value of a window: the largest code, since scales are positive. Padding never wins. Exact."""

from __future__ import annotations

import math

import numpy as np

from . import integer, window
from .c import overlap
from .op import Array, Call, FloatOp, Node, Op, Unsupported
from .parsing import flag, four, only, tables


class MaxPool(Op):
    """MaxPool; a change of quantization, and a Relu or Clip behind it, go through a table after the maximum."""

    onnx_types = ("MaxPool",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        four(x, "its input")
        if flag(node.attributes, "storage_order"):
            raise Unsupported("storage_order 1 is not supported")
        shape = window.parse(node, window.kernel(node))
        return Node("max_pool", node.name, (x,), node.output, shape.attributes(), tables(node))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs  # (n, c, h, w)
        y = np.full((len(x), *node.output.shape[1:]), integer.LOW, np.int8)
        for tap in window.taps(x, window.of(node), integer.LOW):
            np.maximum(y, tap, out=y)
        return integer.look_up(y, node.constants.get("table"))

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        return Call(
            kernel="max_pool",
            sources=("max_pool.c",),
            fields=window.pool_fields(node),
            arrays=dict(node.constants),
            comments={"table": "new code for every code from -128 on"},
            overlap=overlap.of_pixels_read_late(node, overlap.blocks(math.prod(node.output.shape[2:]), 1)),
        )
