"""Product of int8 codes on integer tensor cores: the kernel of `planish::gpu_linear_int8` (kernels/gpu/linear_dynamic.py).

A program computes a tile of y transposed, (BN rows of the weight, BM tokens): the weight is the left operand, whose least tile is 64 rows
on Hopper, so that few tokens waste little, and 4-bit weights become left operands in registers there. Sums are int32 and exact. Rows of
weight and codes are `columns` wide with zeros at the end, so K is never masked.

Weights with a scale for each row are scaled once, at the end. With groups every step of the loop lies in one group, and its
integer sum is scaled and added in float32.

SPLIT > 1 is for few tiles: each of SPLIT programs sums over a part of the columns, and split_k.py adds the scaled parts in order.

On Hopper Triton waits for an integer product before it goes on (it keeps only float32 sums in flight), so a step of the loop must be
long, or two programs must share a multiprocessor; tiles.py weighs both against the bytes that a tile draws from L2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.core import Core
from ..gpu.linear_dynamic import DTYPES
from . import epilogue, nibbles, split_k, tiles
from .ahead import Variant
from .config import Config, core_of, launch, on_gpu, tuned
from .tiles import Operands

SCALED = 48
"""sums of a group that a multiprocessor scales in a clock, beside its tensor cores"""


@triton.jit
def product(
    codes_ptr, weight_ptr, scale_ptr, token_scale_ptr, token, out, tokens, outs, columns, groups, first, last,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKEN_GROUPS: tl.constexpr, PTX: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum over the steps first .. last - 1 of BK columns: (BN, BM).

    Without groups int32, the sum of products of codes (times 16 for 4-bit weights); with groups float32, scaled by the weight's
    scales, and by the tokens' where these have groups too.
    token (BM,) and out (BN,) are row numbers, codes (tokens, columns), weight (outs, columns) or (outs, columns / 2) bytes,
    scale (groups, outs), token_scale (tokens, groups).
    """
    HALF: tl.constexpr = BK // 2 if BITS == 4 else BK
    k = tl.arange(0, HALF)
    if BITS == 4:
        column = (
            k // 32
        ) * 64 + k % 32  # of the code in the low half of each byte; that in the high one is 32 to the right
        weight = weight_ptr + out.to(tl.int64)[:, None] * (columns // 2) + (first * HALF + k)[None, :]  # (BN, HALF)
    else:
        column = k
        weight = weight_ptr + out.to(tl.int64)[:, None] * columns + (first * BK + k)[None, :]  # (BN, BK)
    codes = codes_ptr + token.to(tl.int64)[:, None] * columns + (first * BK + column)[None, :]  # (BM, HALF)
    known, wanted = (token < tokens)[:, None], (out < outs)[:, None]
    total = tl.zeros((BN, BM), tl.int32 if GROUP == 0 else tl.float32)
    for step in range(first, last):
        w = tl.load(weight, wanted, 0)
        x = tl.load(codes, known, 0)
        sums = total if GROUP == 0 else tl.zeros((BN, BM), tl.int32)
        if BITS == 4:
            x_high = tl.load(codes + 32, known, 0)
            w = w.to(tl.int8, bitcast=True)
            sums = tl.dot(nibbles.low(w, PTX), x.T, sums, out_dtype=tl.int32)
            sums = tl.dot(nibbles.high(w, PTX), x_high.T, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(w, x.T, sums, out_dtype=tl.int32)
        if GROUP == 0:
            total = sums
        else:
            group = step * BK // GROUP
            step_scale = tl.load(scale_ptr + group * outs + out, out < outs, 0.0)  # (BN,)
            scaled = sums.to(tl.float32) * step_scale[:, None]
            if TOKEN_GROUPS:
                scaled *= tl.load(token_scale_ptr + token.to(tl.int64) * groups + group, token < tokens, 0.0)[None, :]
            total += scaled
        weight += HALF
        codes += BK
    return total


@triton.jit
def scaled(
    total, scale_ptr, token_scale_ptr, token_zero_ptr, total_ptr, token, out, tokens, outs, moved,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKEN_GROUPS: tl.constexpr,
):  # fmt: skip
    """The real product z float32 of what `product` gave; `token` and `out` are index tensors that broadcast to the tile, either way round.

    Zero points are taken off where `moved`, which is once for each tile of y.
    """
    z = total.to(tl.float32)
    if BITS == 4:
        z *= 0.0625
    if GROUP == 0:
        z *= tl.load(scale_ptr + out, out < outs, 0.0)
    if token_zero_ptr is not None:
        zero = tl.where(moved, tl.load(token_zero_ptr + token, token < tokens, 0.0), 0.0)
        z -= zero * tl.load(total_ptr + out, out < outs, 0.0)
    if not TOKEN_GROUPS:
        z *= tl.load(token_scale_ptr + token, token < tokens, 0.0)
    return z


@triton.jit
def linear_int8(
    codes_ptr, token_scale_ptr, token_zero_ptr, weight_ptr, scale_ptr, total_ptr, bias_ptr, factor_ptr, residual_ptr, y_ptr,
    parts_ptr, tokens, outs, columns, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKEN_GROUPS: tl.constexpr, PTX: tl.constexpr, ACTIVATION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Writes y (tokens, outs), or for SPLIT > 1 parts (SPLIT, tokens, outs) float32."""
    row, column = tiles.tile(tl.program_id(0), tokens, outs, BN, BM, BAND)
    out = row * BN + tl.arange(0, BN)
    token = column * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    each = tl.cdiv(columns // BK, SPLIT)
    first = part * each
    last = tl.minimum(first + each, columns // BK)
    total = product(codes_ptr, weight_ptr, scale_ptr, token_scale_ptr, token, out, tokens, outs, columns, groups, first, last,
                    BITS, GROUP, TOKEN_GROUPS, PTX, BN, BM, BK)  # fmt: skip
    token, out = token[None, :], out[:, None]
    z = scaled(total, scale_ptr, token_scale_ptr, token_zero_ptr, total_ptr, token, out, tokens, outs, part == 0,
               BITS, GROUP, TOKEN_GROUPS)  # fmt: skip
    if SPLIT == 1:
        epilogue.store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, token, out, tokens, outs, ACTIVATION)
    else:
        at = (part * tokens + token).to(tl.int64) * outs + out
        tl.store(parts_ptr + at, z, (token < tokens) & (out < outs))


def _operands(core: Core, bits: int, group: int) -> Operands:
    return Operands(bits / 8, 1, tiles.macs(core), SCALED if group else 0)


@functools.cache
def default(core: Core, m: int, n: int, k: int, bits: int = 8, group: int = 0) -> Config:
    """The fitting specialization that tiles.py expects to be the shortest, for m tokens, n rows and k columns."""
    return tiles.ordered(core, m, n, k, group or k, _operands(core, bits, group))[0]


def choose(core: Core, m: int, n: int, k: int, bits: int = 8, group: int = 0) -> Config:
    """The tuned specialization of the shape's bucket where its steps fit k and the groups, else `default`."""
    found = tuned(f"linear_int8.{bits}.g{group}", core, m, n, k)
    if found is not None and (group or k) % found.constants["BK"] == 0:
        return found
    return default(core, triton.next_power_of_2(m), n, k, bits, group)


def candidates(core: Core, m: int, n: int, k: int, bits: int = 8, group: int = 0) -> list[Config]:
    """What a tuning script tries: the first 32."""
    return tiles.ordered(core, m, n, k, group or k, _operands(core, bits, group))[:32]


def run(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    token_zero: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    total: torch.Tensor | None,
    bits: int,
    group: int,
    dtype: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    config: Config | None = None,
) -> torch.Tensor:
    """Output y (..., out); `config` instead of the chosen one is for tuning."""
    outs, columns = weight.shape[0], codes.shape[-1]
    tokens, groups = codes.numel() // max(columns, 1), token_scale.shape[-1]
    y = codes.new_empty((*codes.shape[:-1], outs), dtype=DTYPES[dtype])
    if not tokens:
        return y
    config = config or choose(core_of(codes), tokens, outs, columns, bits, group)
    c = config.constants
    parts = y.new_empty((c["SPLIT"], tokens, outs), dtype=torch.float32) if c["SPLIT"] > 1 else None
    factor, residual = (None if v is None else v.contiguous() for v in (factor, residual))
    launch(
        linear_int8, (triton.cdiv(outs, c["BN"]) * triton.cdiv(tokens, c["BM"]), c["SPLIT"]), config,
        codes.contiguous(), token_scale, token_zero, weight, scale, total, bias, factor, residual, y, parts,
        tokens, outs, columns, groups,
        BITS=bits, GROUP=group, TOKEN_GROUPS=groups > 1, PTX=on_gpu(codes), ACTIVATION=activation, **c,
    )  # fmt: skip
    if parts is not None:
        split_k.finish(parts, y.view(tokens, outs), bias, factor, residual, activation)
    return y


def variants(core: Core) -> list[Variant]:
    """W8A8 for one token and for many, W4A8 with a scale for each row, and in groups."""
    types = {"codes_ptr": "*i8", "token_scale_ptr": "*fp32", "scale_ptr": "*fp32", "y_ptr": "*bf16"}
    types |= {"tokens": "i32", "outs": "i32", "columns": "i32", "groups": "i32"}
    absent = ("token_zero_ptr", "total_ptr", "bias_ptr", "factor_ptr", "residual_ptr", "parts_ptr")
    made = []
    for bits, group, tokens, label in (
        (8, 0, 1, "w8a8, 1 token"), (8, 0, 1024, "w8a8, 1024 tokens"), (4, 0, 1024, "w4a8, 1024 tokens"),
        (4, 64, 1024, "w4a8 g64, 1024 tokens"),
    ):  # fmt: skip
        config = default(core, tokens, 4096, 4096, bits, group)
        more = {"weight_ptr": "*i8" if bits == 8 else "*u8"}
        if config.constants["SPLIT"] > 1:
            more["parts_ptr"] = "*fp32"
        constants: dict[str, Any] = {n: None for n in absent if n not in more}
        constants |= {
            "BITS": bits,
            "GROUP": group,
            "TOKEN_GROUPS": False,
            "PTX": True,
            "ACTIVATION": "",
            **config.constants,
        }
        unaligned = ("tokens", "groups")
        made.append(Variant("linear_int8", "linear_int8", types | more, constants, config.warps, config.stages, True, label, unaligned))  # fmt: skip
    return made
