"""NF4 (Dettmers et al. 2023, QLoRA): 4-bit weights at the quantiles of a normal distribution; bytes as bitsandbytes stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..blocks import Linear
from ..moments import Moments
from .codebook import coded, stored
from .linears import Linears, Replacement, Sizes


class Nf4(Linears):
    """Weights as NF4 codes; activations stay in float."""

    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """weights that share a scale, counted over the flattened weight"""
    nested: bool = False
    """store the scales in 8 bits (double quantization)"""

    def stored(self, members: Sequence[Sizes]) -> int:
        """Two weights a byte, and the scales."""
        return sum(stored(item, "nf4", self.block, self.nested) for item in members)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Each layer on its own."""
        return [coded(item, "nf4", self.block, self.nested) for item in members]
