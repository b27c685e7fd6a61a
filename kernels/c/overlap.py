"""How far before its input a kernel's output may begin (`Call.overlap`), from the order in which the kernel reads and writes.

A kernel works in blocks, writes the output in ascending order, and writes a block's outputs after it has read the block's
inputs. With the output d bytes before the input, output byte b lies at input byte b - d. So nothing is lost when after every
block

    written - d <= needed        written: end of the output so far; needed: first input byte that is still to be read

and the least d is the maximum of written - needed over all blocks, or 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .. import window
from ..op import Array, Node, Tensor

Int64 = npt.NDArray[np.int64]


def least(written: Array | Sequence[int], needed: Array | Sequence[int]) -> int:
    """The least d (bytes, 0 or more): for every block the end of what is written, and the first input byte needed later."""
    lag = np.asarray(written, np.int64) - np.asarray(needed, np.int64)
    return max(0, int(lag.max(initial=0)))


def of_pixels(node: Node, ends: Array | Sequence[int]) -> int:
    """The least d of a window op, channels last: a block's windows are read completely before its outputs are written.

    `ends`: for every block, in order, the number of output pixels (row-major) that are done after it.
    """
    done = np.asarray(ends, np.int64)
    outputs = node.output.shape[1]
    return least([_end(node.output, int(n) * outputs) for n in done], needed(node)[done])


def of_pixels_read_late(node: Node, ends: Array | Sequence[int]) -> int:
    """The same for a kernel that reads a block's windows until the block's last output is written."""
    done = np.asarray(ends, np.int64)
    begins = np.concatenate([[0], done[:-1]])
    return least([_end(node.output, int(n) * node.output.shape[1]) for n in done], needed(node)[begins])


def of_rows(node: Node) -> int:
    """The least d of an op on rows of the last dimension: a row is read until its last output is written."""
    rows = np.arange(node.inputs[0].size // node.inputs[0].shape[-1], dtype=np.int64)
    depth, outputs = node.inputs[0].shape[-1], node.output.shape[-1]
    x = node.inputs[0]
    return least([_end(node.output, int(r + 1) * outputs) for r in rows], rows * depth * x.bits // 8)


def blocks(pixels: int, block: int) -> Int64:
    """`ends` of blocks of `block` pixels each, the last one with what is left."""
    return np.minimum(np.arange(block, pixels + block, block, dtype=np.int64), pixels)


def needed(node: Node) -> Int64:
    """(pixels + 1,) the first input byte that the windows of output pixels p, p + 1, ... read; the input's size where none."""
    shape, x = window.of(node), node.inputs[0]
    _, channels, height, width = x.shape
    rows = _first(node.output.shape[2], shape.kernel[0], shape.stride[0], shape.dilation[0], shape.pads[0], height)
    columns = _first(node.output.shape[3], shape.kernel[1], shape.stride[1], shape.dilation[1], shape.pads[1], width)
    element = (rows[:, None] * width + columns[None, :]) * channels  # (out_h, out_w)
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    found = np.full(element.size + 1, x.bytes, np.int64)
    found[:-1] = np.where(inside, element * x.bits // 8, x.bytes).reshape(-1)
    return np.minimum.accumulate(found[::-1])[::-1]


def _first(outputs: int, kernel: int, stride: int, dilation: int, pad: int, size: int) -> Int64:
    """(outputs,) the first position inside the input that a window's taps read along one axis; `size` where all are outside."""
    start = np.arange(outputs, dtype=np.int64) * stride - pad
    tap = np.maximum(-(start // dilation), 0)  # the first with start + tap * dilation >= 0
    position = start + tap * dilation
    return np.where((tap < kernel) & (position < size), position, size)


def _end(tensor: Tensor, elements: int) -> int:
    """Bytes that hold the first `elements` codes."""
    return -(-elements * tensor.bits // 8)
