"""One step of decoding over a long key/value cache, for the GPU benchmark. Heads of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from planish.kernels.gpu import attention_decode, kv_write
from torch.nn import functional as F

HEADS, KEY_HEADS, SIZE = 32, 8, 128


class Decode:
    """Attention of one new token over `context` positions, caches in 8 bits and in bfloat16, in copies that outgrow the L2 cache."""

    def __init__(self, batch: int, context: int, form: str, device: torch.device, copies: Callable[[int], int]) -> None:
        dense = 2 * batch * KEY_HEADS * context * SIZE
        """elements of keys and values"""
        self.operations = 4 * batch * HEADS * context * SIZE
        self.query = torch.randn(batch, HEADS, 1, SIZE, dtype=torch.bfloat16, device=device)
        self.length = torch.tensor([context], dtype=torch.int32, device=device)
        self.form = form
        self.caches = [self._cache(batch, context, device) for _ in range(copies(dense))]
        self.stored_bytes = sum(t.numel() * t.element_size() for t in self.caches[0] if t is not None)
        self.ours = [partial(self._attend, cache) for cache in self.caches]
        shape = (batch, KEY_HEADS, context, SIZE)
        pairs = [
            [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2)]
            for _ in range(copies(2 * dense))
        ]
        self.base = [partial(F.scaled_dot_product_attention, self.query, k, v, enable_gqa=True) for k, v in pairs]

    def check(self) -> float:
        """Largest error of the first copy against the reference on the CPU in float32, relative to the largest value."""
        there = [None if t is None else t.cpu() for t in self.caches[0]]
        node = attention_decode.attention_decode
        truth = node(self.query.float().cpu(), *there, self.length.cpu(), None, None, SIZE**-0.5, self.form)
        return float((self.ours[0]().float().cpu() - truth).abs().max() / truth.abs().max())

    def _attend(self, cache: list[torch.Tensor | None]) -> torch.Tensor:
        node = torch.ops.planish.gpu_attention_decode.default
        return node(self.query, *cache, self.length, None, None, SIZE**-0.5, self.form)

    def _cache(self, batch: int, context: int, device: torch.device) -> list[torch.Tensor | None]:
        """Key, its scale, value, its scale, as the write kernel stores random ones."""
        sides = [
            kv_write.empty_cache(batch, KEY_HEADS, context, SIZE, self.form, torch.bfloat16, device) for _ in range(2)
        ]
        cache = [t for side in sides for t in side]
        new = [torch.randn(batch, KEY_HEADS, context, SIZE, dtype=torch.bfloat16, device=device) for _ in range(2)]
        torch.ops.planish.gpu_kv_write.default(*cache, *new, self.length, None, None, self.form)
        return cache
