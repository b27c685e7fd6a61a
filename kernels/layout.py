"""Where the elements of a tensor lie in the C code: four-dimensional ones channels last, all others as in ONNX."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .op import Array, Call, Node

MOST_DIMENSIONS = 6
"""dimensions, without the batch, that the copying kernels count"""

CHANNELS_LAST = (0, 2, 3, 1)


def order(rank: int) -> tuple[int, ...]:
    """ONNX axes in the order of memory, outermost first."""
    return CHANNELS_LAST if rank == 4 else tuple(range(rank))


def memory_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions in the order of memory."""
    return tuple(shape[a] for a in order(len(shape)))


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """For each ONNX axis, the elements between neighbours in memory."""
    found = [0] * len(shape)
    step = 1
    for a in reversed(order(len(shape))):
        found[a] = step
        step *= shape[a]
    return tuple(found)


def to_memory(x: Array) -> Array:
    """An ONNX-shaped array (n, ...) as the C code holds it, flat per sample: (n, size)."""
    return x.transpose(order(x.ndim)).reshape(len(x), -1)


def strided_copy(node: Node, offset: int, steps: Sequence[int]) -> Call:
    """The C call that fills the output from input elements `steps` apart along each of the output's ONNX axes."""
    axes = order(len(node.output.shape))[1:]
    return Call(
        kernel="strided_copy",
        sources=("strided_copy.c",),
        fields={"dimensions": len(axes), "offset": offset},
        arrays={
            "sizes": np.array([node.output.shape[a] for a in axes], np.int32),
            "strides": np.array([steps[a] for a in axes], np.int32),
            **node.constants,
        },
        comments={
            "sizes": "of the output, outermost first",
            "strides": "in the input",
            "table": "new code for every code from -128 on",
        },
    )
