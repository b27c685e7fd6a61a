"""Causal attention of new tokens to a cache of 8 bits, or of floats: `planish::gpu_attention_decode`.

    y = softmax(query keys^T * scale) values        new token i sees the places 0 ... length - tokens + i

    query                    (batch, heads, tokens, size), the last dimension contiguous; y has its type and shape, and the strides of
                             (batch, tokens, heads, size), so that joining the heads behind it moves nothing
    key_cache … sin          as in kv_write.py; `length` counts the new tokens, which are in the cache already. heads is a multiple of
                             kv_heads: each is shared by heads / kv_heads queries in a row
    rotary embedding         of the query where cos and sin are given, in float32

Numbers. Scales are not multiplied into the cache: those of keys stand on the scores, those of values on the probabilities. With codes, both
matrix products have float16 operands whatever the query's type is: codes are exact in it, and so are bounded a query divided by its
largest magnitude and a probability by the largest scale of its tile. Sums are float32. With u = 2^-11 and r = the largest
sum_c (|query_c| + 2^-14 max |query|) |key_c| * scale of a row, the error against exact arithmetic on the same codes is at most

    (exp(2 r (u + 2^-15)) - 1 + 2 u + 2^-15 + 2^-25 length) * max |value|

before y is rounded to its type. With floats the operands have the cache's type and u is half a unit in the last place of it.
"""

from __future__ import annotations

import torch

from .. import kv_cache
from . import op
from .kv_write import empty_cache, places, rotated

__all__ = ["attention_decode", "empty_cache"]


def attention_decode(
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
    """The definition, in float32: (batch, heads, tokens, size) of the query's type."""
    batch, heads, tokens, _ = query.shape
    group = heads // key_cache.shape[1]
    last = places(length, batch, tokens)  # (batch, tokens)
    end = int(last.max()) + 1
    sides = ((key_cache, key_scale), (value_cache, value_scale))
    key, value = (_values(c, s, end, format).repeat_interleave(group, 1) for c, s in sides)  # (batch, heads, end, size)
    hidden = torch.arange(end) > last[:, None, :, None]  # (batch, 1, tokens, end)
    scores = rotated(query, cos, sin) @ key.transpose(2, 3) * scale
    mixed = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value
    return _shape(query).copy_(mixed)


def _values(cache: torch.Tensor, scale: torch.Tensor | None, end: int, format: str) -> torch.Tensor:
    """The first `end` places of a cache in float32."""
    if scale is None:
        return cache[:, :, :end].float()
    return kv_cache.decode(cache[:, :, :end], scale[:, :, :end], format)


def _shape(query: torch.Tensor, *_: object) -> torch.Tensor:
    batch, heads, tokens, size = query.shape
    return query.new_empty((batch, tokens, heads, size)).transpose(1, 2)


op.register(
    "gpu_attention_decode(Tensor query, Tensor key_cache, Tensor? key_scale, Tensor value_cache, Tensor? value_scale,"
    " Tensor length, Tensor? cos, Tensor? sin, float scale, str format) -> Tensor",
    attention_decode,
    _shape,
)
