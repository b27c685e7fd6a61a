"""Dynamic quantization: integer weights, and activations quantized while the model runs. W8A8 by default, W4A8 and W4A4 by fields."""

from __future__ import annotations

from typing import Literal

import pydantic

from .rtn import RoundToNearest


class Dynamic(RoundToNearest):
    """Weights rounded to nearest per row, activations scaled per token at run time; needs no data."""

    bits: Literal[8, 4, 3, 2] = 8
    """of a weight; 8 or 4"""
    group: int | Literal["auto"] | None = pydantic.Field(default=None)
    """input columns that share a scale; null for the whole row"""
    activations: Literal[16, 8, 4] = 8
    """bits of activations; 8 or 4"""

    @pydantic.field_validator("activations")
    @classmethod
    def _low(cls, value: int) -> int:
        if value == 16:
            raise ValueError("8 or 4 bits; quantize.rtn leaves activations in float")
        return value
