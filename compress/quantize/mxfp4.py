"""MXFP4 (OCP Microscaling Formats v1.0): 4-bit floats E2M1, 32 of a row with one power of two as scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blocks import Linear
from ..moments import Moments
from .codebook import coded, stored
from .linears import Linears, Replacement, Sizes

BLOCK = 32
"""input columns that share a scale; the format fixes it"""


class Mxfp4(Linears):
    """Weights in MXFP4; activations stay in float."""

    def stored(self, members: Sequence[Sizes]) -> int:
        """Two weights a byte, and the scales."""
        return sum(stored(item, "mxfp4", BLOCK) for item in members)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Each layer on its own. Raises PlanishError for a layer whose input columns do not fill blocks."""
        return [coded(item, "mxfp4", BLOCK) for item in members]
