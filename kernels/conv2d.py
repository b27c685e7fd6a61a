"""Two-dimensional convolution, dense or in groups (depthwise ones are depthwise_conv2d).

    accumulator = bias + sum over the group's channels and taps of (x - x_zp) * (w - w_zp)     padded taps add nothing
    y           = requantize(accumulator, float32(x_scale * w_scale / y_scale))                one factor per output

Equal to ONNX Runtime's QLinearConv bit for bit. The C kernel gathers the window of a pixel into `scratch` (padding filled
with x_zp, so that every tap counts and the zero point folds into the bias) and then multiplies rows of memory.
"""

from __future__ import annotations

import math

import numpy as np

from . import integer, weights, window
from .c import overlap
from .op import Array, Call, Constant, FloatOp, Node, Op, Unsupported
from .parsing import clamp, four, only

CHUNK = 1 << 24
"""elements of gathered windows that the reference holds at a time"""


class Conv2d(Op):
    """Conv with groups == 1, or with groups that are not depthwise."""

    onnx_types = ("Conv",)
    packed = True

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. Weight (out, in / groups, kh, kw)."""
        if is_depthwise(node):
            return None
        return parse(node, "conv2d")

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs  # (n, in, h, w)
        groups = node.attributes["groups"]
        weight = weights.centred(node.constants)  # (out, in / groups, kh, kw)
        depth = weight[0].size
        outputs = len(weight) // groups
        rows, columns = node.output.shape[2:]
        step = max(1, CHUNK // max(1, rows * columns * depth * groups))
        parts: list[Array] = []
        for start in range(0, len(x), step):
            centred = x[start : start + step].astype(np.int16) - np.int16(node.inputs[0].zero_point)
            view = window.patches(centred, window.of(node), 0)  # (n, in, rows, columns, kh, kw)
            view = view.transpose(0, 2, 3, 1, 4, 5).reshape(len(centred) * rows * columns, groups, depth)
            sums = [
                integer.matmul(view[:, g], weight[g * outputs : (g + 1) * outputs].reshape(outputs, depth))
                for g in range(groups)
            ]
            total = np.concatenate(sums, axis=1) + node.constants["bias"]  # (n * rows * columns, out)
            parts.append(total.reshape(len(centred), rows, columns, -1))
        return requantize(node, np.concatenate(parts))

    def macs(self, node: Node) -> int:
        """See Op. Taps in the padding count, as tools that report MACs do."""
        return node.output.size * math.prod(node.constants["weight"].shape[1:])

    def call(self, node: Node) -> Call:
        """See Op."""
        weight = node.constants["weight"]  # (out, in / groups, kh, kw)
        outputs, depth, kh, kw = weight.shape
        shape = window.of(node)
        _, channels, height, width = node.inputs[0].shape
        _, _, rows, columns = node.output.shape
        direct = shape.kernel == (1, 1) and shape.pads == (0, 0, 0, 0) and node.inputs[0].bits == 8
        return Call(
            kernel="pointwise_conv2d" if direct else "conv2d",
            sources=("conv2d.c",),
            fields={
                "in_height": height,
                "in_width": width,
                "in_channels": channels,
                "out_height": rows,
                "out_width": columns,
                "out_channels": outputs,
                "groups": node.attributes["groups"],
                **shape.fields(),
                "x_zero_point": node.inputs[0].zero_point,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "x_bits": node.inputs[0].bits,
                "y_bits": node.output.bits,
            },
            arrays={
                "weight": np.ascontiguousarray(weight.transpose(0, 2, 3, 1)),
                "bias": weights.folded_bias(node),
                "rescale": node.constants["rescale"],
                **weights.optional_zero_point(node.constants),
            },
            comments={
                "weight": f"out {outputs}, kernel {kh} x {kw}, in {depth}",
                "bias": f"out {outputs}; with x_zero_point folded in",
                "rescale": f"out {outputs}; x_scale * w_scale / y_scale",
            },
            scratch=0 if direct else 2 * depth * kh * kw,
            overlap=_overlap(node, direct),
        )


def _overlap(node: Node, direct: bool) -> int | None:
    """See Call. Two pixels at a time; a pixel that is not gathered is read until its last output is written."""
    if node.attributes["groups"] > 1:
        return None  # every group begins at the first pixel again
    ends = overlap.blocks(math.prod(node.output.shape[2:]), 2)
    return overlap.of_pixels_read_late(node, ends) if direct else overlap.of_pixels(node, ends)


def is_depthwise(node: FloatOp) -> bool:
    """Whether every group of a Conv has one input channel (and there are several)."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    groups = int(node.attributes.get("group", 1))
    return isinstance(weight, Constant) and weight.values.ndim == 4 and groups > 1 and weight.values.shape[1] == 1


def parse(node: FloatOp, op: str) -> Node:
    """The node of a Conv for `op`, conv2d or depthwise_conv2d."""
    x = only(node)
    _, channels, _, _ = four(x, "its input")
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(weight, Constant):
        raise Unsupported("its weight is computed; a constant is supported")
    if weight.values.ndim != 4:
        raise Unsupported(f"its weight has {weight.values.ndim} dimensions; 4 are supported")
    outputs, depth, kh, kw = weight.values.shape
    groups = int(node.attributes.get("group", 1))
    if groups < 1 or channels != depth * groups or outputs % groups:
        raise Unsupported(f"its weight {weight.values.shape} and {groups} groups do not fit {channels} input channels")
    shape = window.parse(node, (kh, kw))
    made = Node(
        op=op,
        name=node.name,
        inputs=(x,),
        output=node.output,
        attributes={"groups": groups, **shape.attributes(), **clamp(node)},
        constants=weights.parse(node, x, weight, weight.values, 0, outputs),
    )
    weights.folded_bias(made)  # refuses sums that do not fit
    return made


def requantize(node: Node, accumulator: Array) -> Array:
    """Codes (n, out, rows, columns) of accumulators (n, rows, columns, out)."""
    a = node.attributes
    y = integer.requantize(accumulator, node.constants["rescale"], node.output.zero_point, a["low"], a["high"])
    return np.ascontiguousarray(y.transpose(0, 3, 1, 2))
