"""New keys and values into the cache: a block for a few tokens of one head, keys or values (kernels/gpu/kv_write.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...common.errors import PlanishError
from ..gpu.core import Core
from . import cache_codes, rotary
from .ahead import Variant
from .config import Config, launch

TOKENS = 8
"""of a block, where there are many"""


@triton.jit
def write(
    key_cache_ptr,  # (batch, kv_heads, capacity, SIZE)
    key_scale_ptr,  # (batch, kv_heads, capacity)
    value_cache_ptr,
    value_scale_ptr,
    key_ptr,  # (batch, kv_heads, tokens, SIZE) by strides
    value_ptr,
    length_ptr,
    cos_ptr,  # (batch or 1, tokens, ROTARY)
    sin_ptr,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    kv_heads,
    tokens,
    capacity,
    length_step,
    angle_step,
    FORMAT: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
):
    """Grid: token blocks, batch * kv_heads, keys and values. `length_step` and `angle_step` are 0 where sequences share length or angles."""
    pair = tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    token = tl.program_id(0) * BT + tl.arange(0, BT)  # (BT,)
    place = tl.load(length_ptr + batch * length_step).to(tl.int32) - tokens + token
    slot = pair.to(tl.int64) * capacity + place  # (BT,)
    inside = (token < tokens) & (place >= 0) & (place < capacity)
    column = tl.arange(0, P)[None, :]
    if tl.program_id(2) == 0:
        at = batch.to(tl.int64) * key_batch + head * key_head + token.to(tl.int64)[:, None] * key_token
        angle = batch * angle_step + token[:, None]
        x = rotary.load(key_ptr, at, angle, inside[:, None], column, cos_ptr, sin_ptr, SIZE, ROTARY)  # (BT, P)
        _store(x, key_cache_ptr, key_scale_ptr, slot, inside, column, FORMAT, SIZE)
    else:
        at = batch.to(tl.int64) * value_batch + head * value_head + token.to(tl.int64)[:, None] * value_token
        x = rotary.load(value_ptr, at, 0, inside[:, None], column, cos_ptr, sin_ptr, SIZE, 0)  # pyright: ignore[reportArgumentType]
        _store(x, value_cache_ptr, value_scale_ptr, slot, inside, column, FORMAT, SIZE)


@triton.jit
def _store(x, cache_ptr, scale_ptr, slot, inside, column, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    """Rows x (BT, P) float32 into the places `slot` (BT,) of a cache."""
    at, within = slot[:, None] * SIZE + column, inside[:, None] & (column < SIZE)
    if FORMAT == "none":
        tl.store(cache_ptr + at, x.to(cache_ptr.dtype.element_ty), within)
    else:
        codes, scale = cache_codes.encode(x, FORMAT)
        tl.store(cache_ptr + at, codes, within)
        tl.store(scale_ptr + slot, scale, inside)


def run(
    key_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_cache: torch.Tensor,
    value_scale: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    length: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    format: str,
) -> None:
    """The node's kernel. Raises PlanishError for shapes and types that it does not take."""
    batch, kv_heads, capacity, size = key_cache.shape
    tokens = key.shape[2]
    check(key_cache, key_scale, value_cache, value_scale, length, cos, sin, format)
    if key.shape != value.shape or key.shape[:2] != (batch, kv_heads) or key.shape[3] != size:
        raise PlanishError(
            f"kv_write: keys {list(key.shape)}, values {list(value.shape)} for a cache {list(key_cache.shape)}"
        )
    if key.numel() == 0:
        return
    key, value = in_rows(key), in_rows(value)
    config = default(tokens)
    block = config.constants["BT"]
    launch(
        write,
        (triton.cdiv(tokens, block), batch * kv_heads, 2),
        config,
        key_cache,
        key_scale,
        value_cache,
        value_scale,
        key,
        value,
        length,
        cos,
        sin,
        *key.stride()[:3],
        *value.stride()[:3],
        kv_heads,
        tokens,
        capacity,
        int(length.numel() > 1),
        angle_step(cos, tokens),
        FORMAT=format,
        SIZE=size,
        ROTARY=0 if cos is None else cos.shape[-1],
        P=padded(size),
        BT=block,
    )


def default(tokens: int) -> Config:
    """A warp for one token; several tokens to a block of a prompt."""
    return Config("write", {"BT": 1}, 1, 1) if tokens < TOKENS else Config("write", {"BT": TOKENS}, 4, 1)


def padded(size: int) -> int:
    """Columns of a tile: the next power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous rows, itself where it has them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def angle_step(cos: torch.Tensor | None, tokens: int) -> int:
    """Rows of angles from one sequence to the next, 0 where they share them."""
    return tokens if cos is not None and cos.numel() > tokens * cos.shape[-1] else 0


def check(
    key_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_cache: torch.Tensor,
    value_scale: torch.Tensor | None,
    length: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    format: str,
) -> None:
    """Raise PlanishError for a cache, a length or angles of another form than kernels/gpu/kv_write.py describes."""
    kinds = {"int8": (torch.int8,), "e4m3": (torch.uint8,), "none": (torch.float16, torch.bfloat16, torch.float32)}
    scaled = format != "none"
    if format not in kinds or key_cache.dtype not in kinds[format] or value_cache.dtype != key_cache.dtype:
        raise PlanishError(
            f"a cache of {key_cache.dtype} and {value_cache.dtype} in format '{format}'; formats: {', '.join(kinds)}"
        )
    if key_cache.shape != value_cache.shape or key_cache.shape[3] > 256 or key_cache.shape[3] % 8:
        raise PlanishError(
            f"a cache of keys {list(key_cache.shape)} and values {list(value_cache.shape)}; equal shapes, heads of 8 to 256 features by eights are taken"
        )
    for scale in (key_scale, value_scale):
        if (scale is not None) != scaled or (
            scale is not None and (scale.shape != key_cache.shape[:3] or scale.dtype != torch.float32)
        ):
            raise PlanishError(
                f"scales of a cache {list(key_cache.shape)} in format '{format}' are (batch, heads, capacity) float32, or none"
            )
    if not all(t is None or t.is_contiguous() for t in (key_cache, key_scale, value_cache, value_scale, cos, sin)):
        raise PlanishError("a cache, its scales and its angles must be contiguous")
    if length.numel() not in (1, key_cache.shape[0]) or length.dtype not in (torch.int32, torch.int64):
        raise PlanishError(
            f"length {list(length.shape)} {length.dtype}; one integer, or one for each of {key_cache.shape[0]} sequences"
        )
    if (cos is None) != (sin is None) or (
        cos is not None and (cos.shape[-1] % 2 or cos.shape[-1] > key_cache.shape[3])
    ):
        raise PlanishError("rotary embedding takes cos and sin (tokens, even number of features) together")


def types(x: str, format: str, rotates: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """(types of the tensors that both kernels of a cache take, the absent ones) for activations of type x: '*bf16'."""
    code = {"int8": "*i8", "e4m3": "*u8", "none": x}[format]
    given = {"key_cache_ptr": code, "value_cache_ptr": code, "length_ptr": "*i32"}
    absent: dict[str, Any] = {}
    for names, there, kind in (
        (("key_scale_ptr", "value_scale_ptr"), format != "none", "*fp32"),
        (("cos_ptr", "sin_ptr"), rotates, "*fp32"),
    ):
        for name in names:
            if there:
                given[name] = kind
            else:
                absent[name] = None
    return given, absent


def variants(core: Core) -> list[Variant]:
    """One token of Llama's heads, and a prompt."""
    found = []
    strides = {f"{k}_{s}": "i32" for k in ("key", "value") for s in ("batch", "head", "token")}
    for tokens, format in ((1, "int8"), (512, "e4m3")):
        config = default(tokens)
        given, absent = types("*bf16", format, True)
        numbers = dict.fromkeys(("kv_heads", "tokens", "capacity", "length_step", "angle_step"), "i32")
        found.append(
            Variant(
                "kv_write",
                "write",
                {**given, "key_ptr": "*bf16", "value_ptr": "*bf16", **strides, **numbers},
                {**absent, "FORMAT": format, "SIZE": 128, "ROTARY": 128, "P": 128, **config.constants},
                config.warps,
                config.stages,
                matrix=False,
                label=f"{format}, {tokens} tokens, rotary embedding",
                unaligned=("kv_heads", "tokens", "length_step", "angle_step"),
            )
        )
    return found
