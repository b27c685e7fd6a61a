"""Rows of a quantized table: `planish::embedding_wna16`, codes of 8, 4 or 2 bits with a scale and a zero point for every group.

    y[..., c] = (code[i, c] - zero_point[i, c // group]) * scale[i, c // group]        for the index i = indices[...]

The table (rows, columns) is stored as the weight of `linear_wna16` is: `codes` (rows, groups, bytes) packed as in packing.py, `scale`
(rows, groups) float32, `zero_point` (rows, groups) uint8 codes, 2^(bits - 1) where it is absent. `indices` (...) are int64 or int32
from 0 to rows - 1; y (..., columns) is float32. Beyond the table the reference raises; ONNX Runtime does not.

What ONNX Runtime 1.31 has (measured; tests/kernels/test_embedding_wna16.py holds it to this): GatherBlockQuantized takes uint8
tables with codes of 2, 4 and 8 bits in blocks of 16, 32, 64, ... columns, the last of a row cut short, and packed zero points. A group
that is no block is split into blocks that repeat its scale. Other groups are gathered packed, and decoded by a table of 256 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto

from . import packing
from .fused import Builder, Call, Fused, register
from .linear_wna16 import dequantize
from .unfolded import at_run_time, look_up, shared

OP, DOMAIN = "GatherBlockQuantized", "com.microsoft"
SMALLEST = 16
"""columns of its smallest block"""


def embedding_wna16(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    group: int,
) -> torch.Tensor:
    """Rows y (..., columns) float32: the definition."""
    flat = indices.reshape(-1)
    zero = None if zero_point is None else zero_point.index_select(0, flat)
    rows = dequantize(codes.index_select(0, flat), scale.index_select(0, flat), zero, bits, group)
    return rows.reshape(*indices.shape, scale.shape[1] * group)


register(
    "embedding_wna16(Tensor indices, Tensor codes, Tensor scale, Tensor? zero_point, int bits, int group) -> Tensor",
    embedding_wna16,
    lambda indices, codes, scale, zero_point, bits, group: scale.new_empty((*indices.shape, scale.shape[1] * group)),
)


class EmbeddingWna16(Fused):
    """GatherBlockQuantized where the groups are blocks or fall into blocks, else a Gather of codes that are decoded then."""

    domains = ("", DOMAIN)

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Equal to the reference to the bit."""
        bits, group = call.attributes["bits"], call.attributes["group"]
        codes, scale = (graph.value(call.tensors[n]) for n in ("codes", "scale"))
        zero = graph.value(call.tensors["zero_point"]) if "zero_point" in call.tensors else None
        size = block(bits, group, scale.shape[1])
        if size is None:
            late = _late(graph, call.name, call.tensors["indices"])
            return [_decoded(graph, call.name, late, codes, scale, zero, bits, group)]
        repeats = -(-group // size)
        rows = [codes.reshape(len(codes), -1), np.repeat(scale, repeats, axis=1)]
        if zero is not None:
            zeros = torch.from_numpy(np.repeat(zero, repeats, axis=1))  # (rows, blocks)
            rows.append(packing.pack(zeros, bits, zeros.shape[1]).numpy()[:, 0])
        names = ["weight_packed", "weight_scales", "weight_zero_points"]
        stored = [graph.constant(f"{call.name}.{n}", v) for n, v in zip(names, rows, strict=False)]
        settings = {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        return [graph.one(OP, [stored[0], call.tensors["indices"], *stored[1:]], call.name, domain=DOMAIN, **settings)]


def block(bits: int, group: int, groups: int) -> int | None:
    """The largest block of GatherBlockQuantized that a group of a row falls into; None where there is none."""
    if groups == 1 and group * bits % 8 == 0:  # the row is one block, which may be cut short at a byte
        return max(SMALLEST, 1 << (group - 1).bit_length())
    size = group & -group  # the largest power of two that divides it
    return size if size >= SMALLEST else None


def _late(graph: Builder, name: str, indices: str) -> str:
    """The indices as they are where an input's values make them, else as a value that is only known at run time.

    Positions follow from the shape of an input: where that is fixed, ONNX Runtime would decode their rows when it loads the file and
    keep them in float. GatherBlockQuantized it leaves alone.
    """
    stored = {i.name for i in graph.graph.initializer}
    inputs = [i for i in graph.graph.input if i.name not in stored]
    made = {o: n for n in graph.nodes for o in n.output}
    seen, ahead = set(), [indices]
    while ahead:
        value = ahead.pop()
        if any(i.name == value for i in inputs):
            return indices
        if value in made and value not in seen and made[value].op_type not in ("Shape", "Size"):
            ahead += made[value].input
        seen.add(value)
    x = graph.one("Cast", [inputs[0].name], f"{name}.any", to=TensorProto.FLOAT)
    whole = graph.one("Cast", [indices], f"{name}.whole", to=TensorProto.INT64)
    return at_run_time(graph, whole, x, f"{name}.indices", TensorProto.INT64)


def _decoded(
    graph: Builder,
    name: str,
    indices: str,
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    bits: int,
    group: int,
) -> str:
    """Gather of packed codes (rows, groups, bytes), each byte then looked up as 8 / bits codes less the zero point that is not stored."""
    count = 8 // bits
    middle = 1 << (bits - 1) if zero is None else 0
    shifts = np.arange(count) * bits
    values = (np.arange(256)[:, None] >> shifts & (1 << bits) - 1) - middle  # (256, 8 / bits)
    table = shared(graph, f"planish.codes_of_{bits}_bits_from_{-middle}", values.astype(np.float32))

    def gathered(array: np.ndarray, what: str) -> str:
        return graph.one("Gather", [graph.constant(f"{name}.{what}", array), indices], f"{name}.{what}_rows", axis=0)

    def integers(*numbers: int) -> str:
        return graph.constant(f"{name}.integers", np.array(numbers, np.int64))

    groups = scale.shape[1]
    decoded = look_up(
        graph, table, gathered(codes, "weight_packed"), f"{name}.looked_up"
    )  # (..., groups, bytes, 8 / bits)
    lead = graph.one("Shape", [indices], f"{name}.lead")
    shape = graph.one("Concat", [lead, integers(groups, codes.shape[2] * count)], f"{name}.shape", axis=0)
    decoded = graph.one("Reshape", [decoded, shape], f"{name}.codes", allowzero=1)
    if group != codes.shape[2] * count:
        decoded = graph.one("Slice", [decoded, integers(0), integers(group), integers(-1)], f"{name}.cut")
    if zero is not None:
        whole = gathered(zero[..., None], "weight_zero_points")  # (..., groups, 1)
        floats = graph.one("Cast", [whole], f"{name}.zero_points", to=TensorProto.FLOAT)
        decoded = graph.one("Sub", [decoded, floats], f"{name}.centred")
    scaled = graph.one("Mul", [decoded, gathered(scale[..., None], "weight_scales")], f"{name}.scaled")
    flat = graph.one("Concat", [lead, integers(groups * group)], f"{name}.flat", axis=0)
    return graph.one("Reshape", [scaled, flat], name, allowzero=1)
