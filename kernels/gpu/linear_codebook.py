"""Four-bit codes into a table on a GPU, stored as linear_wna16.py stores numbers: words in the order of tensor cores, scales in float16.

    W[o, i] = table[code[o, i]] * scale[o, i // group] * row[o]        y = epilogue(x W^T)

codes  (out / 16, in / 64, 32, 4) int32, codes of a word side by side, as byte permutations take them (shuffle.py)
scale  (out / 16, groups, 8) int32, two float16 a word: the block's scale / row, at most 1 in magnitude. Nested scales are unnested
table  (2, 2, 4) int32: the table in float16 and in bfloat16, each as the low bytes of its 16 entries, then the high ones
row    (out,) float32, a power of two; for nvfp4 512 times the tensor's scale, so that the blocks' E4M3 scales stay exact
group  16 to 128, or a multiple of 128: the longest run of columns that never crosses a block

Numbers: linear_wna16.py's bound without zero points. 3 u are the roundings of the table (nf4, fp4), of scales and of scaled
weights to the type of x; E2M1 values are exact, and so are the scales of mxfp4 and nvfp4. For x in float32 the table is rounded
to float16.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from .. import codebooks
from . import shuffle
from .core import Core
from .linear_wna16 import row_factor, spread, stored_group
from .op import EPILOGUE, GpuOp, Layer, Packed, epilogue, linear_output, register

RANGE = 512.0
"""a power of two above the largest scale of a block in E4M3"""


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
    row: torch.Tensor,
    format: str,
    group: int,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x."""
    values = codebooks.table(format)[shuffle.unshuffle(codes, 4, True).int()]  # (out padded, in padded)
    at = torch.arange(values.shape[1]) // group
    weight = (values * shuffle.unhalve(scale)[:, at])[: len(row), : x.shape[-1]] * row[:, None]
    return epilogue(F.linear(x.float(), weight), bias, factor, residual, activation, x.dtype)


register(
    f"gpu_linear_codebook(Tensor x, Tensor codes, Tensor scale, Tensor table, Tensor row, str format, int group, {EPILOGUE}) -> Tensor",
    reference,
    lambda x, codes, scale, table, row, *_: linear_output(x, row.shape[0]),
)


def run_of_columns(group: int, inputs: int) -> int:
    """Columns that share a scale in every row, where blocks of `group` run over the ends of rows."""
    return math.gcd(group, inputs)


def split_table(format: str) -> torch.Tensor:
    """(2, 2, 4) int32: the table's low and high bytes, in float16 and in bfloat16."""
    kinds = [
        codebooks.table(format).to(t)[:, None].view(torch.uint8).T for t in (torch.float16, torch.bfloat16)
    ]  # (2, 16)
    return torch.stack(kinds).contiguous().view(torch.int32)


class LinearCodebook(GpuOp):
    """NF4, FP4, MXFP4 and NVFP4."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Blocks that cross the ends of rows too irregularly."""
        group, inputs = int(layer.attributes["group"]), layer.tensors["codes"].shape[1] * 2
        if stored_group(run_of_columns(group, inputs), inputs) < 16:
            return f"blocks of {group} in rows of {inputs} columns; taken are sizes whose greatest common divisor is a multiple of 16"
        return None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """The layout above."""
        t, format, group = layer.tensors, str(layer.attributes["format"]), int(layer.attributes["group"])
        codes = codebooks.unpack(t["codes"], codebooks.high_first(format))  # (out, in)
        out, inputs = codes.shape
        blocks = codebooks.block_scales(t["scale"], t.get("second_scale"), t.get("offset"), format).reshape(-1).float()
        columns = run_of_columns(group, inputs)
        scale = blocks[torch.arange(out * inputs // columns) * columns // group].reshape(out, -1)  # (out, in / columns)
        row = (t["second_scale"].float() * RANGE).expand(out).clone() if format == "nvfp4" else row_factor(scale, 0)
        tensors = {
            "codes": shuffle.shuffle(codes, 4, True),
            "scale": shuffle.halves(spread(scale / row[:, None], columns, inputs)),
            "table": split_table(format),
            "row": row,
        }
        return Packed(tensors, {"format": format, "group": stored_group(columns, inputs)})
