"""FP8 (Micikevicius et al. 2022): weights as 8-bit floats with a scale for each output channel, activations too where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ...kernels import linear_fp8
from ..blocks import Linear
from ..moments import Moments
from .linears import Linears, Replacement, Sizes


class Fp8(Linears):
    """Weights in E4M3 or E5M2."""

    format: Literal["e4m3", "e5m2"] = "e4m3"
    """of weights"""
    activations: Literal["e4m3", "e5m2"] | None = None
    """of activations, with a scale for each token taken while the model runs; null leaves them in float"""

    def stored(self, members: Sequence[Sizes]) -> int:
        """A byte for each weight, a float32 scale for each row."""
        return sum(item.outputs * (item.inputs + 4) for item in members)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Each layer on its own."""
        return [self._replacement(item) for item in members]

    def _replacement(self, item: Linear) -> Replacement:
        codes, scale = linear_fp8.encode(item.weight, self.format)
        what = f"fp8 {self.format}, per row" + (
            f", activations {self.activations} per token" if self.activations else ""
        )
        attributes = {"format": self.format, "activations": self.activations or "none"}
        restored = linear_fp8.decode(codes, scale, self.format)
        return Replacement("linear_fp8", {"codes": codes, "scale": scale}, attributes, what, restored)
