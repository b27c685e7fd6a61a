"""Where the elements of a tensor lie in the C code: four-dimensional ones channels last, all others as in ONNX."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .op import Array, Call, Node

MOST_DIMENSIONS = 6
"""dimensions, without the batch, that the copying kernels count"""

CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)

ALIGNMENT = 4
"""bytes: of every address that kernels are given"""


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


def from_memory(x: Array, shape: tuple[int, ...]) -> Array:
    """The ONNX-shaped array (n, *shape[1:]) of codes (n, size) in the order of memory: the reverse of `to_memory`."""
    return x.reshape(len(x), *memory_shape(shape)[1:]).transpose(np.argsort(order(len(shape))))


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
        overlap=_lag([(node.output.shape[a], steps[a]) for a in axes], offset),
    )


def _lag(loops: Sequence[tuple[int, int]], offset: int) -> int:
    """How far an output must begin before its input when element k, in order, is read at `offset` + its (index, step) sums."""
    read = np.full(1, offset, np.int64)
    for size, step in loops:
        read = (read[:, None] + np.arange(size, dtype=np.int64) * step).reshape(-1)
    later = np.minimum.accumulate(read[::-1])[::-1]  # (elements,) the first that is read from element k on
    return max(0, int((np.arange(1, len(read)) - later[1:]).max(initial=0)))


def block(
    shape: tuple[int, ...], bits: int, first: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[int, int, int] | None:
    """A box (all channels) of a four-dimensional tensor in bytes: (where it begins, its width, from row to row).

    None for any other box, and for one that does not begin and end on whole bytes.
    """
    if len(shape) != 4 or sizes[1] != shape[1]:
        return None
    steps = [s * bits for s in strides(shape)]
    found = first[2] * steps[2] + first[3] * steps[3], sizes[3] * steps[3], steps[2]
    return None if any(b % 8 for b in found) else (found[0] // 8, found[1] // 8, found[2] // 8)


def copy_block(rows: int, width: int, source: tuple[int, int], target: tuple[int, int]) -> Call:
    """The C call that copies `rows` runs of `width` bytes; source and target are (first byte, bytes from row to row)."""
    (x_offset, x_stride), (y_offset, y_stride) = source, target
    return Call(
        kernel="copy_block",
        sources=("copy_block.c",),
        fields={
            "rows": rows,
            "width": width,
            "x_offset": x_offset,
            "x_stride": x_stride,
            "y_offset": y_offset,
            "y_stride": y_stride,
        },
        arrays={},
        overlap=0 if y_offset == 0 and y_stride == width else None,
        first_read=x_offset,
        written=y_offset + (rows - 1) * y_stride + width,
    )
