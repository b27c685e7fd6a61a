"""New keys and values into the cache, in place: `planish::gpu_kv_write`.

    key_cache, value_cache   (batch, kv_heads, capacity, size) contiguous: codes of kernels/kv_cache.py (int8; the bits of E4M3 as uint8),
                             or floats where the format is "none"
    key_scale, value_scale   (batch, kv_heads, capacity) float32 contiguous; None where the format is "none"
    key, value               (batch, kv_heads, tokens, size), the last dimension contiguous
    length                   integers on the same device, one or one for each sequence: how many places are taken with the new ones, which go to
                             length - tokens ... length - 1. It is not looked at before the kernel runs; places beyond the capacity
                             are left out, and the caller must see to it that there are none.
    cos, sin                 ([batch or 1,] tokens, rotary), contiguous, or None: rotary embedding of the keys on their way, in float32

Codes and scales are those of `kv_cache.encode`, to the bit without rotary embedding; with it a rotated value may differ by float32 rounding,
and its code by one where it falls on a tie.
"""

from __future__ import annotations

import torch

from ...common.errors import PlanishError
from .. import kv_cache
from . import op

FORMATS = (*kv_cache.FORMATS, "none")
CODES = {"int8": torch.int8, "e4m3": torch.uint8}


def empty_cache(
    batch: int,
    kv_heads: int,
    capacity: int,
    size: int,
    format: str,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A cache of keys or of values and its scales, zeros; `dtype` is taken where the format is "none"."""
    kind = CODES.get(format, dtype)
    cache = torch.zeros((batch, kv_heads, capacity, size), dtype=kind, device=device)
    if format == "none":
        return cache, None
    return cache, torch.zeros((batch, kv_heads, capacity), dtype=torch.float32, device=device)


def rotated(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """Queries or keys (batch, heads, tokens, size) behind its rotary embedding, float32."""
    x = x.float()
    if cos is None or sin is None:
        return x
    cos, sin = (a.float().reshape(-1, 1, *a.shape[-2:]) for a in (cos, sin))  # (batch or 1, 1, tokens, rotary)
    turning, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def places(length: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """(batch, tokens) int64: where the new tokens stand."""
    ends = length.reshape(-1).long().expand(batch)
    return ends[:, None] - tokens + torch.arange(tokens, device=length.device)


def kv_write(
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
    """The definition. Raises PlanishError for a place beyond the cache."""
    batch, _, capacity, _ = key_cache.shape
    where = places(length, batch, key.shape[2])
    if bool((where < 0).any() or (where >= capacity).any()):
        raise PlanishError(
            f"{where.numel()} new tokens up to place {int(where.max())} do not fit a cache of {capacity}"
        )
    index = (torch.arange(batch)[:, None], slice(None), where)
    sides = ((key_cache, key_scale, rotated(key, cos, sin)), (value_cache, value_scale, value))
    for cache, scale, new in sides:
        if format == "none":
            cache[index] = new.to(cache.dtype).transpose(1, 2)
            continue
        assert scale is not None
        codes, steps = kv_cache.encode(new, format)
        cache[index], scale[index] = codes.transpose(1, 2), steps.transpose(1, 2)


op.register(
    "gpu_kv_write(Tensor(a!) key_cache, Tensor(b!)? key_scale, Tensor(c!) value_cache, Tensor(d!)? value_scale,"
    " Tensor key, Tensor value, Tensor length, Tensor? cos, Tensor? sin, str format) -> ()",
    kv_write,
    lambda *_: None,
)
