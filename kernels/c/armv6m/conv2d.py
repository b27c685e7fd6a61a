"""conv2d on Armv6-M: two pixels in one product, requantized without floating point."""

from __future__ import annotations

from typing import ClassVar

from ... import window
from ...op import Call, Node
from .. import overlap
from ..version import Version
from . import pairs, requantize

MOST = 2**15 - 1
"""what a dimension may be: the layer struct holds 16 bits"""


class Conv2d(Version):
    """Dense convolutions whose weights have no zero point."""

    op: ClassVar[str] = "conv2d"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if node.attributes["groups"] != 1 or node.constants["weight_zero_point"].any():
            return None
        if min(node.inputs[0].bits, node.output.bits) != 8:
            return None
        sums = requantize.of(node)
        outputs, depth, kh, kw = node.constants["weight"].shape
        if sums is None:
            return None
        chunks = pairs.best(sums.weight.transpose(0, 2, 3, 1).reshape(outputs, -1), depth)
        if chunks is None:
            return None
        shape = window.of(node)
        _, _, height, width = node.inputs[0].shape
        _, _, rows, columns = node.output.shape
        if max(height, width, depth, rows, columns, outputs, chunks.count) > MOST:
            return None
        whole = depth % chunks.taps == 0
        padded = shape.kernel != (1, 1) or shape.pads != (0, 0, 0, 0)
        behind = (depth if padded else 0) if whole else 2 * chunks.taps * chunks.count
        return Call(
            kernel="armv6m_conv2d",
            sources=(requantize.SOURCE, "armv6m/convolve.c", "armv6m/expand.c"),
            template="armv6m/conv2d.c",
            headers=("armv6m/conv2d.h",),
            defines={**chunks.defines, **sums.scale.defines},
            fields={
                "in_height": height,
                "in_width": width,
                "in_channels": depth,
                "out_height": rows,
                "out_width": columns,
                "out_channels": outputs,
                **shape.fields(),
                "x_zero_point": node.inputs[0].zero_point,
                "taps": chunks.taps,
                "chunks": chunks.count,
                "pixel_chunks": depth // chunks.taps if whole else 0,
                "behind": behind,
                "scale": sums.scale.initializer,
            },
            arrays={
                "weight": chunks.weight,
                "channel": sums.channel,
                **({} if chunks.extra is None else {"extra": chunks.extra}),
            },
            comments={
                "weight": f"out {outputs}, chunk {chunks.count}, taps {chunks.taps} of kernel {kh} x {kw}, in {depth}; "
                f"{chunks.bits} bits",
                "channel": f"out {outputs}: bias with x_zero_point folded in, word of the rescale",
                "extra": "for every output (chunk, weights)..., 255",
            },
            scratch=chunks.count * (chunks.taps + 1) * 4 + behind,
            overlap=overlap.of_pixels(node, overlap.blocks(rows * columns, 2)),
        )
