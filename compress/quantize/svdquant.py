"""SVDQuant, Li et al. 2024 (arXiv 2411.05007): 4-bit weights and activations, with what 4 bits cannot hold in a low-rank branch.

For the weight W (out, in) of layers that read one tensor, stacked, and rows X of what they read:

1. Smoothing: lambda_j = max|X_j|^a / max|W_j|^b moves outliers from the activations, X' = X / lambda, into the weight W' = W lambda, for the
   best of 39 pairs (a, b). Each trial is made with its branch: with it far larger lambdas pay.
2. Branch: the `rank` largest singular values of W' (float64), as up (out, r) and down (r, in) in float16; R = W' - up down, of the rounded
   factors, so that R makes up for their rounding.
3. Refinement: the branch of W' - Q(R) instead, and so on, until the first round that errs more; the best is kept.
4. Or, instead of 3, R rounded with GPTQ against the Hessian of the rounded X'.

The error of a trial is that of the layers' outputs on rows kept in calibration (the paper takes the attention's output for q, k and
v). Inputs that come straight from an activation with a lower bound are rounded without a sign, shifted by the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pydantic
import torch
from torch.fx import Node

from ...common.errors import PlanishError
from ...kernels import linear_svd as op
from ...kernels import packing
from ...kernels.linear_wna16 import dequantize
from .. import layers
from ..blocks import Linear
from ..model import Model
from ..moments import Moments
from ..passes import Context
from . import gptq
from .linears import Linears, Replacement, Sizes

CANDIDATES = ((0.0, 0.0), *((i / 20, b) for i in range(1, 20) for b in (0.0, 1 - i / 20)))
"""(a, b) of the smoothing search"""
SEARCH_ROWS = 512
"""rows that a trial of the search is judged on; the refinement takes all that were kept"""
EXACT = 256
"""matrices whose smaller side is at most this are decomposed exactly in every trial; larger ones only where the refinement starts"""
FLOORS = {"aten.relu": 0.0, "aten.relu6": 0.0, "aten.sigmoid": 0.0, "aten.gelu": 0.171875, "aten.silu": 0.28125}
"""activations with a lower bound: what is added so that no value is below 0 (-0.17 and -0.2785 rounded up to 1/64)"""
KEEPS = ("aten.dropout", "aten.clone", "aten.contiguous", "aten.view", "aten.reshape", "aten._to_copy")
LARGEST = 65504.0
"""of float16"""


@dataclass(frozen=True)
class Format:
    """How numbers are stored: see kernels/linear_svd.py."""

    bits: int
    group: int
    activation_bits: int
    shift: float = 0.0
    unsigned: bool = False

    def activations(self, x: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
        """The rounded activations (rows, whole groups) of x (rows, in)."""
        return op.quantized((x + self.shift) * smooth, self.activation_bits, self.group, self.unsigned)

    def round(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale of R (out, in)."""
        return op.quantize_residual(residual, self.bits, self.group)


@dataclass(frozen=True)
class Decomposed:
    """A weight as the op stores it."""

    smooth: torch.Tensor
    """(in,) 1 / lambda"""
    down: torch.Tensor
    """(r, in) float16"""
    up: torch.Tensor
    """(out, r) float16"""
    codes: torch.Tensor
    scale: torch.Tensor

    def residual(self, form: Format) -> torch.Tensor:
        """R (out, whole groups) float32 as its codes give it."""
        return dequantize(self.codes, self.scale, None, form.bits, form.group)

    def branch(self) -> torch.Tensor:
        """(out, in) float32"""
        return self.up.float() @ self.down.float()


class Svdquant(Linears):
    """Smoothing, a low-rank branch, and a residual in few bits."""

    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    copies: ClassVar[int] = 10

    bits: Literal[8, 4] = 4
    """of the residual's weights"""
    activations: Literal[16, 8, 4] = 4
    """of activations, per token and group; 16 leaves them in float"""
    group: int = pydantic.Field(default=64, ge=1)
    """input columns that share a scale; the last group of a row may be short and is filled up with zeros"""
    rank: int = pydantic.Field(default=32, ge=0)
    """of the branch, at most the smaller side of the weight"""
    rounds: int = pydantic.Field(default=100, ge=0)
    """of the refinement, at most"""
    gptq: bool = False
    """round the residual with GPTQ, instead of the refinement, which gains nothing more then"""

    def stored(self, members: Sequence[Sizes]) -> int:
        """Packed codes and float32 scales of whole groups, float16 up; smooth and float16 down once."""
        inputs, outputs = members[0].inputs, sum(item.outputs for item in members)
        group, rank = min(self.group, inputs), min(self.rank, inputs, outputs)
        groups = -(-inputs // group)
        return outputs * (groups * (packing.group_bytes(group, self.bits) + 4) + 2 * rank) + inputs * (4 + 2 * rank)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Layers that read one tensor get one lambda and one decomposition: they share `smooth` and `down`."""
        assert moments is not None
        shift = floor(members[0].source)
        group = min(self.group, members[0].weight.shape[1])
        form = Format(self.bits, group, self.activations)
        if shift is not None and self.activations == 4:
            form = Format(self.bits, group, self.activations, shift, unsigned=True)
        weight = torch.cat([m.weight for m in members])  # (all outs, in)
        peak = torch.maximum((moments.low + form.shift).abs(), (moments.high + form.shift).abs())  # (in,)
        problem = Problem(weight, moments.kept, form, self.rank, generator)
        pair, smooth = problem.search(peak)
        found, history = problem.refine(smooth, 0 if self.gptq else self.rounds)
        if self.gptq:
            found = problem.compensated(found, members[0].name)
        if float(found.up.abs().max() if found.up.numel() else 0) > LARGEST:
            raise PlanishError(f"layer '{members[0].name}': its low-rank branch is beyond float16 ({LARGEST:.0f})")
        sizes = [len(m.weight) for m in members]
        parts = zip(members, found.up.split(sizes), found.codes.split(sizes), found.scale.split(sizes), strict=True)
        made = []
        for item, up, codes, scale in parts:
            own = Decomposed(found.smooth, found.down, up.contiguous(), codes.contiguous(), scale.contiguous())
            made.append(self._replacement(item, own, form, pair, max(0, len(history) - 1)))
        return made

    def _replacement(self, item: Linear, own: Decomposed, form: Format, pair: tuple[float, float], rounds: int) -> Replacement:  # fmt: skip
        residual = own.residual(form)[:, : len(own.smooth)]  # (out, in)
        bias = item.bias
        if form.shift:
            moved = form.shift * (residual.double() @ own.smooth.double())  # (out,)
            bias = ((0 if bias is None else bias.double()) - moved).float()
        tensors = {"codes": own.codes, "scale": own.scale, "smooth": own.smooth, "down": own.down, "up": own.up}
        attributes = {"bits": form.bits, "group": form.group, "activation_bits": form.activation_bits}
        attributes |= {"shift": form.shift, "unsigned": form.unsigned}
        kind = ", unsigned" if form.unsigned else ""
        reason = f"SVDQuant: int{form.bits} in groups of {form.group}{', gptq' if self.gptq else ''}, activations "
        reason += f"{'float' if form.activation_bits == op.FLOAT_BITS else f'int{form.activation_bits}'}{kind}, rank {len(own.down)}, "
        reason += f"smoothing {pair[0]:g} {pair[1]:g}" + ("" if self.gptq else f", {rounds} rounds of refinement")
        return Replacement(
            op.__name__.rpartition(".")[2],
            tensors,
            attributes,
            reason,
            restored=(residual + own.branch()) * own.smooth,
            bias=bias if form.shift else None,
        )

    def apply(self, model: Model, context: Context) -> Model:
        """Replace the chosen linears. Raises PlanishError as `Linears` does, and for branches beyond float16."""
        model = super().apply(model, context)
        share(model)
        return model


class Problem:
    """One weight (out, in) and rows x (rows, in) of what it reads."""

    def __init__(
        self, weight: torch.Tensor, x: torch.Tensor, form: Format, rank: int, generator: torch.Generator
    ) -> None:
        self.weight, self.x, self.form, self.rank = weight, x, form, min(rank, *weight.shape)
        self.start = torch.randn(weight.shape[1], self.rank + 16, generator=generator)  # (in, r + 16)
        self.y = x @ weight.T  # (rows, out)

    def search(self, peak: torch.Tensor) -> tuple[tuple[float, float], torch.Tensor]:
        """The best of CANDIDATES and its 1 / lambda (in,); `peak` (in,) is the largest magnitude of each channel of x."""
        step = -(-len(self.x) // SEARCH_ROWS)
        best, found = math.inf, (CANDIDATES[0], torch.ones_like(peak))
        for pair in CANDIDATES:
            smooth = 1 / strength(peak, self.weight.abs().amax(0), *pair)
            down, up = self.branch(self.weight / smooth, EXACT)
            error = self.error(self.rounded(smooth, down, up), step)
            if error < best:
                best, found = error, (pair, smooth)
        return found

    def refine(self, smooth: torch.Tensor, rounds: int) -> tuple[Decomposed, list[float]]:
        """The best decomposition and the errors of the rounds up to it: they fall."""
        scaled = self.weight / smooth  # W', (out, in)
        best = self.rounded(smooth, *self.branch(scaled, max(scaled.shape)))
        history = [self.error(best)]
        for _ in range(rounds if self.rank else 0):
            residual = best.residual(self.form)[:, : scaled.shape[1]]
            trial = self.rounded(smooth, *self.branch(scaled - residual, EXACT))
            error = self.error(trial)
            if error >= history[-1]:
                break
            best = trial
            history.append(error)
        return best, history

    def rounded(self, smooth: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> Decomposed:
        """The residual of a branch in float16, rounded to nearest."""
        codes, scale = self.form.round(self.weight / smooth - up.float() @ down.float())
        return Decomposed(smooth, down, up, codes, scale)

    def compensated(self, found: Decomposed, name: str) -> Decomposed:
        """The same branch with the residual rounded by GPTQ: static groups, columns of large activations first, damping 1 %.

        Its 4-bit grids use the code -8 too, which a scale of either sign makes free.
        """
        form = self.form
        activations = form.activations(self.x, found.smooth).double()  # (rows, whole groups)
        hessian = 2 * activations.T @ activations / len(activations)
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = gptq.upper_factor(hessian, 0.01, order, name)
        residual = op.padded(self.weight / found.smooth - found.branch(), form.group)
        method = gptq.Gptq(bits=form.bits, group=form.group)  # pyright: ignore[reportArgumentType]
        grid, codes = method.compensated(residual, factor, order, form.group)
        packed = packing.pack(codes, form.bits, form.group)
        return Decomposed(found.smooth, found.down, found.up, packed, grid.scale.contiguous())

    def error(self, found: Decomposed, step: int = 1) -> float:
        """Squared error of the outputs over every `step`-th row."""
        x = self.x[::step]
        residual = found.residual(self.form)
        y = self.form.activations(x, found.smooth) @ residual.T + ((x * found.smooth) @ found.down.float().T) @ found.up.float().T  # fmt: skip
        if self.form.shift:
            y -= self.form.shift * (residual[:, : len(found.smooth)] @ found.smooth)
        y -= self.y[::step]
        return float(torch.linalg.vecdot(y, y).sum(dtype=torch.float64))

    def branch(self, matrix: torch.Tensor, exact: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(down (r, in), up (out, r)) in float16: the best approximation of `matrix` (out, in) of rank r.

        A matrix with a smaller side beyond `exact` is projected first on what subspace iteration finds (Halko et al. 2011, algorithm 4.4).
        """
        if not self.rank:
            return matrix.new_empty((0, matrix.shape[1])).half(), matrix.new_empty((len(matrix), 0)).half()
        if min(matrix.shape) <= exact:
            return leading(matrix.double(), self.rank)
        basis = torch.linalg.qr(matrix @ self.start).Q  # (out, r + 16)
        for _ in range(2):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        u, s, v = torch.linalg.svd((basis.T @ matrix).double(), full_matrices=False)
        r = self.rank
        return v[:r].half().contiguous(), (basis.double() @ u[:, :r] * s[:r]).half().contiguous()


def leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(V^T (rank, in), U S (out, rank)) in float16 of the largest singular values of a float64 matrix (out, in).

    From the eigenvectors of the smaller of M^T M and M M^T, which takes a third of the time of a decomposition of M. What the squares
    lose, relative to the largest singular value about 1e-8, is far below float16.
    """
    if len(matrix) >= matrix.shape[1]:
        v = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:].flip(1)  # (in, rank)
        return v.T.half().contiguous(), (matrix @ v).half().contiguous()
    u = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)  # (out, rank)
    rows = u.T @ matrix  # (rank, in)
    size = rows.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)  # (rank,)
    return (rows / size[:, None]).half().contiguous(), (u * size).half().contiguous()


def strength(activations: torch.Tensor, weights: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """The vector lambda (in,) for the largest magnitudes of each channel, (in,) each; all ones where one is not finite."""
    found = activations.double() ** a / weights.double() ** b
    found = torch.where(found == 0, 1.0, found)
    return found.float() if bool(torch.isfinite(found).all()) else torch.ones_like(activations)


def floor(source: Node) -> float | None:
    """What makes the values of an activation non-negative when it is added; None for values without a lower bound."""
    node = source
    while layers.op(node) in KEEPS and isinstance(node.args[0], Node):
        node = node.args[0]
    return FLOORS.get(layers.op(node))


def share(model: Model) -> None:
    """Let layers that read one tensor read one `smooth` and one `down` too, in place."""
    first: dict[tuple[Node, str], Node] = {}
    for node in model.graph.graph.nodes:
        if layers.op(node) != "planish.linear_svd":
            continue
        for name in ("smooth", "down"):
            own = layers.argument(node, name)
            kept = first.setdefault((node.args[0], name), own)
            if kept is not own and torch.equal(layers.read(model.graph, kept), layers.read(model.graph, own)):
                layers.set_argument(node, name, kept)
    layers.drop_unused(model.graph)
