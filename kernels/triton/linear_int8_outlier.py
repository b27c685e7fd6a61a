"""LLM.int8() (kernels/gpu/linear_int8_outlier.py has layouts and numbers).

`prepare` takes a token: its first BLOCK columns stay in registers between the search for c and the codes, so x is read once up to 16384 columns.
`gemm` computes tiles of y^T, (outputs, tokens), so that few tokens make a narrow tile. Outlier columns that have no weights of their own are
added before the weight's scale is applied, the exact ones after it. Dynamic layers run `find` (columns with a value beyond the threshold)
and `listed` (their numbers, and how many) first; `gemm` reads the length of its second loop from memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...common.errors import PlanishError
from ..gpu.core import Core
from . import split_k
from .ahead import Variant
from .config import Config, core_of, launch, tuned
from .epilogue import store
from .tf32 import rounded

LONGEST = 16384
"""columns of a token that stay in registers"""
FIND = Config("find", {"BLOCK_M": 16, "BLOCK_N": 256, "TOKENS": 256}, warps=4, stages=2)
LISTED = Config("listed", {"BLOCK": 2048}, warps=4, stages=2)


@triton.jit
def find(
    x_ptr,  # (rows, columns)
    flag_ptr,  # (columns,) int8, zeros before
    rows,
    columns,
    threshold,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Set the flags of columns that hold some |x| >= threshold among TOKENS tokens."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, TOKENS, BLOCK_M):
        row = tl.program_id(1) * TOKENS + start + tl.arange(0, BLOCK_M)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        x = tl.load(x_ptr + at, (row < rows)[:, None] & (column < columns)[None, :], 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    one = tl.full((BLOCK_N,), 1, tl.int8)
    tl.store(flag_ptr + column, one, (column < columns) & (largest >= threshold))


@triton.jit
def listed(
    flag_ptr,  # (columns,) int8
    stored_ptr,  # (columns,) int8: columns to leave out; or None
    list_ptr,  # (1 + columns,) int32: how many, then their numbers in order
    columns,
    BLOCK: tl.constexpr,
):
    """Numbers of the flagged columns. One program."""
    length = 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        chosen = tl.load(flag_ptr + column, column < columns, 0) != 0
        if stored_ptr is not None:
            chosen = chosen & (tl.load(stored_ptr + column, column < columns, 1) == 0)
        ones = chosen.to(tl.int32)
        place = length + tl.cumsum(ones, 0)  # from 1: behind the length
        tl.store(list_ptr + place, column, chosen)
        length += tl.sum(ones, 0)  # pyright: ignore[reportOperatorIssue]
    tl.store(list_ptr, length)


@triton.jit
def token(x_ptr, stored_ptr, flag_ptr, start, column, columns, threshold):
    """(x float32, is it an outlier column, is the value beyond the threshold, is the column stored) of part of a token."""
    inside = column < columns
    x = tl.load(x_ptr + start + column, inside, 0.0).to(tl.float32)
    hot = tl.abs(x) >= threshold
    stored = column < 0 if stored_ptr is None else tl.load(stored_ptr + column, inside, 0) != 0
    outlier = stored if flag_ptr is None else tl.load(flag_ptr + column, inside, 0) != 0
    return x, outlier, hot & inside, stored


@triton.jit
def prepare(
    x_ptr,  # (rows, columns)
    stored_ptr,  # (columns,) int8 or None
    flag_ptr,  # (columns,) int8; None for frozen columns
    columns_ptr,  # (THICK,) int32 or None
    codes_ptr,  # (rows, wide) int8
    step_ptr,  # (rows,) float32: c / 127
    thin_ptr,  # (rows, THICK) in the type of x, or None
    count_ptr,  # (size,) int64
    columns,
    wide,
    inner,
    size,
    threshold,
    THICK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,  # wide <= BLOCK
):
    """Codes, step, outlier columns and count of one token."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    first = tl.arange(0, BLOCK)
    x, outlier, hot, stored = token(x_ptr, stored_ptr, flag_ptr, start, first, columns, threshold)
    peak = tl.max(tl.where(hot & outlier, 0.0, tl.abs(x)), 0)
    beyond = tl.sum((hot & (stored == 0)).to(tl.int32), 0)
    if not ONE:
        for begin in range(BLOCK, wide, BLOCK):
            more, out, high, known = token(x_ptr, stored_ptr, flag_ptr, start, begin + first, columns, threshold)
            peak = tl.maximum(peak, tl.max(tl.where(high & out, 0.0, tl.abs(more)), 0))
            beyond += tl.sum((high & (known == 0)).to(tl.int32), 0)
    peak = tl.where(peak > 0, peak, 1.0)  # pyright: ignore[reportOperatorIssue]
    inverse = 127.0 * tl.div_rn(tl.full((), 1.0, tl.float32), peak)  # as torch computes 127 / c
    tl.store(step_ptr + row, peak * (1.0 / 127.0))

    target = codes_ptr + row.to(tl.int64) * wide
    tl.store(target + first, integer(x, outlier, inverse), first < wide)
    if not ONE:
        for begin in range(BLOCK, wide, BLOCK):
            more, out, high, known = token(x_ptr, stored_ptr, flag_ptr, start, begin + first, columns, threshold)
            tl.store(target + begin + first, integer(more, out, inverse), begin + first < wide)

    if columns_ptr is not None:  # a compiler reads the body of a loop without steps too
        for begin in range(0, THICK, CHUNK):
            place = begin + tl.arange(0, CHUNK)
            column = tl.load(columns_ptr + place)
            real = column < columns
            if flag_ptr is not None:  # in this call it may be a column like others
                real = real & (tl.load(flag_ptr + column, real, 0) != 0)
            tl.store(thin_ptr + row.to(tl.int64) * THICK + place, tl.load(x_ptr + start + column, real, 0.0))
    any_beyond = beyond > 0  # pyright: ignore[reportOperatorIssue]
    tl.atomic_add(count_ptr + (row // inner) % size, beyond.to(tl.int64), any_beyond, sem="relaxed")


@triton.jit
def integer(x, outlier, inverse):
    """Codes int8: the low byte of x / step + 1.5 * 2^23, whose addition rounds half to even."""
    kept = tl.where(outlier, 0.0, x)
    return (kept * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def thin_product(y, thin_ptr, thick_ptr, token, output, THICK: tl.constexpr, CHUNK: tl.constexpr):
    """Add thick thin^T to y (BLOCK_N, BLOCK_M): thick (outputs, THICK) float16, thin (tokens, THICK)."""
    for begin in range(0, THICK, CHUNK):
        place = begin + tl.arange(0, CHUNK)
        left = tl.load(thick_ptr + output.to(tl.int64)[:, None] * THICK + place[None, :]).to(tl.float32)
        right = tl.load(thin_ptr + token.to(tl.int64)[None, :] * THICK + place[:, None]).to(tl.float32)
        y = tl.dot(left, rounded(right), y, input_precision="tf32")
    return y


@triton.jit
def gemm(
    x8_ptr,  # (rows, wide) int8
    step_ptr,  # (rows,) float32
    thin_ptr,  # (rows, THICK), or None
    x_ptr,  # (rows, depth); None for frozen columns
    list_ptr,  # (1 + depth,) int32; None for frozen columns
    codes_ptr,  # (columns, wide) int8
    scale_ptr,  # (columns,) float32
    thick_ptr,  # (columns, THICK) float16, or None
    y_ptr,  # (rows, columns); (parts, rows, columns) float32 where SPLIT
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    columns,
    wide,
    depth,
    part_steps,
    THICK: tl.constexpr,
    CHUNK: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOTS: tl.constexpr,  # products of a step
):
    """A tile (BLOCK_N, BLOCK_M) of y^T, part_steps steps of BLOCK_K columns."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    pid, part = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, 8)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token, output = (
        tl.minimum(row, rows - 1),
        tl.minimum(column, columns - 1),
    )  # beyond the edge what is read is not stored
    WIDTH: tl.constexpr = BLOCK_K // DOTS
    k = tl.arange(0, WIDTH)
    left = codes_ptr + output.to(tl.int64)[:, None] * wide + k[None, :]
    right = x8_ptr + token.to(tl.int64)[None, :] * wide + k[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(part * part_steps, min(part * part_steps + part_steps, wide // BLOCK_K)):
        for d in tl.static_range(DOTS):  # pyright: ignore[reportGeneralTypeIssues]
            at = step * BLOCK_K + d * WIDTH
            total = tl.dot(tl.load(left + at), tl.load(right + at), total, out_dtype=tl.int32)
    y = total.to(tl.float32) * tl.load(step_ptr + token)[None, :]

    if THICK and not EXACT and part == 0:
        y = thin_product(y, thin_ptr, thick_ptr, token, output, THICK, CHUNK)
    if list_ptr is not None and part == 0:
        length = tl.load(list_ptr)
        for begin in range(0, length, 16):
            place = begin + tl.arange(0, 16)
            found = tl.load(list_ptr + 1 + place, place < length, 0)
            weight = tl.load(codes_ptr + output.to(tl.int64)[:, None] * wide + found[None, :])  # (BLOCK_N, 16)
            x = tl.load(x_ptr + token.to(tl.int64)[None, :] * depth + found[:, None], (place < length)[:, None], 0.0)
            y = tl.dot(weight.to(tl.float32), rounded(x.to(tl.float32)), y, input_precision="tf32")
    y *= tl.load(scale_ptr + output)[:, None]
    if THICK and EXACT and part == 0:
        y = thin_product(y, thin_ptr, thick_ptr, token, output, THICK, CHUNK)

    if SPLIT:
        at = (part * rows + row).to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(y_ptr + at, y, (row < rows)[None, :] & (column < columns)[:, None])
    else:
        store(y, y_ptr, bias_ptr, factor_ptr, residual_ptr, row[None, :], column[:, None], rows, columns, ACTIVATION)


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    stored: torch.Tensor | None,
    columns: torch.Tensor | None,
    thick: torch.Tensor | None,
    threshold: float,
    dynamic: bool,
    samples: int,
    exact: bool,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., in) -> (..., out) in the type of x, and the count; the arguments as kernels/gpu/linear_int8_outlier.py stores them."""
    n, wide = codes.shape
    k = x.shape[-1]
    if samples == x.ndim - 1:
        raise PlanishError(f"values beyond the threshold are counted along dimension {samples}, that of the channels; one before it, or -1, is accepted")  # fmt: skip
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    size = x.shape[samples] if samples >= 0 else 1
    count = torch.zeros(size, dtype=torch.int64, device=x.device)
    if m == 0:
        return y, count
    inner = math.prod(x.shape[samples + 1 : -1]) if samples >= 0 else 1
    flag = found = None
    if dynamic:
        flag = torch.zeros(k, dtype=torch.int8, device=x.device)
        found = torch.empty(1 + k, dtype=torch.int32, device=x.device)
        c = FIND.constants
        launch(
            find, (triton.cdiv(k, c["BLOCK_N"]), triton.cdiv(m, c["TOKENS"])), FIND, rows, flag, m, k, threshold, **c
        )
        launch(listed, (1,), LISTED, flag, stored if exact else None, found, k, **LISTED.constants)
    depth = 0 if thick is None else thick.shape[1]
    chunk = min(32, max(16, depth))
    integers = torch.empty((m, wide), dtype=torch.int8, device=x.device)
    step = torch.empty(m, dtype=torch.float32, device=x.device)
    thin = rows.new_empty((m, depth)) if depth else None
    block = min(LONGEST, triton.next_power_of_2(wide))
    launch(
        prepare, (m,), Config("prepare", warps=warps_for(block), stages=1),
        rows, stored, flag, columns, integers, step, thin, count, k, wide, inner, size, threshold,
        THICK=depth, CHUNK=chunk, BLOCK=block, ONE=wide <= block,
    )  # fmt: skip
    core = core_of(x)
    config = choose(core, m, n, k)
    c = config.constants
    steps = wide // c["BLOCK_K"]
    part_steps = triton.cdiv(steps, c["SPLIT"])
    split = triton.cdiv(steps, part_steps)
    sums = y if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    ends = (bias, factor, residual)
    launch(
        gemm, (triton.cdiv(m, c["BLOCK_M"]) * triton.cdiv(n, c["BLOCK_N"]), split), config,
        integers, step, thin, rows if dynamic else None, found, codes, scale, thick, sums,
        *(ends if split == 1 else (None, None, None)), m, n, wide, k, part_steps,
        THICK=depth, CHUNK=chunk, EXACT=exact, SPLIT=split > 1, ACTIVATION=activation if split == 1 else "",
        BLOCK_M=c["BLOCK_M"], BLOCK_N=c["BLOCK_N"], BLOCK_K=c["BLOCK_K"], DOTS=dots(core),
    )  # fmt: skip
    if split > 1:
        split_k.finish(sums, y.view(m, n), *ends, activation)
    return y, count


def dots(core: Core) -> int:
    """Products of a step of the loop. On cores without groups of warps the compiler carries operands of a single one over from step to
    step in registers, byte by byte: 409 instructions a step of 128 x 128 x 128, with two products 156.
    """
    return 1 if core.warp_groups else 2


def warps_for(block: int) -> int:
    """Warps of a program on `block` values, 32 or fewer a thread."""
    return max(4, min(16, block // 1024))


def choose(core: Core, m: int, n: int, k: int) -> Config:
    """The tuned choice, else `default`."""
    return tuned("linear_int8_outlier", core, m, n, k) or default(core, m, n, k)


def default(core: Core, m: int, n: int, k: int) -> Config:
    """The smallest tile that holds the tokens; the sum is split where tiles are fewer than multiprocessors."""
    steps = triton.cdiv(k, 128)
    if m <= 64:
        block_m, block_n, warps, stages = max(16, triton.next_power_of_2(m)), 64, 4, 5
    elif m <= 256:
        block_m, block_n, warps, stages = 64, 128, 4, 3
    else:
        block_m, block_n, warps, stages = 128, 128, 8, 3
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    split = 1
    while tiles * split * 2 <= (3 if m <= 64 else 1) * core.multiprocessors and split * 4 <= steps and split < 16:
        split *= 2
    block_k = 128 if stages * (block_m + block_n) * 128 <= core.shared_bytes * 3 // 4 else 64
    return Config("gemm", {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}, warps, stages)


def candidates(core: Core, m: int, n: int, k: int) -> list[Config]:
    """What tuning tries."""
    found = []
    for block_m, block_n, warps in ((16, 64, 4), (16, 128, 4), (32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 128, 8), (256, 128, 8)):  # fmt: skip
        if (block_m > 16 and block_m >= 4 * m) or block_m * 16 < min(m, 1024):
            continue
        for split in (1, 2, 4, 8) if m <= 64 else (1, 2) if m <= 256 else (1,):
            for block_k, stages in ((64, 4), (128, 3), (128, 4), (128, 6)):
                if stages * (block_m + block_n) * block_k <= core.shared_bytes - 16384:
                    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
                    found.append(Config("gemm", tile, warps, stages))
    return found[:: -(-len(found) // 40)]


def variants(core: Core) -> list[Variant]:
    """The product with 16 frozen columns for a few and for many tokens, with columns found at run time, and the pass over tokens."""
    found = []
    for m, dynamic in ((1, False), (1024, False), (128, True)):
        config = default(core, m, 4096, 4096)
        c, split = config.constants, config.constants["SPLIT"] > 1
        types = {
            "x8_ptr": "*i8", "step_ptr": "*fp32", "codes_ptr": "*i8", "scale_ptr": "*fp32", "y_ptr": "*fp32" if split else "*bf16",
            "rows": "i32", "columns": "i32", "wide": "i32", "depth": "i32", "part_steps": "i32",
        }  # fmt: skip
        here, absent = ("x_ptr", "list_ptr"), ("thin_ptr", "thick_ptr")
        here, absent = (here, absent) if dynamic else (absent, here)
        types |= dict(zip(here, ("*bf16", "*i32") if dynamic else ("*bf16", "*fp16"), strict=True))
        constants = {
            **dict.fromkeys(absent), "bias_ptr": None, "factor_ptr": None, "residual_ptr": None, "THICK": 0 if dynamic else 16, "CHUNK": 16,
            "EXACT": not dynamic, "SPLIT": split, "ACTIVATION": "", **{n: c[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}, "DOTS": dots(core),
        }  # fmt: skip
        label = f"{'columns found' if dynamic else '16 frozen columns'}, {m} tokens"
        loose = ("rows", "part_steps")
        found.append(
            Variant("linear_int8_outlier", "gemm", types, constants, config.warps, config.stages, True, label, loose)
        )
    types = {
        "x_ptr": "*bf16", "stored_ptr": "*i8", "columns_ptr": "*i32", "codes_ptr": "*i8", "step_ptr": "*fp32", "thin_ptr": "*bf16",
        "count_ptr": "*i64", "columns": "i32", "wide": "i32", "inner": "i32", "size": "i32", "threshold": "fp32",
    }  # fmt: skip
    constants = {"flag_ptr": None, "THICK": 16, "CHUNK": 16, "BLOCK": 4096, "ONE": True}
    label, loose = "a token of 4096, 16 frozen columns", ("inner", "size")
    found.append(Variant("linear_int8_outlier", "prepare", types, constants, warps_for(4096), 1, False, label, loose))
    return found
