"""OliVe (Guo et al. 2023, arXiv 2304.07493): outlier-victim pairs. A large value keeps a wide range, its neighbour becomes zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic
import torch

from ...common.errors import PlanishError
from ...kernels import linear_ovp
from ...kernels.outlier_victim import Codec, codec, outlier_pairs, search
from ..blocks import Linear
from ..moments import Moments
from .linears import Linears, Replacement, Sizes

assert linear_ovp.LinearOvp  # its import defines the op
Grid = Literal["int", "flint", "auto"]
SEARCH_ROWS = 512
"""activations that the search for a step looks at, spread evenly, besides the largest of each channel"""


class Ovp(Linears):
    """Weights, and activations with a static step, as outlier-victim pairs."""

    calibrates: ClassVar[bool] = True

    bits: Literal[4, 8] = 4
    """of a weight"""
    activations: Literal[4, 8] | None = 4
    """bits of activations, whose step is calibrated once for the tensor; null leaves them in float and needs no data"""
    grid: Grid = "int"
    """4-bit values: int, whose pairs decode to int8 and run on any int8 kernel; flint, of wider range; auto, the one with less error for each
    tensor (the paper's choice)"""
    criterion: Literal["outputs", "values"] = "outputs"
    """what the search for steps keeps small: the error that the other operand makes of it (columns of x weighted by the squares of the
    weights that read them, columns of weights by the squares of x), or the tensor's own, as the authors do"""
    unpacked: bool = False
    """ONNX holds int4 weights as int8, twice the bytes, and decodes nothing while it runs"""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Ovp:
        if self.bits == 8 and self.activations != 4 and self.grid == "flint":
            raise ValueError("the flint grid has 4 bits")
        if self.unpacked and (self.bits, self.activations, self.grid) != (4, 4, "int"):
            raise ValueError("unpacked weights take bits 4, activations 4 and grid int")
        return self

    def reads_data(self) -> bool:
        """Quantized activations do."""
        return self.activations is not None

    def stored(self, members: Sequence[Sizes]) -> int:
        """Codes, a float32 step for each row, and one for the input."""
        _check_even(members[0].name, members[0].inputs)
        row = members[0].inputs * self.bits // 8 + 4
        return sum(item.outputs * row for item in members) + (0 if self.activations is None else 4)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Layers that read one tensor share its step. Raises PlanishError for an odd number of input columns."""
        inputs = members[0].weight.shape[1]
        _check_even(members[0].name, inputs)
        if moments is None or self.activations is None:
            return [self._weights(item, None, None, None) for item in members]
        weighted = self.criterion == "outputs"
        reads = sum((item.weight.square().sum(0) for item in members), torch.zeros(inputs))  # (in,)
        form, scale = self._activations(moments, self.activations, _relative(reads) if weighted else None)
        importance = _relative(moments.square.float()) if weighted else None
        return [self._weights(item, form, scale, importance) for item in members]

    def _activations(self, moments: Moments, bits: int, importance: torch.Tensor | None) -> tuple[Codec, torch.Tensor]:
        """Format and step () of what the layers read."""
        rows = moments.kept[:: -(-len(moments.kept) // SEARCH_ROWS)]  # (rows, in)
        # what is larger than all of these is seen too, once: one more row among all of the data's
        extreme = torch.where(moments.high > -moments.low, moments.high, moments.low)  # (in,)
        extreme = torch.where(extreme.abs() > rows.abs().max(), extreme, 0.0)
        counts = torch.full((len(rows) + 1,), moments.rows / len(rows))
        counts[-1] = 1
        return self._best(torch.cat([rows, extreme[None]]), bits, False, importance, counts)

    def _weights(
        self, item: Linear, x_form: Codec | None, x_scale: torch.Tensor | None, importance: torch.Tensor | None
    ) -> Replacement:
        form, scale = self._best(item.weight, self.bits, True, importance)
        q = item.weight / scale[:, None]
        codes = form.encode(q)  # (out, in)
        tensors = {"codes": form.store(codes), "scale": scale}
        attributes: dict[str, object] = {"bits": form.bits, "grid": form.kind, "x_bits": 0, "x_grid": "int"}
        what = f"outlier-victim pairs, {form.kind}{form.bits}"
        if x_form is not None and x_scale is not None:
            tensors["x_scale"] = x_scale
            attributes |= {"x_bits": x_form.bits, "x_grid": x_form.kind}
            what += f", activations {x_form.kind}{x_form.bits} with one step"
        what += f"; {100 * outlier_pairs(q, form).float().mean().item():.2f} % of pairs hold an outlier"
        restored = form.decode(codes) * scale[:, None]
        return Replacement("linear_ovp", tensors, attributes | {"unpacked": self.unpacked}, what, restored)

    def _best(
        self,
        x: torch.Tensor,
        bits: int,
        by_row: bool,
        importance: torch.Tensor | None,
        counts: torch.Tensor | None = None,
    ) -> tuple[Codec, torch.Tensor]:
        """(format, steps) of the grid that errs least on x (rows, in) among those that the field allows."""
        kinds = ("int",) if bits == 8 else ("int", "flint") if self.grid == "auto" else (self.grid,)
        forms = [codec(bits, kind) for kind in kinds]
        found = [search(x, form, by_row, importance, counts) for form in forms]
        best = min(range(len(forms)), key=lambda i: float(found[i][1].sum()))
        return forms[best], found[best][0]


def _check_even(name: str, inputs: int) -> None:
    if inputs % 2:
        raise PlanishError(
            f"layer '{name}': outlier-victim pairs need an even number of input columns; it has {inputs}"
        )


def _relative(importance: torch.Tensor) -> torch.Tensor:
    """Weights of columns with the mean 1; all alike where there is nothing to go by."""
    mean = importance.mean()
    return importance / mean if mean > 0 else torch.ones_like(importance)
