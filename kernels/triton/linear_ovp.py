"""Linear layers on outlier-victim pairs (kernels/gpu/linear_ovp.py has layouts and numbers, pairs.py the codes).

`planes` takes x apart into the left and the right elements of pairs, rounded to pairs where asked. `gemm` computes tiles of y^T, (outputs,
tokens): the weight's values are the left operand, decoded in registers from where tensor cores take them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu.core import Core
from ..gpu.linear_ovp import STEP
from . import pairs, split_k
from .ahead import Variant
from .config import Config, core_of, launch, on_gpu, tuned
from .epilogue import store
from .tf32 import rounded

PLANES = Config("planes", {"BLOCK": 1024}, warps=4, stages=2)


@triton.jit
def planes(
    x_ptr,  # (rows, columns)
    x_scale_ptr,  # () float32, or None
    planes_ptr,  # (rows, 2, half) int8 for int4, float16 for other forms, the type of x without x_scale
    columns,
    half,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pairs of a token."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = 2 * pair[:, None] + tl.arange(0, 2)[None, :]  # (BLOCK, 2): neighbours are read together
    x = tl.load(x_ptr + row * columns + column, column < columns, 0.0)
    left, right = tl.split(x)
    if x_scale_ptr is not None:
        step = tl.full((BLOCK,), 0.0, tl.float32) + tl.load(x_scale_ptr)
        left, right = tl.div_rn(left.to(tl.float32), step), tl.div_rn(right.to(tl.float32), step)
        left, right = pairs.round_trip(left, right, FORM)
    elif x_ptr.dtype.element_ty == tl.float32:
        left, right = rounded(left), rounded(right)
    target = planes_ptr + row * 2 * half + pair
    tl.store(target, left.to(planes_ptr.dtype.element_ty), pair < half)
    tl.store(target + half, right.to(planes_ptr.dtype.element_ty), pair < half)


@triton.jit
def gemm(
    x_ptr,  # (rows, 2, half) int8, float16, bfloat16 or float32
    codes_ptr,  # (columns, half) or (columns, 2, half) int8
    scale_ptr,  # (columns,) float32
    y_ptr,  # (rows, columns); (parts, rows, columns) float32 where SPLIT
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    columns,
    half,
    part_steps,
    FORM: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # pairs
    GPU: tl.constexpr,
):
    """A tile (BLOCK_N, BLOCK_M) of y^T, part_steps steps of BLOCK_K pairs."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    pid, part = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, 8)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token, output = (
        tl.minimum(row, rows - 1),
        tl.minimum(column, columns - 1),
    )  # beyond the edge what is read is not stored
    k = tl.arange(0, BLOCK_K)
    PLANES = tl.constexpr(2 if FORM == "int8" else 1)
    codes = codes_ptr + output.to(tl.int64)[:, None] * (PLANES * half) + k[None, :]
    x = x_ptr + token.to(tl.int64)[None, :] * (2 * half) + k[:, None]
    kind = x_ptr.dtype.element_ty
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if kind == tl.int8 else tl.float32)
    for step in range(part * part_steps, min(part * part_steps + part_steps, half // BLOCK_K)):
        byte = tl.load(codes + step * BLOCK_K)  # (BLOCK_N, BLOCK_K)
        if FORM == "int8":
            beside = tl.load(codes + half + step * BLOCK_K).to(tl.int32) & 255
            first = byte.to(tl.int32) & 255
            left, right = pairs.meaning(first, beside, FORM), pairs.meaning(beside, first, FORM)
        else:
            left, right = pairs.values(byte, FORM, GPU)
        if kind != tl.int8:
            left, right = left.to(tl.float32).to(kind), right.to(tl.float32).to(kind)
        y = tl.dot(left, tl.load(x + step * BLOCK_K), y, input_precision="tf32", out_dtype=y.dtype)
        y = tl.dot(right, tl.load(x + half + step * BLOCK_K), y, input_precision="tf32", out_dtype=y.dtype)
    z = y.to(tl.float32) * tl.load(scale_ptr + output)[:, None]
    if SPLIT:
        at = (part * rows + row).to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(y_ptr + at, z, (row < rows)[None, :] & (column < columns)[:, None])
    else:
        store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, row[None, :], column[:, None], rows, columns, ACTIVATION)


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    bits: int,
    grid: str,
    x_bits: int,
    x_grid: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x; the arguments as kernels/gpu/linear_ovp.py stores them."""
    n, half, k = codes.shape[0], codes.shape[-1], x.shape[-1]
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0:
        return y
    form, x_form = f"{grid}{bits}", "" if x_scale is None else f"{x_grid}{x_bits}"
    kind = x.dtype if x_scale is None else torch.int8 if form == x_form == "int4" else torch.float16
    taken = torch.empty((m, 2, half), dtype=kind, device=x.device)
    c = PLANES.constants
    launch(planes, (m, triton.cdiv(half, c["BLOCK"])), PLANES, rows, x_scale, taken, k, half, FORM=x_form, **c)
    config = choose(core_of(x), m, n, k, form, kind)
    c = config.constants
    steps = half // c["BLOCK_K"]
    part_steps = triton.cdiv(steps, c["SPLIT"])
    split = triton.cdiv(steps, part_steps)
    sums = y if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    ends = (bias, factor, residual)
    launch(
        gemm, (triton.cdiv(m, c["BLOCK_M"]) * triton.cdiv(n, c["BLOCK_N"]), split), config,
        taken, codes.view(torch.int8), scale, sums, *(ends if split == 1 else (None, None, None)), m, n, half, part_steps,
        FORM=form, SPLIT=split > 1, ACTIVATION=activation if split == 1 else "",
        BLOCK_M=c["BLOCK_M"], BLOCK_N=c["BLOCK_N"], BLOCK_K=c["BLOCK_K"], GPU=on_gpu(x),
    )  # fmt: skip
    if split > 1:
        split_k.finish(sums, y.view(m, n), *ends, activation)
    return y


def choose(core: Core, m: int, n: int, k: int, form: str, kind: torch.dtype) -> Config:
    """The tuned choice, else `default`."""
    return tuned(f"linear_ovp.{form}.x{8 * kind.itemsize}", core, m, n, k) or default(core, m, n, k, form, kind)


def default(core: Core, m: int, n: int, k: int, form: str = "int4", kind: torch.dtype = torch.int8) -> Config:
    """The smallest tile that holds the tokens; the sum is split where tiles are fewer than multiprocessors."""
    if m <= 64:
        block_m, block_n, warps, stages = max(16, triton.next_power_of_2(m)), 64, 4, 4
    elif m <= 512 or core.capability == 89 or kind != torch.int8:
        block_m, block_n, warps, stages = 64, 128, 8, 3
    else:
        block_m, block_n, warps, stages = 128, 128, 8, 3
    steps = triton.cdiv(k, 2 * STEP)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    split = 1
    while tiles * split * 2 <= (3 if m <= 64 else 1) * core.multiprocessors and split * 4 <= steps and split < 16:
        split *= 2
    block_k = 32 if kind == torch.float32 or form != "int4" else STEP  # pairs whose values stand in registers together
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
    return Config("gemm", tile, warps, stages)


def candidates(core: Core, m: int, n: int, k: int, form: str = "int4", kind: torch.dtype = torch.int8) -> list[Config]:
    """What tuning tries."""
    found = []
    for block_m, block_n, warps in ((16, 64, 4), (16, 128, 4), (32, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8)):  # fmt: skip
        if (block_m > 16 and block_m >= 4 * m) or block_m * 16 < min(m, 1024):
            continue
        for split in (1, 2, 4, 8) if m <= 64 else (1, 2) if m <= 256 else (1,):
            for block_k in (32, 64):
                for stages in (2, 3, 4):
                    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
                    if stages * block_k * (2 * block_m * kind.itemsize + 2 * block_n) <= core.shared_bytes - 16384:
                        found.append(Config("gemm", tile, warps, stages))
    return found[:: -(-len(found) // 40)]


def variants(core: Core) -> list[Variant]:
    """int4 on both sides for a few and for many tokens, int4 weights alone, and the rounding of x."""
    found = []
    for m, kind in ((1, torch.int8), (1024, torch.int8), (16, torch.bfloat16)):
        config = default(core, m, 4096, 4096, "int4", kind)
        c, split = config.constants, config.constants["SPLIT"] > 1
        types = {
            "x_ptr": "*i8" if kind == torch.int8 else "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "y_ptr": "*fp32" if split else "*bf16",
            "rows": "i32", "columns": "i32", "half": "i32", "part_steps": "i32",
        }  # fmt: skip
        constants = {
            "bias_ptr": None, "factor_ptr": None, "residual_ptr": None, "FORM": "int4", "SPLIT": split, "ACTIVATION": "", "GPU": True,
            **{n: c[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        }  # fmt: skip
        label = f"int4 weights, x {'int4' if kind == torch.int8 else 'bfloat16'}, {m} tokens"
        loose = ("rows", "part_steps")
        found.append(Variant("linear_ovp", "gemm", types, constants, config.warps, config.stages, True, label, loose))
    types = {"x_ptr": "*bf16", "x_scale_ptr": "*fp32", "planes_ptr": "*i8", "columns": "i32", "half": "i32"}
    constants = {"FORM": "int4", **PLANES.constants}
    found.append(
        Variant("linear_ovp", "planes", types, constants, PLANES.warps, PLANES.stages, False, "x to int4 pairs")
    )
    return found
