"""Attention to a cache of codes (kernels/gpu/attention_decode.py): flash attention whose keys are split over blocks where tokens are few.

The queries that share a head of the cache are the rows of one product: row r is the token r // GROUP and the query head
r % GROUP, so that tensor cores are used at one token too, and a tile of the cache is converted once for all of them.
A block goes over its part of the keys in tiles of BN, keeping for each row the largest score m, the sum l of exponentials, and the
weighted sum of values (Dao et al. 2022; online softmax: Milakov and Gimelshein 2018). With PARTS > 1 each part leaves (m, l, sum), which a
second kernel joins in a fixed order (Flash-Decoding: Dao et al. 2023). The length is read where it lies: the number of parts is fixed, what
a part covers follows from the length, and parts beyond it end at once.

Scores and exponentials are in base 2: log2(e) is part of the scale.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...common.errors import PlanishError
from ..gpu.core import Core
from . import cache_codes, rotary
from .ahead import Variant
from .config import Config, core_of, launch, on_gpu, tuned
from .kv_write import angle_step, check, in_rows, padded, types

LOG2E = math.log2(math.e)
LOWEST = tl.constexpr(-1e30)  # of a row that has seen nothing: finite, so that differences are
WIDE = tl.constexpr(16)  # features that a thread loads at once: a tile of that third dimension gets copies of 16 bytes
WIDEST = 64
"""most parts"""
WAVES = 2
"""blocks for each multiprocessor that parts are made for"""


@triton.jit
def _parts(length, PARTS: tl.constexpr, BN: tl.constexpr):
    """Keys of one part: equal shares of the length in whole tiles."""
    return tl.cdiv(tl.cdiv(length, PARTS), BN) * BN


@triton.jit
def attend(
    query_ptr,  # (batch, heads, tokens, SIZE) by strides
    key_cache_ptr,  # (batch, kv_heads, capacity, SIZE)
    key_scale_ptr,  # (batch, kv_heads, capacity)
    value_cache_ptr,
    value_scale_ptr,
    length_ptr,
    cos_ptr,  # (batch or 1, tokens, ROTARY)
    sin_ptr,
    y_ptr,  # (batch, tokens, heads, SIZE); of parts: (batch * kv_heads, PARTS, tokens * GROUP, SIZE) float32
    state_ptr,  # of parts: (batch * kv_heads, PARTS, tokens * GROUP, 2) float32, m and l
    scale,
    query_batch,
    query_head,
    query_token,
    kv_heads,
    tokens,
    capacity,
    length_step,
    angle_step,
    FORMAT: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    GPU: tl.constexpr,
):
    """Grid: row blocks, PARTS, batch * kv_heads."""
    part, pair = tl.program_id(1), tl.program_id(2)
    batch, head = pair // kv_heads, pair % kv_heads
    length = tl.load(length_ptr + batch * length_step).to(tl.int32)
    share = _parts(length, PARTS, BN)
    low = part * share
    if low >= length:
        return
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    row = block * BM + tl.arange(0, BM)[:, None]  # (BM, 1)
    token, inside = row // GROUP, row < tokens * GROUP
    column = tl.arange(0, P)[None, :]
    # keys that a row sees, that the first row of the block sees, and that the last does
    seen = length - tokens + 1 + token
    all_see = length - tokens + 1 + block * BM // GROUP
    high = tl.minimum(tl.minimum(low + share, length), length - tokens + 1 + (block * BM + BM - 1) // GROUP)
    free = low + tl.maximum(tl.minimum(high, all_see) - low, 0) // BN * BN  # below it no tile needs a mask

    at = batch.to(tl.int64) * query_batch + (head * GROUP + row % GROUP) * query_head + token.to(tl.int64) * query_token
    query = rotary.load(query_ptr, at, batch * angle_step + token, inside, column, cos_ptr, sin_ptr, SIZE, ROTARY)
    steps = scale * cache_codes.factor(FORMAT)
    if FORMAT == "none":
        operand = query.to(key_cache_ptr.dtype.element_ty)  # (BM, P)
        steps = tl.full((BM, 1), steps, tl.float32)
    else:
        largest = tl.maximum(tl.max(tl.abs(query), 1, keep_dims=True), cache_codes.LEAST)
        operand = (query * (1.0 / largest)).to(tl.float16)
        steps = steps * largest
    first = pair.to(tl.int64) * capacity
    key_cache_ptr += first * SIZE
    value_cache_ptr += first * SIZE
    if FORMAT != "none":
        key_scale_ptr += first
        value_scale_ptr += first

    most = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mixed = tl.zeros((BM, P), tl.float32)
    unit = tl.full((), cache_codes.LEAST, tl.float32)  # what `mixed` is in: the largest scale of a value so far
    for start in range(low, free, BN):
        most, total, mixed, unit = _step(
            operand, steps, seen, start, high, most, total, mixed, unit, key_cache_ptr, key_scale_ptr, value_cache_ptr, value_scale_ptr,
            False, FORMAT, SIZE, P, BN, GPU,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    for start in range(free, high, BN):
        most, total, mixed, unit = _step(
            operand, steps, seen, start, high, most, total, mixed, unit, key_cache_ptr, key_scale_ptr, value_cache_ptr, value_scale_ptr,
            True, FORMAT, SIZE, P, BN, GPU,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    if FORMAT != "none":
        mixed *= unit * cache_codes.factor(FORMAT)
    within = inside & (column < SIZE)
    if PARTS == 1:
        at = ((batch.to(tl.int64) * tokens + token) * kv_heads + head) * GROUP + row % GROUP
        mixed = mixed / total[:, None]
        tl.store(y_ptr + at * SIZE + column, mixed.to(y_ptr.dtype.element_ty), within)
    else:
        at = (pair.to(tl.int64) * PARTS + part) * (tokens * GROUP) + row
        tl.store(y_ptr + at * SIZE + column, mixed, within)
        tl.store(state_ptr + 2 * at, most[:, None], inside)
        tl.store(state_ptr + 2 * at + 1, total[:, None], inside)


@triton.jit
def _step(
    operand, steps, seen, start, high, most, total, mixed, unit, key_cache_ptr, key_scale_ptr, value_cache_ptr, value_scale_ptr,
    MASKED: tl.constexpr, FORMAT: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values: the new (m, l, sum, its unit). `steps` (BM, 1) is what scores are multiplied by, besides the keys' scales."""
    place = start + tl.arange(0, BN)  # (BN,)
    here = (place < high) if MASKED else (place >= 0)
    feature = tl.arange(0, P // WIDE)[None, :, None] * WIDE + tl.arange(0, WIDE)[None, None, :]  # (1, P / WIDE, WIDE)
    at, within = place.to(tl.int64)[:, None, None] * SIZE + feature, here[:, None, None] & (feature < SIZE)
    codes = tl.load(key_cache_ptr + at, within, 0)  # (BN, P / WIDE, WIDE)
    key = tl.reshape(codes if FORMAT == "none" else cache_codes.decode(codes, FORMAT, GPU, True), (BN, P))  # pyright: ignore[reportArgumentType]
    scores = tl.dot(operand, tl.trans(key), input_precision="ieee") * steps  # (BM, BN)
    if FORMAT != "none":
        scores *= tl.load(key_scale_ptr + place, here, 0.0)[None, :]
    if MASKED:
        scores = tl.where(place[None, :] < tl.minimum(seen, high), scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])
    before = tl.exp2(most - new)
    total = total * before + tl.sum(weights, 1)
    codes = tl.load(value_cache_ptr + at, within, 0)
    value = tl.reshape(codes if FORMAT == "none" else cache_codes.decode(codes, FORMAT, GPU, False), (BN, P))  # pyright: ignore[reportArgumentType]
    if FORMAT == "none":
        mixed = tl.dot(weights.to(codes.dtype), value, mixed * before[:, None], input_precision="ieee")
    else:
        scale = tl.load(value_scale_ptr + place, here, 0.0)
        largest = tl.maximum(unit, tl.max(scale, 0))
        weights = (weights * (scale / largest)[None, :]).to(tl.float16)
        mixed = mixed * (before * (unit / largest))[:, None]
        mixed = tl.dot(weights, value, mixed)  # (BM, P)
        unit = largest
    return new, total, mixed, unit


@triton.jit
def merge(
    part_ptr,  # (batch * kv_heads, PARTS, tokens * GROUP, SIZE) float32
    state_ptr,  # (batch * kv_heads, PARTS, tokens * GROUP, 2) float32
    length_ptr,
    y_ptr,  # (batch, tokens, heads, SIZE)
    kv_heads,
    tokens,
    length_step,
    SIZE: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: tokens * GROUP, batch * kv_heads. Parts that a length leaves out were not written."""
    row, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    length = tl.load(length_ptr + batch * length_step).to(tl.int32)
    part, column = tl.arange(0, PARTS), tl.arange(0, P)
    there = part < tl.cdiv(length, _parts(length, PARTS, BN))
    at = (pair.to(tl.int64) * PARTS + part) * (tokens * GROUP) + row  # (PARTS,)
    most = tl.load(state_ptr + 2 * at, there, LOWEST)
    total = tl.load(state_ptr + 2 * at + 1, there, 0.0)
    weight = tl.exp2(most - tl.max(most, 0))
    parts = tl.load(part_ptr + at[:, None] * SIZE + column[None, :], there[:, None] & (column < SIZE)[None, :], 0.0)
    y = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)  # (P,) # pyright: ignore[reportOperatorIssue]
    out = ((batch.to(tl.int64) * tokens + row // GROUP) * kv_heads + head) * GROUP + row % GROUP
    tl.store(y_ptr + out * SIZE + column, y.to(y_ptr.dtype.element_ty), column < SIZE)


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_cache: torch.Tensor,
    value_scale: torch.Tensor | None,
    length: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scale: float,
    format: str,
) -> torch.Tensor:
    """The node's kernels. Raises PlanishError for shapes and types that they do not take."""
    batch, heads, tokens, size = query.shape
    kv_heads, capacity = key_cache.shape[1:3]
    check(key_cache, key_scale, value_cache, value_scale, length, cos, sin, format)
    if key_cache.shape[0] != batch or heads % kv_heads or key_cache.shape[3] != size:
        raise PlanishError(f"attention_decode: queries {list(query.shape)} for a cache {list(key_cache.shape)}")
    y = query.new_empty((batch, tokens, heads, size))
    if y.numel() == 0:
        return y.transpose(1, 2)
    core = core_of(query)
    config = choose(core, batch, tokens, heads, kv_heads, size, capacity, format)
    group, pairs, query = heads // kv_heads, batch * kv_heads, in_rows(query)
    rows, parts = tokens * group, config.constants["PARTS"]
    out, state = y, None
    if parts > 1:
        out = query.new_empty((pairs, parts, rows, size), dtype=torch.float32)
        state = query.new_empty((pairs, parts, rows, 2), dtype=torch.float32)
    step, shape = int(length.numel() > 1), {"SIZE": size, "P": padded(size), "GROUP": group}
    launch(
        attend,
        (triton.cdiv(rows, config.constants["BM"]), parts, pairs),
        config,
        query,
        key_cache,
        key_scale,
        value_cache,
        value_scale,
        length,
        cos,
        sin,
        out,
        state,
        scale * LOG2E,
        *query.stride()[:3],
        kv_heads,
        tokens,
        capacity,
        step,
        angle_step(cos, tokens),
        FORMAT=format,
        ROTARY=0 if cos is None else cos.shape[-1],
        **shape,
        **config.constants,
        GPU=on_gpu(query),
    )
    if parts > 1:
        joined = {"BN": config.constants["BN"], "PARTS": parts}
        launch(merge, (rows, pairs), MERGE, out, state, length, y, kv_heads, tokens, step, **shape, **joined)
    return y.transpose(1, 2)


MERGE = Config("merge", {}, 4, 1)


def choose(
    core: Core, batch: int, tokens: int, heads: int, kv_heads: int, size: int, capacity: int, format: str
) -> Config:
    """The tuned specialization, else `default`; the key's shape is (batch * tokens, heads * size, capacity)."""
    name = f"attention_decode.{format}.{heads // kv_heads}"
    found = tuned(name, core, batch * tokens, heads * size, capacity)
    return found or default(core, batch, tokens, heads, kv_heads, size, capacity, format)


def default(
    core: Core, batch: int, tokens: int, heads: int, kv_heads: int, size: int, capacity: int, format: str
) -> Config:
    """Rows in one block as far as 64 go; as many parts as fill the device twice, each of two tiles at least.

    A warp of the older tensor cores holds its operands in registers, and for a prompt all of a tile: eight warps share it there.
    """
    rows, wide = tokens * (heads // kv_heads), padded(size) > 128
    block = min(64, max(16, triton.next_power_of_2(rows)))
    tile, warps = 32 if wide or format == "none" else 64, 4
    if block == 64 and (wide or not core.warp_groups):
        warps = 8
        if not core.warp_groups or format == "none":
            block, tile = 32 if wide else 64, 64
    blocks = batch * kv_heads * triton.cdiv(rows, block)
    parts = triton.next_power_of_2(max(1, WAVES * core.multiprocessors // blocks))
    parts = min(parts, WIDEST, triton.next_power_of_2(triton.cdiv(capacity, 2 * tile)))
    stages = 3 if core.shared_bytes > 120_000 and not wide and block < 64 else 2
    return Config("split" if parts > 1 else "whole", {"BM": block, "BN": tile, "PARTS": parts}, warps, stages)


def candidates(
    core: Core, batch: int, tokens: int, heads: int, kv_heads: int, size: int, capacity: int, format: str
) -> list[Config]:
    """What tuning tries: tiles, parts around the default, warps and stages."""
    base = default(core, batch, tokens, heads, kv_heads, size, capacity, format)
    few = base.constants["PARTS"]
    found = []
    for tile in (32, 64, 128):
        for parts in sorted({max(1, few // 2), few, min(2 * few, WIDEST)}):
            for warps, stages in ((4, 2), (4, 3), (8, 2)):
                found.append(Config(base.form, {**base.constants, "BN": tile, "PARTS": parts}, warps, stages))
    return found


CASES = (
    ("int8", 128, 1, True),
    ("e4m3", 64, 1, False),
    ("none", 128, 1, False),
    ("int8", 128, 512, False),
    ("e4m3", 256, 512, True),
)
"""(format, head size, tokens, rotary embedding) of `variants`; 32 heads on 8, a cache of 8192"""


def variants(core: Core) -> list[Variant]:
    """One token and a prompt, and the joining of parts."""
    found = []
    for format, size, tokens, rotates in CASES:
        config = default(core, 1, tokens, 32, 8, size, 8192, format)
        given, absent = types("*bf16", format, rotates)
        split = config.constants["PARTS"] > 1
        numbers = (
            "query_batch",
            "query_head",
            "query_token",
            "kv_heads",
            "tokens",
            "capacity",
            "length_step",
            "angle_step",
        )
        given |= {
            "query_ptr": "*bf16",
            "y_ptr": "*fp32" if split else "*bf16",
            "scale": "fp32",
            **dict.fromkeys(numbers, "i32"),
        }
        if split:
            given["state_ptr"] = "*fp32"
        else:
            absent["state_ptr"] = None
        shape = {
            "FORMAT": format,
            "SIZE": size,
            "ROTARY": size if rotates else 0,
            "P": padded(size),
            "GROUP": 4,
            "GPU": True,
        }
        found.append(
            Variant(
                "attention_decode",
                "attend",
                given,
                {**absent, **shape, **config.constants},
                config.warps,
                config.stages,
                label=f"{format}, head size {size}, {tokens} tokens",
                unaligned=("kv_heads", "tokens", "length_step", "angle_step"),
            )
        )
    types_of = {"part_ptr": "*fp32", "state_ptr": "*fp32", "length_ptr": "*i32", "y_ptr": "*bf16"}
    numbers = dict.fromkeys(("kv_heads", "tokens", "length_step"), "i32")
    shape = {"SIZE": 128, "P": 128, "GROUP": 4, "BN": 64, "PARTS": 32}
    merging = Variant(
        "attention_decode",
        "merge",
        types_of | numbers,
        shape,
        MERGE.warps,
        MERGE.stages,
        matrix=False,
        label="joining 32 parts",
        unaligned=tuple(numbers),
    )
    return [*found, merging]
