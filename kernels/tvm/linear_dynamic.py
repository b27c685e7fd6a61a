"""`linear_dynamic` in TVM: activations rounded to codes, then the packed product of the real values that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..linear_dynamic import PER_TENSOR
from . import activations
from .linear_wna16 import unpacked
from .lowering import Lowering, Use
from .packed import add_bias, linear, symmetric


class LinearDynamic(Lowering):
    """Equal to the reference within float32 rounding; the activation codes are the reference's."""

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """They always are."""
        return True

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out)."""
        x = use.tensors["x"]
        bits, group, x_bits, x_group = (
            int(use.attributes[n]) for n in ("bits", "group", "activation_bits", "activation_group")
        )
        if x_group == PER_TENSOR:
            x = activations.affine(use, x)
        else:
            x = activations.symmetric(use, x, x_bits, x_group or use.shape(x)[-1])
        weight = symmetric(unpacked(use.array("codes"), bits, group), bits, group, use.array("scale"))
        return [add_bias(use, linear(use, x, weight))]
