"""Round to nearest: every weight to the nearest point of its group's integer grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blocks import Linear
from ..moments import Moments
from . import grids
from .integer import IntegerLinears
from .linears import Replacement


class RoundToNearest(IntegerLinears):
    """Round to nearest, with a search for the range of each group that errs least."""

    clip: bool = True
    """search the range of each group; otherwise it covers the group's weights"""
    calibrated: bool = False
    """the search weights a column's error by the mean square of its activations, which takes calibration data"""

    def reads_data(self) -> bool:
        """Only the weighted search does."""
        return self.calibrated and self.clip

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Each layer on its own."""
        importance = moments.mean_square if moments is not None and self.reads_data() else None  # (in,)
        what = (
            "round to nearest" + (", clipped" if self.clip else "") + (" by activations" if self.reads_data() else "")
        )
        made = []
        for item in members:
            grid = grids.fit(item.weight, self.bits, self.columns(item), self.symmetric, self.clip, importance)
            made.append(self.write(item, grid, None, what))
        return made
