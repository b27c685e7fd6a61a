"""SVDQuant in two kernels (kernels/gpu/linear_svd.py has the layouts and the numbers), a third where few tokens split the columns.

`prepare`: a block of tokens walks over groups of columns; a group's maximum is all that its codes need, so x is read once, and the thin
product grows in tensor cores beside it. Where blocks would be few the groups are dealt to several, and each writes its own part of thin.

`gemm`: tiles are transposed, (outputs, tokens): the weights, unpacked in registers, are the left operand, which tensor cores take from
registers, and few tokens make a narrow tile. Each group's int32 sums begin at the bits of 1.5 * 2^23, so that they are read as float32
without a conversion, which runs at a half to an eighth of the rate. Per group and output that leaves three instructions: the start, and two
multiply-adds, one by the weight's scale, which takes 1.5 * 2^23 off again, and one by the token's step.

Machine code of the loop at 128 x 128, 8 warps, group 64 (a step of 64 columns): 311 instructions a thread on sm_90, 261 on sm_80; 192 of them
are these three. So the scales, not the products, bound W4A8 at many tokens: 622 cycles of issue a step on Hopper beside 256 of tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu.core import Core
from ..linear_svd import FLOAT_BITS
from . import nibbles, split_k
from .ahead import Variant
from .config import Config, core_of, launch, on_gpu, tuned
from .epilogue import store
from .tf32 import rounded

PREPARE = Config("prepare", warps=4, stages=4)
DIRECT = 256
"""rows of parts of thin that a tile of `gemm` adds up itself; beyond it they are added up once, before"""


@triton.jit
def prepare(
    x_ptr,  # (rows, columns)
    smooth_ptr,  # (columns,) float32
    down_ptr,  # (RANK, columns) float16; None for RANK 0
    codes_ptr,  # (groups, rows, GROUP) int8, or the type of x for float activations
    step_ptr,  # (groups, rows) float32; None for float activations
    thin_ptr,  # (parts, rows, RANK) float32
    rows,
    columns,
    groups,
    part_groups,
    shift,
    TOP: tl.constexpr,  # largest code; 0: float activations
    UNSIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Codes, steps, and a part of h down^T, for BLOCK_M tokens and the groups of one part."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    inside = row < rows
    rank = tl.arange(0, RANK if RANK else 16)
    thin = tl.zeros((BLOCK_M, RANK if RANK else 16), tl.float32)
    last = min(part * part_groups + part_groups, groups)
    for group in tl.range(part * part_groups, last, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        column = group * GROUP + tl.arange(0, GROUP)
        whole = column < columns
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        x = tl.load(x_ptr + at, inside[:, None] & whole[None, :], 0.0).to(tl.float32)  # (BLOCK_M, GROUP)
        smooth = tl.load(smooth_ptr + column, whole, 0.0)[None, :]  # zero fills up the last group
        if RANK:
            down = tl.load(down_ptr + rank[:, None] * columns + column[None, :], whole[None, :], 0.0)  # (RANK, GROUP)
            thin = tl.dot(rounded(x * smooth), tl.trans(down.to(tl.float32)), thin, input_precision="tf32")
        h = (x + shift) * smooth
        place = (group * rows + row).to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        if TOP == 0:
            h = rounded(h) if codes_ptr.dtype.element_ty == tl.float32 else h
            tl.store(codes_ptr + place, h.to(codes_ptr.dtype.element_ty), inside[:, None])
        else:
            if UNSIGNED:
                h = tl.maximum(h, 0.0)
            peak = tl.max(tl.abs(h), 1)  # (BLOCK_M,)
            divisor = tl.where(peak > 7.888609052210118e-31, peak, float("inf"))  # pyright: ignore[reportOperatorIssue]  # 2^-100
            inverse = TOP * tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), divisor)  # as torch computes TOP / peak
            code = (h * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23 rounds, half to even
            if TOP == 255:
                code -= 128
            tl.store(codes_ptr + place, code.to(tl.int8), inside[:, None])  # the low byte
            tl.store(step_ptr + group * rows + row, peak * (1.0 / TOP), inside)
    if RANK:
        at = (part * rows + row).to(tl.int64)[:, None] * RANK + rank[None, :]
        tl.store(thin_ptr + at, thin, inside[:, None])


@triton.jit
def scaled(total, scale, GPU: tl.constexpr):
    """(total - 1.5 * 2^23) scale, rounded once, of int32 totals that hold the bits of a float32.

    `scale` has at most 22 significant bits, so its product with 1.5 * 2^23 is exact, and one fused instruction gives the same number.
    """
    number = total.to(tl.float32, bitcast=True)
    if GPU:
        return tl.fma(number, tl.broadcast_to(scale, number.shape), tl.broadcast_to(scale * -12582912.0, number.shape))
    return (number - 12582912.0) * scale


@triton.jit
def gemm(
    x_ptr,  # (groups, rows, GROUP) int8, or float16, bfloat16, float32
    step_ptr,  # (groups, rows) float32; None for float activations
    thin_ptr,  # (parts, rows, RANK) float32; None for RANK 0
    codes_ptr,  # (groups, columns, GROUP * BITS / 8) int8
    scale_ptr,  # (groups, columns) float32
    offset_ptr,  # (groups, columns) int32 or None
    up_ptr,  # (columns, RANK) float16
    y_ptr,  # (rows, columns); (SPLIT, rows, columns) float32 where SPLIT > 1
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    columns,
    groups,
    part_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,  # of thin
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    GPU: tl.constexpr,
):
    """A tile (BLOCK_N, BLOCK_M) of y^T, the groups of one part."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    pid, part = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, 8)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, real = row < rows, column < columns
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    if RANK:  # noqa: SIM102 - the compiler knows this one, and the next at run time
        if part == 0:
            rank = tl.arange(0, RANK)
            thin = tl.zeros((RANK, BLOCK_M), tl.float32)
            for p in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
                at = (p * rows + row).to(tl.int64)[None, :] * RANK + rank[:, None]
                thin += tl.load(thin_ptr + at, inside[None, :], 0.0)
            up = tl.load(up_ptr + column[:, None] * RANK + rank[None, :], real[:, None], 0.0)  # (BLOCK_N, RANK)
            y = tl.dot(up.to(tl.float32), rounded(thin), y, input_precision="tf32")

    HALF: tl.constexpr = GROUP // 2
    j = tl.arange(0, HALF if BITS == 4 else GROUP)
    token, output = (
        tl.minimum(row, rows - 1),
        tl.minimum(column, columns - 1),
    )  # beyond the edge what is read is not stored
    last = min(part * part_groups + part_groups, groups)
    for group in tl.range(part * part_groups, last, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        left = codes_ptr + (group * columns + output).to(tl.int64)[:, None] * (GROUP * BITS // 8) + j[None, :]
        right = x_ptr + (group * rows + token).to(tl.int64)[None, :] * GROUP + j[:, None]
        weight = tl.load(left)  # (BLOCK_N, GROUP or HALF) int8
        x = tl.load(right)  # (GROUP or HALF, BLOCK_M)
        scale = tl.load(scale_ptr + group * columns + output)[:, None]
        if step_ptr is None:
            if BITS == 4:
                total = tl.dot(nibbles.low(weight, GPU).to(tl.float32).to(x.dtype), x, input_precision="tf32")
                high = tl.load(right + HALF)
                total = tl.dot(
                    nibbles.high(weight, GPU).to(tl.float32).to(x.dtype), high, total, input_precision="tf32"
                )
            else:
                total = tl.dot(weight.to(tl.float32).to(x.dtype), x, input_precision="tf32")
            y += total * scale
        else:
            start = tl.full((BLOCK_N, BLOCK_M), 0x4B400000, tl.int32)  # the bits of 1.5 * 2^23
            if offset_ptr is not None:
                start += tl.load(offset_ptr + group * columns + output)[:, None]
            if BITS == 4:
                total = tl.dot(nibbles.low(weight, GPU), x, start, out_dtype=tl.int32)
                total = tl.dot(nibbles.high(weight, GPU), tl.load(right + HALF), total, out_dtype=tl.int32)
            else:
                total = tl.dot(weight, x, start, out_dtype=tl.int32)
            y += scaled(total, scale, GPU) * tl.load(step_ptr + group * rows + token)[None, :]

    if SPLIT == 1:
        store(y, y_ptr, bias_ptr, factor_ptr, residual_ptr, row[None, :], column[:, None], rows, columns, ACTIVATION)
    else:
        at = (part * rows + row).to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(y_ptr + at, y, inside[None, :] & real[:, None])


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    smooth: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bits: int,
    group: int,
    activation_bits: int,
    shift: float,
    unsigned: bool,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x; the arguments as kernels/gpu/linear_svd.py stores them."""
    groups, n = scale.shape
    k, rank = x.shape[-1], down.shape[0]
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0:
        return y
    config = choose(core_of(x), m, n, k, bits, group, activation_bits)
    c = config.constants
    floats = activation_bits == FLOAT_BITS
    integers = torch.empty((groups, m, group), dtype=x.dtype if floats else torch.int8, device=x.device)
    step = None if floats else torch.empty((groups, m), dtype=torch.float32, device=x.device)
    part_groups = triton.cdiv(groups, c["PARTS"])
    parts = triton.cdiv(groups, part_groups)
    thin = torch.empty((parts, m, rank), dtype=torch.float32, device=x.device) if rank else None
    launch(
        prepare, (triton.cdiv(m, c["ROWS"]), parts), PREPARE,
        rows, smooth, down if rank else None, integers, step, thin, m, k, groups, part_groups, shift,
        TOP=largest(activation_bits, unsigned), UNSIGNED=unsigned, GROUP=group, RANK=rank, BLOCK_M=c["ROWS"], STAGES=PREPARE.stages,
    )  # fmt: skip
    if thin is not None and parts > 1 and parts * c["BLOCK_M"] > DIRECT:
        whole = torch.empty((m, rank), dtype=torch.float32, device=x.device)
        split_k.finish(thin, whole, None, None, None, "")
        thin, parts = whole, 1
    split_groups = triton.cdiv(groups, c["SPLIT"])
    split = triton.cdiv(groups, split_groups)
    sums = y if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    ends = (bias, factor, residual)
    tiles = triton.cdiv(m, c["BLOCK_M"]) * triton.cdiv(n, c["BLOCK_N"])
    launch(
        gemm, (tiles, split), config,
        integers, step, thin, codes, scale, offset, up if rank else None, sums,
        *(ends if split == 1 else (None, None, None)), m, n, groups, split_groups,
        BITS=bits, GROUP=group, RANK=rank, PARTS=parts, SPLIT=split, ACTIVATION=activation if split == 1 else "",
        BLOCK_M=c["BLOCK_M"], BLOCK_N=c["BLOCK_N"], STAGES=config.stages, GPU=on_gpu(x),
    )  # fmt: skip
    if split > 1:
        split_k.finish(sums, y.view(m, n), *ends, activation)
    return y


def largest(activation_bits: int, unsigned: bool) -> int:
    """The largest code of an activation; 0 where it stays in float."""
    if activation_bits == FLOAT_BITS:
        return 0
    return (1 << activation_bits) - 1 if unsigned else (1 << (activation_bits - 1)) - 1


def choose(core: Core, m: int, n: int, k: int, bits: int, group: int, activation_bits: int) -> Config:
    """The tuned choice, else `default`."""
    variant = f"linear_svd.w{bits}a{activation_bits}.g{group}"
    return tuned(variant, core, m, n, k) or default(core, m, n, k, bits, group, activation_bits)


def default(core: Core, m: int, n: int, k: int, bits: int = 4, group: int = 64, activation_bits: int = 8) -> Config:
    """The smallest tile that holds the tokens, and as many parts as fill the multiprocessors, twice or more.

    Constants: tile BLOCK_M tokens by BLOCK_N outputs, SPLIT parts of the sum; ROWS tokens and PARTS parts in `prepare`.
    """
    wide = group > 64 or activation_bits == FLOAT_BITS  # more bytes in a step
    if m <= 64:
        block_m, block_n, warps = max(16, triton.next_power_of_2(m)), 64, 4
        stages = 6 if m <= 16 else 4
    elif m <= 512 or wide or core.capability == 89:
        block_m, block_n, warps, stages = 64, 128, 8 if wide else 4, 3
    else:
        block_m, block_n, warps, stages = 128, 128, 8, 3
    stages = min(stages, 2 if group > 128 else 3) if wide else stages
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    split = _fill(tiles, (4 if m <= 16 else 2) * core.multiprocessors, k // group // 4)
    rows = 16 if m <= 512 else 32 if m <= 2048 else 64
    parts = _fill(triton.cdiv(m, rows), 2 * core.multiprocessors, k // group // 4)
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT": split, "ROWS": rows, "PARTS": parts}
    return Config("gemm", constants, warps, stages)


def _fill(blocks: int, wanted: int, most: int) -> int:
    """Parts that bring `blocks` to at most `wanted`: a power of two, 1 to 16 and `most`."""
    parts = 1
    while 2 * parts <= min(most, 16) and blocks * parts * 2 <= wanted:
        parts *= 2
    return parts


def candidates(
    core: Core, m: int, n: int, k: int, bits: int = 4, group: int = 64, activation_bits: int = 8
) -> list[Config]:
    """What tuning tries."""
    start = default(core, m, n, k, bits, group, activation_bits)
    found = []
    for block_m, block_n, warps in ((16, 64, 4), (16, 128, 4), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8)):  # fmt: skip
        if (block_m > 16 and block_m >= 4 * m) or block_m * 16 < min(m, 1024):
            continue
        for split in (1, 2, 4, 8) if m <= 64 else (1, 2) if m <= 256 else (1,):
            for stages in (3, 4, 6) if block_m <= 32 else (2, 3, 4):
                tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT": split}
                found.append(Config("gemm", {**start.constants, **tile}, warps, stages))
    step = -(-len(found) // 40)  # at most 40, spread over all
    return found[::step]


def variants(core: Core) -> list[Variant]:
    """Both kernels at rank 32: W4A8 for a few and for many tokens, and W4A16."""
    found = []
    for m, bits, activation_bits in ((1, 4, 8), (1024, 4, 8), (128, 4, 16)):
        config = default(core, m, 4096, 4096, bits, 64, activation_bits)
        c, floats = config.constants, activation_bits == FLOAT_BITS
        types = {
            "x_ptr": "*bf16" if floats else "*i8", "thin_ptr": "*fp32", "codes_ptr": "*i8", "scale_ptr": "*fp32", "up_ptr": "*fp16",
            "y_ptr": "*bf16" if c["SPLIT"] == 1 else "*fp32", "rows": "i32", "columns": "i32", "groups": "i32", "part_groups": "i32",
        }  # fmt: skip
        constants = {
            "offset_ptr": None, "bias_ptr": None, "factor_ptr": None, "residual_ptr": None, "BITS": bits, "GROUP": 64, "RANK": 32,
            "PARTS": c["PARTS"] if c["PARTS"] * c["BLOCK_M"] <= DIRECT else 1, "SPLIT": c["SPLIT"], "ACTIVATION": "", "BLOCK_M": c["BLOCK_M"], "BLOCK_N": c["BLOCK_N"], "STAGES": config.stages, "GPU": True,
        }  # fmt: skip
        if floats:
            constants["step_ptr"] = None
        else:
            types["step_ptr"] = "*fp32"
        loose = ("rows", "groups", "part_groups")
        label = f"w{bits}a{activation_bits} g64 rank 32, {m} tokens"
        found.append(Variant("linear_svd", "gemm", types, constants, config.warps, config.stages, True, label, loose))
    rows = default(core, 1024, 4096, 4096).constants["ROWS"]
    types = {
        "x_ptr": "*bf16", "smooth_ptr": "*fp32", "down_ptr": "*fp16", "codes_ptr": "*i8", "step_ptr": "*fp32", "thin_ptr": "*fp32",
        "rows": "i32", "columns": "i32", "groups": "i32", "part_groups": "i32", "shift": "fp32",
    }  # fmt: skip
    constants = {"TOP": 127, "UNSIGNED": False, "GROUP": 64, "RANK": 32, "BLOCK_M": rows, "STAGES": PREPARE.stages}
    label = "a8 g64 rank 32, 1024 tokens"
    loose = ("rows", "groups", "part_groups")
    found.append(Variant("linear_svd", "prepare", types, constants, PREPARE.warps, PREPARE.stages, True, label, loose))
    return found
