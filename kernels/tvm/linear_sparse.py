"""`linear_sparse` in TVM: CPUs have no product that skips zeros, so the dense weight is stored, int8 or float16, and multiplied as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..linear_sparse import decode
from . import activations
from .lowering import Lowering, Use
from .packed import add_bias, half, linear, symmetric


class LinearSparse(Lowering):
    """Equal to the reference within float32 rounding; rounded activations are the reference's."""

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether activations are rounded."""
        return int(attributes["activation_bits"]) == 8

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out)."""
        x, scale = use.tensors["x"], use.optional("scale")
        if self.rounds(use.attributes):
            x = activations.symmetric(use, x, 8, use.shape(x)[-1])
        values, positions = (torch.from_numpy(use.array(n).copy()) for n in ("values", "positions"))
        dense = decode(values, positions, None).numpy()  # (out, in)
        if scale is None:
            weight = half(dense)
        else:
            weight = symmetric((dense + 128).astype(np.uint8), 8, dense.shape[1], scale[:, None])
        return [add_bias(use, linear(use, x, weight))]
