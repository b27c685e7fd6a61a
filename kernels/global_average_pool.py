"""Mean over all pixels of a channel: GlobalAveragePool, and ReduceMean over height and width.

    y = requantize(sum(x - x_zp), float32(x_scale / float32(y_scale * pixels)))

Equal to ONNX Runtime's QLinearGlobalAveragePool bit for bit. ReduceMean has no integer kernel there: its float result differs by at most 1 code.
"""

from __future__ import annotations

import numpy as np

from . import integer
from .op import Array, Call, FloatOp, Node, Op, Unsupported
from .parsing import clamp, four, integers, only


class GlobalAveragePool(Op):
    """GlobalAveragePool, ReduceMean over the last two axes of four."""

    onnx_types = ("GlobalAveragePool", "ReduceMean")

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        _, channels, height, width = four(x, "its input")
        if node.type == "ReduceMean":
            axes = sorted(a % 4 for a in integers(node, "axes", 1) or [])
            if axes != [2, 3]:
                raise Unsupported(f"mean over axes {axes}; [2, 3] (height and width) is supported")
        if node.output.shape not in ((1, channels, 1, 1), (1, channels)):
            raise Unsupported(f"its output has shape {node.output.shape}; (1, {channels}[, 1, 1]) is expected")
        if height * width >= 1 << 23:
            raise Unsupported(f"{height} x {width} pixels; fewer than 8388608 are supported")
        return Node("global_average_pool", node.name, (x,), node.output, clamp(node))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs  # (n, c, h, w)
        total = (x.astype(np.int32) - node.inputs[0].zero_point).sum(axis=(2, 3), dtype=np.int64)
        a = node.attributes
        y = integer.requantize(total, factor(node), node.output.zero_point, a["low"], a["high"])
        return y.reshape(len(x), *node.output.shape[1:])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        _, channels, height, width = node.inputs[0].shape
        return Call(
            kernel="global_average_pool",
            sources=("global_average_pool.c",),
            fields={
                "pixels": height * width,
                "channels": channels,
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "rescale": float(factor(node)),
            },
            arrays={},
            overlap=0,
        )


def factor(node: Node) -> np.float32:
    """float32(x_scale / float32(y_scale * pixels))."""
    _, _, height, width = node.inputs[0].shape
    return node.inputs[0].scale / (node.output.scale * np.float32(height * width))
