"""The kernel of `planish::gpu_quantize_tokens` (kernels/gpu/quantize_tokens.py): a token is read once and its codes written once.

A program holds ROWS tokens as a tile (ROWS, GROUPS, GROUP) in registers. A rotation multiplies the tile by Sylvester's matrices on tensor
cores, one to three factors of order 16 to 64, whose entries are computed; h goes in as the sum of two bfloat16, which leaves 2^-16 of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.core import Core
from ..gpu.quantize_tokens import DTYPES, LEAST, LEAST_FLOAT8, PER_TENSOR, TOPS, check, groups_of, tensor_scale
from .ahead import Variant
from .config import Config, core_of, launch, tuned
from .norm import loaded, normed

ROUNDING = tl.constexpr(12582912.0)
"""1.5 2^23: added to a float32 below 2^22 it rounds it half to even, and leaves the integer in the low bits"""


@triton.jit
def sylvester(ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """(ORDER, ORDER) bfloat16: blocks of Sylvester's matrix of order BLOCK, entries +-1, on the diagonal."""
    i = tl.arange(0, ORDER)[:, None]
    j = tl.arange(0, ORDER)[None, :]
    odd = i & j & (BLOCK - 1)  # the entry is -1 where this has an odd number of ones
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return tl.where(i // BLOCK == j // BLOCK, 1.0 - 2.0 * (odd & 1).to(tl.float32), 0.0).to(tl.bfloat16)


@triton.jit
def times(h, matrix):
    """Product of h (m, n) float32 and a matrix (n, n) of small integers, bfloat16."""
    high = h.to(tl.bfloat16)
    low = (h - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(high, matrix, tl.dot(low, matrix))


@triton.jit
def turned(h, SIZE: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr):
    """SIZE values in blocks (BLOCK / FACTOR, FACTOR): the last dimension by Sylvester's matrix of order FACTOR, then in front: (SIZE,)."""
    ORDER: tl.constexpr = FACTOR if FACTOR > 16 else 16  # pyright: ignore[reportAssignmentType]
    z = times(tl.reshape(h, (SIZE // ORDER, ORDER)), sylvester(ORDER, FACTOR))
    z = tl.reshape(z, (SIZE // BLOCK, BLOCK // FACTOR, FACTOR))
    return tl.reshape(tl.trans(z, 0, 2, 1), (SIZE,))


@triton.jit
def rotated(h, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's SIZE values, a power of two, in blocks of BLOCK by the orthogonal matrix: (SIZE,).

    It is the Kronecker product of one to three factors of order 64 at most; each turn brings the next one to the end, the last turn all
    of them back into order.
    """
    if BLOCK <= 64:
        z = turned(h, SIZE, BLOCK, BLOCK)
    elif BLOCK <= 1024:
        LAST: tl.constexpr = 16 if BLOCK <= 256 else 32  # pyright: ignore[reportAssignmentType]
        z = turned(turned(h, SIZE, BLOCK, LAST), SIZE, BLOCK, BLOCK // LAST)
    else:
        THIRD: tl.constexpr = 16 if BLOCK <= 4096 else 32  # pyright: ignore[reportAssignmentType]
        FIRST: tl.constexpr = 16  # pyright: ignore[reportAssignmentType]
        SECOND: tl.constexpr = BLOCK // (FIRST * THIRD)
        z = turned(turned(turned(h, SIZE, BLOCK, THIRD), SIZE, BLOCK, SECOND), SIZE, BLOCK, FIRST)
    return z * (1.0 / tl.sqrt(BLOCK * 1.0))


@triton.jit
def quotient(h, scale):
    """The float32 nearest to h / scale: Markstein's correction of the product with the reciprocal."""
    reciprocal = tl.div_rn(1.0, scale)
    near = h * reciprocal
    return tl.fma(tl.fma(-near, scale, h), reciprocal, near)


@triton.jit
def quantize_tokens(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, smooth_ptr, signs_ptr, codes_ptr, scale_ptr, zero_ptr, low_ptr, y_ptr, sum_ptr,
    rows, channels, columns, groups, eps,
    NORM: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, PASS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Codes (rows, columns) and scale (rows, groups) of ROWS tokens; STEP columns share a scale, GROUP is the next power of two.

    PASS 0: scales of the tokens. Per tensor, PASS 1: only low and high (2, rows) of the tokens; PASS 2: codes with the 0-d scale and zero.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    member = tl.arange(0, GROUP)[None, None, :]
    channel = group * STEP + member
    known = (row < rows) & (member < STEP)
    inside = known & (channel < channels)
    first: tl.constexpr = PASS != 2
    h = loaded(x_ptr, residual_ptr, sum_ptr, row, channel, rows, channels, inside)
    if NORM != "":
        h = normed(h, weight_ptr, bias_ptr, channel, channels, inside, eps, NORM)
    if first and y_ptr is not None:
        tl.store(y_ptr + row.to(tl.int64) * channels + channel, h.to(y_ptr.dtype.element_ty), inside)
    if smooth_ptr is not None:
        h *= tl.load(smooth_ptr + channel, channel < channels, 0.0).to(tl.float32)
    if signs_ptr is not None:
        h *= tl.load(signs_ptr + channel, channel < channels, 0.0).to(tl.float32)
    if BLOCK > 0:
        h = tl.reshape(rotated(h, ROWS * GROUPS * GROUP, BLOCK), (ROWS, GROUPS, GROUP))
    if PASS == 1:
        low = tl.min(
            tl.min(h, 2, keep_dims=True), 1, keep_dims=True
        )  # (ROWS, 1, 1); what is outside is 0, and 0 is in the range
        high = tl.max(tl.max(h, 2, keep_dims=True), 1, keep_dims=True)
        tl.store(low_ptr + row, low, row < rows)
        tl.store(low_ptr + rows + row, high, row < rows)
    else:
        if PASS == 2:
            scale = tl.load(scale_ptr)
            q = quotient(h, scale)
            q = (q + ROUNDING) - ROUNDING + tl.load(zero_ptr)
            q = tl.minimum(tl.maximum(q, -128.0), 127.0).to(tl.int8)
        else:
            largest = tl.max(tl.abs(h), 2, keep_dims=True)  # (ROWS, GROUPS, 1)
            scale = tl.div_rn(largest, TOP)
            if FORMAT == "e4m3" or FORMAT == "e5m2":  # noqa: PLR1714 - Triton compares strings one by one
                scale = tl.maximum(scale, LEAST)
            else:
                scale = tl.where(largest > LEAST, scale, 1.0)
            tl.store(scale_ptr + row.to(tl.int64) * groups + group, scale, (row < rows) & (group < groups))
            q = quotient(h, scale)
            if FORMAT == "e4m3":
                q = tl.minimum(tl.maximum(q, -TOP), TOP).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            elif FORMAT == "e5m2":
                q = tl.minimum(tl.maximum(q, -TOP), TOP).to(tl.float8e5).to(tl.uint8, bitcast=True)
            else:
                q = (q + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)
        q = tl.where(channel < channels, q, 0)
        tl.store(codes_ptr + row.to(tl.int64) * columns + channel, q, known & (channel < columns))


def _tile(m: int, k: int, columns: int, group: int) -> tuple[dict[str, int], int]:
    """(block sizes, values of a token's tile)."""
    wide = max(k, columns)
    step = group if group > 0 else wide
    each = triton.next_power_of_2(max(step, 16))
    groups = triton.next_power_of_2(triton.cdiv(wide, step))
    return {"GROUPS": groups, "GROUP": each, "STEP": step if group > 0 else each}, groups * each


def default(core: Core, m: int, n: int, k: int, group: int = 0, block: int = 0) -> Config:
    """One token a program, more where they are short, for m tokens of k channels in rows of n codes; 16 values of a thread."""
    tile, width = _tile(m, k, n, group)
    least = max(512, 16 * block) if 0 < block <= 64 else 512  # the product of a rotation has 16 rows at least
    rows = max(1, min(least // width, triton.next_power_of_2(m))) if not block else max(1, least // width)
    warps = max(1, min(16 if width < (1 << 15) else 32, rows * width // 512))
    return Config("rows", {"ROWS": rows, **tile}, warps if not block else max(4, warps), 1)


def choose(core: Core, m: int, n: int, k: int, group: int = 0, block: int = 0) -> Config:
    """The specialization for m tokens of k channels in rows of n codes."""
    found = tuned("quantize_tokens", core, m, n, k) if not block and group <= 0 else None
    return found or default(core, m, n, k, group, block)


def candidates(core: Core, m: int, n: int, k: int) -> list[Config]:
    """What a tuning script tries, without groups and rotation."""
    tile, width = _tile(m, k, n, 0)
    return [
        Config("rows", {"ROWS": rows, **tile}, warps, 1)
        for rows in (1, 2, 4)
        for warps in (1, 2, 4, 8, 16, 32)
        if 4 <= rows * width // (32 * warps) <= 64
    ]


def run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    smooth: torch.Tensor | None,
    signs: torch.Tensor | None,
    norm: str,
    eps: float,
    block: int,
    keep: bool,
    format: str,
    group: int,
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, zero, y, sum) of x (..., n)."""
    check(x, norm, block, format, group, columns)
    x = x.contiguous()
    channels, tokens = x.shape[-1], x.shape[:-1]
    rows, groups = x.numel() // max(channels, 1), groups_of(channels, group)
    codes = x.new_empty((*tokens, columns), dtype=torch.uint8 if format in DTYPES else torch.int8)
    scale = x.new_empty((*tokens, groups), dtype=torch.float32)
    y = torch.empty_like(x) if keep else x.new_empty(0)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    zero = x.new_empty((*tokens, 1) if group == PER_TENSOR else (0,), dtype=torch.float32)
    if not x.numel():
        return codes, scale, zero, y, total
    config = choose(core_of(x), rows, columns, channels, group, block)
    residual = None if residual is None else residual.contiguous()
    grid = (triton.cdiv(rows, config.constants["ROWS"]),)
    constants = {
        "NORM": norm, "BLOCK": block, "FORMAT": format, "TOP": TOPS[format],
        "LEAST": LEAST_FLOAT8 if format in DTYPES else LEAST, **config.constants,
    }  # fmt: skip

    def start(number: int, scale: torch.Tensor | None, zero: torch.Tensor | None, low: torch.Tensor | None) -> None:
        launch(
            quantize_tokens, grid, config, x, residual, weight, bias, smooth, signs, codes, scale, zero, low,
            y if keep else None, total, rows, channels, columns, groups, eps, PASS=number, **constants,
        )  # fmt: skip

    if group == PER_TENSOR:
        extremes = x.new_empty((2, rows), dtype=torch.float32)  # least and largest value of each token
        start(1, None, None, extremes)
        one, shift = tensor_scale(extremes[0].amin(), extremes[1].amax())
        start(2, one, shift, None)
        return codes, scale.copy_(one.expand_as(scale)), zero.copy_(shift.expand_as(zero)), y, total
    start(0, scale, None, None)
    return codes, scale, zero, y, total


def variants(core: Core) -> list[Variant]:
    """After RMSNorm with a residual; groups; a rotation; 8-bit floats where the core has them."""
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "sum_ptr": "*bf16"}
    types |= {"rows": "i32", "channels": "i32", "columns": "i32", "groups": "i32", "eps": "fp32"}
    fused = {"residual_ptr": "*bf16", "weight_ptr": "*bf16"}
    pointers = ("residual_ptr", "weight_ptr", "bias_ptr", "smooth_ptr", "signs_ptr", "zero_ptr", "low_ptr", "y_ptr")
    cases = [
        ("int8 after RMSNorm with a residual, 4096", fused, "rms", 0, "int8", 0),
        ("int8, groups of 64, 4096", {}, "", 0, "int8", 64),
        ("int8 after a rotation of 4096", {"signs_ptr": "*fp32"}, "", 4096, "int8", 0),
    ]
    if core.fp8:
        cases.append(("e4m3, 4096", {"codes_ptr": "*u8"}, "", 0, "e4m3", 0))
    made = []
    for label, more, norm, block, format, group in cases:
        config = default(core, 1024, 4096, 4096, group, block)
        constants: dict[str, Any] = {**{n: None for n in pointers if n not in more}, **config.constants}
        constants |= {"NORM": norm, "BLOCK": block, "FORMAT": format, "TOP": TOPS[format], "PASS": 0}
        constants["LEAST"] = LEAST_FLOAT8 if format in DTYPES else LEAST
        made.append(
            Variant("quantize_tokens", "quantize_tokens", types | more, constants, config.warps, config.stages,
                    block > 0, label, ("rows", "groups") if group <= 0 else ("rows",))
        )  # fmt: skip
    return made
