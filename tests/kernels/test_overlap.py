"""How far an output may lie before its input, against counting every byte that a window reads."""

from __future__ import annotations

from typing import Any

import pytest
from planish.kernels import window
from planish.kernels.c import overlap
from planish.kernels.op import Node


def read_by(node: Node, pixel: int) -> list[int]:
    """Input bytes (the first of each tap) that an output pixel reads."""
    shape, (_, channels, height, width) = window.of(node), node.inputs[0].shape
    row, column = divmod(pixel, node.output.shape[3])
    taps = [
        (
            row * shape.stride[0] - shape.pads[0] + i * shape.dilation[0],
            column * shape.stride[1] - shape.pads[1] + j * shape.dilation[1],
        )
        for i in range(shape.kernel[0])
        for j in range(shape.kernel[1])
    ]
    return [(r * width + c) * channels for r, c in taps if 0 <= r < height and 0 <= c < width]


@pytest.mark.parametrize("op", ["conv2d", "depthwise_conv2d", "max_pool"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_least_distance_loses_no_byte(op: str, block: int, bench: Any) -> None:
    for example in bench.examples(op):
        node = bench.node_of(op, example)
        if op == "max_pool":  # its output may have other codes; only geometry matters here
            assert node.output.shape[1] == node.inputs[0].shape[1]
        outputs, pixels = node.output.shape[1], node.output.size // node.output.shape[1]
        ends = overlap.blocks(pixels, block)
        assert ends[-1] == pixels
        found = overlap.of_pixels(node, ends)

        def safe(distance: int) -> bool:
            later = [read_by(node, p) for p in range(pixels)]  # noqa: B023
            return all(
                end * outputs - distance <= min((b for r in later[end:] for b in r), default=node.inputs[0].bytes)  # noqa: B023
                for end in ends  # noqa: B023
            )

        assert safe(found)
        assert found == 0 or not safe(found - 1)
