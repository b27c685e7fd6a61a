"""The second half of a product whose sum is split over blocks: parts (SPLIT, rows, columns) float32 added in order, then the epilogue.

The order is fixed, so equal inputs give equal outputs, which atomic additions do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .ahead import Variant
from .config import Config, launch
from .epilogue import store

REDUCE = Config("reduce", {"BLOCK_M": 4, "BLOCK_N": 256}, warps=4, stages=2)


@triton.jit
def reduce(
    parts_ptr,  # (SPLIT, rows, columns) float32
    y_ptr,  # (rows, columns)
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    columns,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of the parts' sum into y, a tile (BLOCK_M, BLOCK_N)."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (row < rows) & (column < columns)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT):  # pyright: ignore[reportGeneralTypeIssues]
        z += tl.load(parts_ptr + (part * rows + row).to(tl.int64) * columns + column, inside, 0.0)
    store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, row, column, rows, columns, ACTIVATION)


def finish(
    parts: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> None:
    """Write y (rows, columns) from parts (SPLIT, rows, columns) float32."""
    rows, columns = y.shape
    block = REDUCE.constants
    grid = (triton.cdiv(rows, block["BLOCK_M"]), triton.cdiv(columns, block["BLOCK_N"]))
    launch(
        reduce, grid, REDUCE, parts, y, bias, factor, residual, rows, columns,
        SPLIT=parts.shape[0], ACTIVATION=activation, **block,
    )  # fmt: skip


def variants(core: object) -> list[Variant]:
    """Eight parts, everything in the epilogue."""
    pointers = {"y_ptr": "*bf16", "bias_ptr": "*fp32", "factor_ptr": "*bf16", "residual_ptr": "*bf16"}
    types = {"parts_ptr": "*fp32", **pointers, "rows": "i32", "columns": "i32"}
    constants = {"SPLIT": 8, "ACTIVATION": "gelu", **REDUCE.constants}
    return [Variant("split_k", "reduce", types, constants, REDUCE.warps, REDUCE.stages, False, "sum of eight parts")]
