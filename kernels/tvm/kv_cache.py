"""`kv_cache` in TVM: keys and values rounded as activations are, each token of each head with its own scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import activations
from .linear_fp8 import per_token
from .lowering import Lowering, Use


class KvCache(Lowering):
    """Equal to the reference to the bit, tokens without a value of 127 * 2^-126 or more aside."""

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """It does nothing else."""
        return True

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y, of the shape of x."""
        x, form = use.tensors["x"], str(use.attributes["format"])
        return [activations.symmetric(use, x, 8, use.shape(x)[-1]) if form == "int8" else per_token(use, x, form)]
