"""Depthwise convolution: every group has one input channel; output channel c * m + j reads input channel c (m the multiplier).

The arithmetic is conv2d's, and equals ONNX Runtime's QLinearConv bit for bit. The C kernel keeps channels innermost,
in blocks, and leaves out the padded taps: pixels whose window lies inside the image use the folded bias, the others
subtract the zero point from every input.
"""

from __future__ import annotations

import numpy as np

from . import conv2d, weights, window
from .c import overlap
from .op import Array, Call, FloatOp, Node, Op


class DepthwiseConv2d(Op):
    """Conv with as many groups as input channels."""

    onnx_types = ("Conv",)
    packed = True

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. Weight (channels * multiplier, 1, kh, kw)."""
        return conv2d.parse(node, "depthwise_conv2d") if conv2d.is_depthwise(node) else None

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs  # (n, c, h, w)
        weight = weights.centred(node.constants)  # (c * m, 1, kh, kw)
        shape = window.of(node)
        centred = x.astype(np.int32) - node.inputs[0].zero_point
        multiplier = len(weight) // x.shape[1]
        total = np.zeros((len(x), *node.output.shape[1:]), np.int32)
        for tap, w in zip(window.taps(centred, shape, 0), weight.reshape(len(weight), -1).T, strict=True):
            total += np.repeat(tap, multiplier, axis=1) * w.astype(np.int32)[:, None, None]
        total += node.constants["bias"][:, None, None]
        return conv2d.requantize(node, total.transpose(0, 2, 3, 1))

    def macs(self, node: Node) -> int:
        """See Op. Taps in the padding count."""
        kh, kw = window.of(node).kernel
        return node.output.size * kh * kw

    def call(self, node: Node) -> Call:
        """See Op."""
        weight = node.constants["weight"]  # (c * m, 1, kh, kw)
        outputs, _, kh, kw = weight.shape
        _, channels, height, width = node.inputs[0].shape
        _, _, rows, columns = node.output.shape
        return Call(
            kernel="depthwise_conv2d",
            sources=("depthwise_conv2d.c",),
            fields={
                "in_height": height,
                "in_width": width,
                "in_channels": channels,
                "out_height": rows,
                "out_width": columns,
                "multiplier": outputs // channels,
                **window.of(node).fields(),
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "x_bits": node.inputs[0].bits,
                "y_bits": node.output.bits,
            },
            arrays={
                "weight": np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0)),
                "bias": node.constants["bias"],
                "folded_bias": weights.folded_bias(node),
                "rescale": node.constants["rescale"],
                **weights.optional_zero_point(node.constants),
            },
            comments={
                "weight": f"kernel {kh} x {kw}, out {outputs}",
                "bias": f"out {outputs}",
                "folded_bias": f"out {outputs}; with x_zero_point folded in, for whole windows",
                "rescale": f"out {outputs}; x_scale * w_scale / y_scale",
            },
            overlap=overlap.of_pixels_read_late(node, overlap.blocks(rows * columns, 1)),
        )
