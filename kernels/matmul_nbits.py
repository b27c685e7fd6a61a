"""Group-quantized matrix products as ONNX Runtime's contributed op MatMulNBits, which keeps its weight packed.

What the CPU kernel of ONNX Runtime 1.31 takes and computes (measured; tests/kernels/test_linear_wna16.py holds it to this):

- blocks of 16, 32, 64, 128 or 256 columns; the last block of a row may be cut short;
- `accuracy_level` 0: x in float. Fast for 4 bits only: other widths are decoded to float on every call, 15 to 40 times slower;
- `accuracy_level` 4: x is rounded to int8 with one scale max |x| / 127 for every block of a token. For 4 and 8 bits with any block, for
  2 bits with blocks of 32, 64 and 128. On x86 it is two to five times faster than level 0 (Arm's kernels may take one scale for a token);
- zero points as packed codes. Float zero points are decoded on every call.

So a weight is written here as follows. A group that is no block is split into blocks that repeat its scale; where no block fits,
a Gather repeats columns of x for which the code equals the zero point, so that they add nothing. Three bits travel in codes of four.
A float zero point is rounded, and what was cut off comes back as a product with the sums of x over the groups. `in_floats` writes a
node of 8 or 2 bits as nodes of 4 bits with the same value, which is how it runs fast at level 0.

Against a float product of the same shape it wins by reading less memory, so most for one token and wide layers: 2048 x 2048 in 0.46
(level 0) and 0.14 (level 4) of the time, 384 x 384 in 1.03 and 0.65. With many tokens the float product is as fast or faster: `slower`
states where (measured on one thread of an x86 core with AVX512-VNNI, blocks of 64).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper

from . import packing
from .fused import Builder

OP, DOMAIN = "MatMulNBits", "com.microsoft"
BLOCKS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}
"""blocks with an integer kernel, by width"""
FLOAT, INT8 = 0, 4
"""the accuracy levels: how x is taken"""


@dataclass(frozen=True)
class Weight:
    """W[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g] for the group g = i // group of column i."""

    bits: int
    codes: np.ndarray
    """(out, in) uint8"""
    scale: np.ndarray
    """(out, groups) float32"""
    zero: np.ndarray | None = None
    """(out, groups) uint8; None: 2^(bits - 1)"""

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.codes.shape[1] // self.scale.shape[1]


def slower(bits: int, level: int, channels: int, rows: float) -> bool:
    """Whether the op takes longer than a float product, for `rows` tokens at a time of `channels` features."""
    if level == FLOAT:
        return channels < 512 or ((rows > 1 or bits == 8) and channels < 2048) or (rows > 1 and bits == 8)
    if bits == 2:
        return (rows >= 4 and channels < 512) or rows >= 64
    return bits == 4 and ((rows >= 4 and channels < 384) or (rows >= 64 and channels < 768))


def write(
    graph: Builder,
    name: str,
    x: str,
    weight: Weight,
    bias: str | None,
    level: int = FLOAT,
    block: int | None = None,
    zero_rest: np.ndarray | None = None,
) -> str:
    """Add y = x W^T + bias to the graph and return the value's name.

    `block` fixes the block size, which must divide the group, for a level whose result depends on it. `zero_rest` (out, groups) float32
    is taken off the zero points: the part of a float zero point that `Weight.zero` cannot hold.
    """
    source, shift = x, None
    if zero_rest is not None:
        shift = np.ascontiguousarray((-zero_rest * weight.scale).T)  # (groups, out)
    weight = _container(graph, name, weight)
    block = block or _block(weight)
    if block is None:
        x, weight, block = _padded(graph, name, x, weight)
    repeats = -(-weight.group // block)
    scale = np.repeat(weight.scale, repeats, axis=1)  # (out, blocks)
    zero = None if weight.zero is None else np.repeat(weight.zero, repeats, axis=1)
    y = _node(graph, name, x, Weight(weight.bits, weight.codes, scale, zero), block, bias, level)
    if shift is None:
        return y
    sums = group_sums(graph, name, source, shift.shape[0])  # (..., groups)
    rest = graph.one("MatMul", [sums, graph.constant(f"{name}.weight_zero_rest", shift)], f"{name}.zero_rest")
    return graph.one("Add", [y, rest], f"{name}.sum")


def split_groups(graph: Builder, name: str, x: str, groups: int) -> str:
    """(..., in) as (..., groups, in // groups)."""
    lead = graph.one("Shape", [x], f"{name}.lead", end=-1)
    tail = graph.constant(f"{name}.groups", np.array([groups, -1], np.int64))
    return graph.one(
        "Reshape", [x, graph.one("Concat", [lead, tail], f"{name}.grouped_shape", axis=0)], f"{name}.grouped"
    )


def group_sums(graph: Builder, name: str, x: str, groups: int) -> str:
    """Sums of x (..., in) over each group: (..., groups)."""
    axis = graph.constant(f"{name}.last", np.array([-1], np.int64))
    return graph.one("ReduceSum", [split_groups(graph, name, x, groups), axis], f"{name}.group_sums", keepdims=0)


def in_floats(graph: Builder, node: onnx.NodeProto) -> str:
    """A node of 8 or 2 bits, as nodes of 4 bits that take x in floats without decoding; returns the value's name.

    8 bits: with code = 16 h + l and zero point = 16 u + v, (code - zero point) = 16 (h - u) + (l - v), and two nodes add up. They hold
    the same bytes. 2 bits: the codes stand in 4 bits, twice the bytes.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    block, bits, channels = attributes["block_size"], attributes["bits"], attributes["K"]
    codes = packing.unpack(torch.from_numpy(graph.value(node.input[1]).copy()), bits, block).numpy()[:, :channels]
    scale = graph.value(node.input[2])  # (out, blocks)
    zero = None
    if len(node.input) > 3 and node.input[3]:
        packed = torch.from_numpy(graph.value(node.input[3]).copy())[:, None]  # (out, 1, bytes)
        zero = packing.unpack(packed, bits, scale.shape[1]).numpy()
    bias = node.input[5] if len(node.input) > 5 and node.input[5] else None
    if bits == 2:
        return _node(graph, node.name, node.input[0], _in_four(Weight(2, codes, scale, zero)), block, bias, FLOAT)
    zero = np.full(scale.shape, 128, np.uint8) if zero is None else zero
    high, low = Weight(4, codes >> 4, scale * np.float32(16), zero >> 4), Weight(4, codes & 15, scale, zero & 15)
    parts = [
        _node(graph, f"{node.name}.high", node.input[0], high, block, bias, FLOAT),
        _node(graph, f"{node.name}.low", node.input[0], low, block, None, FLOAT),
    ]
    return graph.one("Add", parts, node.name)


def _in_four(weight: Weight) -> Weight:
    """The weight in codes of 4 bits; without zero points the codes move, so that 8 stands for zero."""
    if weight.zero is None:
        return Weight(4, weight.codes + np.uint8(8 - (1 << (weight.bits - 1))), weight.scale)
    return Weight(4, weight.codes, weight.scale, weight.zero)


def _container(graph: Builder, name: str, weight: Weight) -> Weight:
    """The weight in a width that MatMulNBits has for its groups."""
    if weight.bits in (4, 8) or (weight.bits == 2 and _block(weight) is not None):
        return weight
    extra = weight.codes.size * (4 - weight.bits) // 8
    graph.note(
        name, f"its {weight.bits}-bit codes are stored in 4 bits, which ONNX Runtime can read ({extra} bytes more)"
    )
    return _in_four(weight)


def _block(weight: Weight) -> int | None:
    """The largest block that divides the group; for one group a row, the one with the fewest bytes. None when none fits."""
    sizes = BLOCKS[weight.bits]
    if weight.scale.shape[1] == 1:
        return min(sizes, key=lambda b: (-(-weight.group // b) * (b * weight.bits // 8 + 4), -b))
    return max((b for b in sizes if weight.group % b == 0), default=None)


def _padded(graph: Builder, name: str, x: str, weight: Weight) -> tuple[str, Weight, int]:
    """Groups filled up to a multiple of 16 columns; the new ones read the group's first column of x and weigh nothing."""
    out, groups, group = len(weight.codes), weight.scale.shape[1], weight.group
    size = -(-group // 16) * 16
    columns = np.arange(size)
    index = (np.arange(groups)[:, None] * group + np.where(columns < group, columns, 0)).reshape(-1)  # (groups * size,)
    zero = np.full(weight.scale.shape, 1 << (weight.bits - 1), np.uint8) if weight.zero is None else weight.zero
    codes = np.broadcast_to(zero[..., None], (out, groups, size)).copy()
    codes[..., :group] = weight.codes.reshape(out, groups, group)
    extra = out * groups * (size - group) * weight.bits // 8
    graph.note(
        name,
        f"its groups of {group} are filled up to {size}, a multiple of 16 that ONNX Runtime takes ({extra} bytes more)",
    )
    x = graph.one("Gather", [x, graph.constant(f"{name}.columns", index.astype(np.int64))], f"{name}.filled", axis=-1)
    wider = Weight(weight.bits, codes.reshape(out, -1), weight.scale, weight.zero)
    return x, wider, max(b for b in BLOCKS[weight.bits] if size % b == 0)


def _node(graph: Builder, name: str, x: str, weight: Weight, block: int, bias: str | None, level: int) -> str:
    """One MatMulNBits; the weight's groups are blocks, the last of which may be short."""
    out, channels = weight.codes.shape
    count = weight.scale.shape[1]
    codes = torch.from_numpy(np.pad(weight.codes, ((0, 0), (0, count * block - channels))))  # (out, count * block)
    inputs = [
        x,
        graph.constant(f"{name}.weight_packed", packing.pack(codes, weight.bits, block).numpy()),
        graph.constant(f"{name}.weight_scales", np.ascontiguousarray(weight.scale)),
    ]
    if weight.zero is not None:
        packed = packing.pack(
            torch.from_numpy(np.ascontiguousarray(weight.zero)), weight.bits, count
        ).numpy()  # (out, 1, bytes)
        inputs.append(graph.constant(f"{name}.weight_zero_points", packed[:, 0]))
    if bias is not None:
        inputs += [""] * (5 - len(inputs)) + [bias]
    settings = {"K": channels, "N": out, "bits": weight.bits, "block_size": block, "accuracy_level": level}
    return graph.one(OP, inputs, name, domain=DOMAIN, **settings)
