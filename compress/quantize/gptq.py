"""GPTQ (Frantar et al. 2022): round one input column after the other, and let the later ones make up for the error.

The output error of a row is (w - q) H (w - q)^T with H = 2 X^T X. With H = R R^T, R upper triangular, it is |(w - q) R|^2, whose j-th
term is (w_j - q_j) R_jj plus what columns before j erred. So column j is rounded at the target

    t_j = w_j + sum over i < j of (w_i - q_i) R_ij / R_jj

which makes the term as small as rounding can. This is Babai's nearest plane, and the same numbers as the paper's recursion over the inverse
of H (its Cholesky factor is the inverse of R), from one factorization instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pydantic
import torch

from ...common.errors import PlanishError
from ..blocks import Linear
from ..moments import Moments
from . import grids
from .grids import Grid
from .integer import IntegerLinears
from .linears import Replacement

RETRIES = 4
"""times that the damping is raised tenfold when the Hessian is not positive definite"""


class Gptq(IntegerLinears):
    """Rounding that compensates: least error of the layer's output on calibration data."""

    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    products: ClassVar[bool] = True
    keep: ClassVar[int] = 0
    copies: ClassVar[int] = 5

    act_order: bool = True
    """columns of large activations first; needs static_groups, because a group's columns are then rounded at different times"""
    static_groups: bool = True
    """scales from the original weights; otherwise each group's from its weights as corrected when its turn comes"""
    clip: bool = True
    """search the range of each group; otherwise it covers the group's weights"""
    damping: float = pydantic.Field(default=0.01, gt=0)
    """added to the Hessian's diagonal, as a share of its mean"""
    block: int = pydantic.Field(default=128, ge=1)
    """columns that are rounded before the rest is corrected; the result is the same up to float32 rounding"""

    @pydantic.model_validator(mode="after")
    def _order(self) -> Gptq:
        if self.act_order and not self.static_groups and self.group is not None:
            raise ValueError("act_order needs static_groups")
        return self

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """All rows that read the tensor are rounded together: they share the Hessian."""
        assert moments is not None
        order = torch.argsort(moments.square, descending=True, stable=True) if self.act_order else None
        factor = upper_factor(moments.hessian(), self.damping, order, members[0].name)
        weight = torch.cat([m.weight for m in members])  # (all outs, in)
        grid, codes = self.compensated(weight, factor, order, self.columns(members[0]))
        sizes = [len(m.weight) for m in members]
        parts = zip(members, codes.split(sizes), grid.scale.split(sizes), grid.zero.split(sizes), strict=True)
        what = "gptq" + (", act-order" if self.act_order else "")
        return [self.write(m, Grid(self.bits, scale, zero), part, what) for m, part, scale, zero in parts]

    def compensated(
        self, weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor | None, group: int
    ) -> tuple[Grid, torch.Tensor]:
        """The grid and the codes (out, in) uint8 of a weight (out, in).

        `factor` is R (in, in), its columns in `order`; None leaves them as they are. The search for a group's range weights column j
        with R_jj^2, which is what an error of its rounding costs after the later columns have made up for it.
        """
        out, inputs = weight.shape
        fixed = self.static_groups or group == inputs
        columns = torch.arange(inputs) if order is None else order
        cost = torch.empty(inputs).index_copy_(0, columns, factor.diagonal() ** 2)  # (in,)
        grid = grids.fit(weight, self.bits, group, self.symmetric, self.clip, cost)
        scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()  # (groups, out)
        rows = weight.T[columns]  # (in, out): what is a column of the weight is contiguous here
        ratio = factor / factor.diagonal()  # R_ij / R_jj
        target = rows.clone()  # complete for a column when its turn comes
        error = torch.empty_like(rows)  # w - q
        codes = torch.empty(inputs, out, dtype=torch.uint8)
        places = (columns // group).tolist()
        step = self.block if fixed else group
        for start in range(0, inputs, step):
            stop = min(start + step, inputs)
            if not fixed:
                now = corrected(rows[start:stop], target[start:stop], factor[start:stop, start:stop]).T
                local = grids.fit(now, self.bits, group, self.symmetric, self.clip, cost[start:stop])
                scale[start // group], zero[start // group] = local.scale[:, 0], local.zero[:, 0]
            for k in range(start, stop):
                step_size, middle = scale[places[k]], zero[places[k]]  # (out,)
                code = (target[k] / step_size).add_(middle).round_().clamp_(0, 2**self.bits - 1)
                codes[k] = code
                error[k] = rows[k] - (code - middle) * step_size
                target[k + 1 : stop].addr_(ratio[k, k + 1 : stop], error[k])
            target[stop:].addmm_(ratio[start:stop, stop:].T, error[start:stop])
        placed = torch.empty_like(codes).index_copy_(0, columns, codes)
        return Grid(self.bits, scale.T.contiguous(), zero.T.contiguous()), placed.T.contiguous()


def upper_factor(
    hessian: torch.Tensor, damping: float, order: torch.Tensor | None, name: str, title: str = "quantize.gptq"
) -> torch.Tensor:
    """R (in, in) float32 upper triangular with R R^T = the damped Hessian (in, in) float64, its columns in `order`.

    The diagonal of an input that was always 0 becomes the mean: its column is rounded to nearest. The damping is raised tenfold,
    a few times, when the factorization fails; then raises PlanishError naming the pass `title` and the layer.
    """
    places = (torch.arange(len(hessian)) if order is None else order).flip(0)
    hessian = hessian[places[:, None], places]  # reversed: its lower factor is the upper one of the Hessian
    diagonal = hessian.diagonal()  # a view
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    added = 0.0
    for attempt in range(RETRIES + 1):
        diagonal.add_(mean * damping * 10**attempt - added)
        added = mean * damping * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return lower.float().flip(0, 1)
    raise PlanishError(
        f"{title}: the Hessian of layer '{name}' is not positive definite with damping {damping * 10**RETRIES:g}: "
        "give more or other calibration data"
    )


def corrected(rows: torch.Tensor, target: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(group, out): the real weights of a group's columns that best make up for the errors before them.

    `rows` are its weights, `target` (group, out) what each column alone would answer to those errors; together they answer through
    R's block (group, group).
    """
    asked = (target - rows) * factor.diagonal()[:, None]
    return rows + torch.linalg.solve_triangular(factor.T, asked, upper=False)
