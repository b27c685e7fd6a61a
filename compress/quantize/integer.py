"""`IntegerLinears`: the base of the methods that round weights to integer grids. It has their common fields and writes the op.

What a method finds, codes and a grid, becomes `planish::linear_wna16` when activations stay in float and `planish::linear_dynamic`
when they are quantized while the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic
import torch

from ...kernels import linear_dynamic
from ...kernels.packing import group_bytes, pack, parts
from ..blocks import Linear
from . import grids
from .grids import Grid
from .linears import Linears, Replacement, Sizes

SCALE = 4
"""bytes of a scale"""


class IntegerLinears(Linears):
    """Integer weights: bits, groups, zero points; activations in float or quantized at run time."""

    zero_bytes: ClassVar[int] = 1
    """of a zero point, which is a code"""

    bits: Literal[8, 4, 3, 2] = 4
    """of a weight"""
    group: int | Literal["auto"] | None = pydantic.Field(default="auto")
    """input columns that share a scale; null for the whole row; auto for the largest of 64, 32, 16 that divides the row, else the row"""
    symmetric: bool = True
    """without zero points"""
    activations: Literal[16, 8, 4] = 16
    """bits of activations; 16 leaves them in float"""
    granularity: Literal["token", "tensor", "group"] = "token"
    """what shares a scale of activations below 16 bits: a token, the tensor (8 bits), a token's columns of a weight group"""

    @pydantic.field_validator("group")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("a group has at least one column")
        return value

    @pydantic.model_validator(mode="after")
    def _integer_product(self) -> IntegerLinears:
        if self.activations < 16 and not (self.symmetric and self.bits in (8, 4)):
            raise ValueError("activations below 16 bits need symmetric weights of 8 or 4 bits")
        if self.granularity == "tensor" and self.activations == 4:
            raise ValueError("granularity tensor is for activations of 8 bits")
        return self

    def columns(self, item: Linear) -> int:
        """Columns of a group of a layer. Raises PlanishError when the field does not divide them."""
        return grids.group_size(item.name, item.weight.shape[1], self.group)

    def stored(self, members: Sequence[Sizes]) -> int:
        """Packed codes, a float32 scale for each group, and zero points."""
        total = 0
        for item in members:
            group = grids.group_size(item.name, item.inputs, self.group)
            each = group_bytes(group, self.bits) + SCALE + (0 if self.symmetric else self.zero_bytes)
            total += item.outputs * (item.inputs // group) * each
        return total

    def write(self, item: Linear, grid: Grid, codes: torch.Tensor | None, what: str) -> Replacement:
        """The op for codes (out, in) uint8 on a grid, None for the nearest ones; `what` names the method in the receipt.

        Works on a few rows at a time: beside the weight and the packed codes nothing of their size is held.
        """
        out, groups = grid.scale.shape
        group = item.weight.shape[1] // groups
        packed, lost = torch.empty(out, groups, group_bytes(group, self.bits), dtype=torch.uint8), 0.0
        for part in parts(item.weight):
            weight, local = item.weight[part], grid.rows(part)
            if codes is None:
                chosen, missed = local.rounded(weight)
            else:
                chosen = codes[part]
                missed = float(local.decode(chosen).sub_(weight).square_().sum())
            packed[part] = pack(chosen, self.bits, group)
            lost += missed
        tensors = {"codes": packed, "scale": grid.scale.contiguous()}
        attributes = {"bits": self.bits, "group": group}
        format = f"int{self.bits}, {'per row' if grid.scale.shape[1] == 1 else f'groups of {group}'}"
        if self.activations == 16:
            op = "linear_wna16"
            if not self.symmetric:
                whole = torch.equal(grid.zero, grid.zero.round())
                tensors["zero_point"] = (grid.zero.to(torch.uint8) if whole else grid.zero).contiguous()
                format += ", zero points" if whole else ", zero points between codes"
        else:
            op = "linear_dynamic"
            places = {"tensor": linear_dynamic.PER_TENSOR, "token": linear_dynamic.PER_TOKEN, "group": group}
            attributes |= {"activation_bits": self.activations, "activation_group": places[self.granularity]}
            format += f", activations int{self.activations} per {self.granularity}"
        return Replacement(op, tensors, attributes, f"{what}: {format}", lost=lost)
