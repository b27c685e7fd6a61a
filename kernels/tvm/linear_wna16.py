"""`linear_wna16` in TVM: packed codes, decoded where they are multiplied (packed.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .. import packing
from .lowering import Lowering, Use
from .packed import Packed, add_bias, linear, symmetric, unsigned


class LinearWna16(Lowering):
    """Equal to the reference within float32 rounding: sums in another order, the zero point taken out of the sum of a group."""

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out)."""
        bits, group = int(use.attributes["bits"]), int(use.attributes["group"])
        codes, scale, zero = unpacked(use.array("codes"), bits, group), use.array("scale"), use.optional("zero_point")
        weight = symmetric(codes, bits, group, scale)
        if zero is not None:
            weight = Packed(codes, bits, group, scale, unsigned, zero)
        return [add_bias(use, linear(use, use.tensors["x"], weight))]


def unpacked(codes: np.ndarray, bits: int, group: int) -> np.ndarray:
    """(out, in) uint8 of codes (out, groups, bytes) packed as in kernels/packing.py."""
    return packing.unpack(torch.from_numpy(codes.copy()), bits, group).numpy()
