"""NVFP4: 4-bit floats E2M1, 16 of a row with a scale in E4M3, and one float32 scale for the tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blocks import Linear
from ..moments import Moments
from .codebook import coded, stored
from .linears import Linears, Replacement, Sizes

BLOCK = 16
"""input columns that share a scale; the format fixes it"""


class Nvfp4(Linears):
    """Weights in NVFP4; activations stay in float."""

    def stored(self, members: Sequence[Sizes]) -> int:
        """Two weights a byte, and the scales."""
        return sum(stored(item, "nvfp4", BLOCK) for item in members)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Each layer on its own. Raises PlanishError for a layer whose input columns do not fill blocks."""
        return [coded(item, "nvfp4", BLOCK) for item in members]
