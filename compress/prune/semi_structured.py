"""2:4 semi-structured pruning: in every group of four input columns two weights of each row go, in the pattern that GPUs skip in hardware.

    magnitude  keep the largest |w|                                                        (Mishra et al. 2021, arXiv 2104.08378)
    wanda      keep the largest |w_j| * |x_j|, x_j the column of calibration inputs         (Sun et al. 2023, arXiv 2306.11695, equation 1)
    sparsegpt  keep the largest |w_j| R_jj, and let the columns behind a group make up for what went
                                                                                           (Frantar and Alistarh 2023, arXiv 2301.00774)

The last walks the columns in order with the factor of GPTQ, H = R R^T (quantize.gptq says how): a column that goes errs by its whole
weight, one that stays by its rounding, and later columns answer to both. Their pattern is chosen when a group's turn comes, from its
weights as corrected so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic
import torch

from ...common.errors import PlanishError
from ...kernels import linear_sparse
from ...kernels.linear_sparse import GROUP, KEPT, TOP
from ..blocks import Linear
from ..moments import Moments
from ..quantize.gptq import corrected, upper_factor
from ..quantize.linears import Linears, Replacement, Sizes

assert linear_sparse.LinearSparse  # its import defines the op
LARGEST = float(torch.finfo(torch.float16).max)
"""magnitude that a stored weight may have"""


class SemiStructured(Linears):
    """Two of four weights, as float16 or int8 with a scale for each row."""

    copies: ClassVar[int] = 5
    keep: ClassVar[int] = 0

    score: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    """what decides which weights stay; magnitude needs no data"""
    bits: Literal[16, 8] = 16
    """of a weight that stays"""
    activations: Literal[16, 8] = 16
    """bits of activations; 8: scaled per token at run time, for weights of 8 bits"""
    damping: float = pydantic.Field(default=0.01, gt=0)
    """sparsegpt: added to the Hessian's diagonal, as a share of its mean"""
    block: int = pydantic.Field(default=128, ge=GROUP, multiple_of=GROUP)
    """sparsegpt: columns that are treated before the rest is corrected; the result is the same up to float32 rounding"""

    @pydantic.model_validator(mode="after")
    def _integer_product(self) -> SemiStructured:
        if self.activations < self.bits:
            raise ValueError("activations of 8 bits need weights of 8 bits")
        return self

    def reads_data(self) -> bool:
        """Every score but the magnitude does."""
        return self.score != "magnitude"

    def reads_products(self) -> bool:
        """The Hessian is sparsegpt's."""
        return self.score == "sparsegpt"

    def stored(self, members: Sequence[Sizes]) -> int:
        """Half of the weights, four bits a group, and a float32 scale for each row of int8."""
        _check(members[0].name, members[0].inputs)
        inputs = members[0].inputs
        row = inputs // 2 * self.bits // 8 + -(-inputs // (2 * GROUP)) + (0 if self.bits == 16 else 4)
        return sum(item.outputs * row for item in members)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Layers that read one tensor share its statistics. Raises PlanishError for columns that are no multiple of four."""
        _check(members[0].name, members[0].weight.shape[1])
        factor = None
        if self.score == "sparsegpt":
            assert moments is not None
            factor = upper_factor(moments.hessian(), self.damping, None, members[0].name, self._title())
        return [self._replacement(item, moments, factor) for item in members]

    def _replacement(self, item: Linear, moments: Moments | None, factor: torch.Tensor | None) -> Replacement:
        weight = item.weight
        if self.bits == 16 and float(weight.abs().max()) > LARGEST:
            raise PlanishError(
                f"layer '{item.name}': a weight of {float(weight.abs().max()):g} is beyond float16, in which the weights "
                "that stay are stored; bits: 8 takes it"
            )
        if factor is not None:
            weight, positions = self._compensated(weight, factor)
        else:
            score = weight.abs()
            if self.score == "wanda":
                assert moments is not None
                score = score * moments.square.sqrt().float()
            positions = linear_sparse.choose(score)
        values, scale = linear_sparse.encode(weight, positions, self.bits)
        tensors = {"values": values, "positions": linear_sparse.pack(positions)}
        if scale is not None:
            tensors["scale"] = scale
        format = "float16" if self.bits == 16 else "int8, per row"
        format += "" if self.activations == 16 else ", activations int8 per token"
        return Replacement(
            "linear_sparse",
            tensors,
            {"activation_bits": self.activations},
            f"two of four weights by {self.score}: {format}",
            linear_sparse.decode(values, tensors["positions"], scale),
            action="pruned",
        )

    def _compensated(self, weight: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight (out, in), of which only what stands at the positions (out, groups, 2) counts, for the factor R (in, in).

        The steps of int8 come from a first walk that rounds to float16: until then nobody knows what the weights grow to.
        """
        made, positions = prune(weight, factor, None, self.block)
        if self.bits == 16:
            return made, positions
        _, scale = linear_sparse.encode(made, positions, 8)
        assert scale is not None
        made, positions = prune(weight, factor, scale, self.block)
        return made, positions


def prune(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT: (the pruned weight (out, in), positions (out, groups, 2)) of a weight (out, in) and R (in, in), H = R R^T.

    What stays is rounded to whole numbers of steps `scale` (out,), to float16 where there is none.
    """
    out, inputs = weight.shape
    rows = weight.T.contiguous()  # (in, out): what is a column of the weight is contiguous here
    diagonal = factor.diagonal()
    ratio = factor / diagonal  # R_ij / R_jj
    target = rows.clone()  # complete for a column when its turn comes
    error = torch.empty_like(rows)  # w - q
    made = torch.zeros_like(rows)
    positions = torch.empty(out, inputs // GROUP, KEPT, dtype=torch.int64)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        for first in range(start, stop, GROUP):
            group = slice(first, first + GROUP)
            now = corrected(rows[group], target[group], factor[group, group])  # (4, out)
            kept = linear_sparse.choose((now * diagonal[group, None]).abs().T)[:, 0]  # (out, 2)
            positions[:, first // GROUP] = kept
            stays = torch.zeros(out, GROUP, dtype=torch.bool).scatter_(1, kept, True).T  # (4, out)
            for k in range(first, first + GROUP):
                made[k] = torch.where(stays[k - first], _rounded(target[k], scale), 0.0)
                error[k] = rows[k] - made[k]
                target[k + 1 : stop].addr_(ratio[k, k + 1 : stop], error[k])
        target[stop:].addmm_(ratio[start:stop, stop:].T, error[start:stop])
    return made.T.contiguous(), positions


def _rounded(column: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A column (out,) as it can be stored."""
    if scale is None:
        return column.clamp(-LARGEST, LARGEST).half().float()
    return (column / scale).round().clamp(-TOP, TOP) * scale


def _check(name: str, inputs: int) -> None:
    if inputs % GROUP:
        raise PlanishError(
            f"layer '{name}': 2:4 pruning needs a multiple of {GROUP} input columns; it has {inputs} (skip the layer)"
        )
