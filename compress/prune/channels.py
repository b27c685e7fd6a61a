"""Structured pruning: whole channels leave the network, so that it is smaller and faster on any kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pydantic
import torch

from ...common.errors import PlanishError, listed
from ...common.progress import say
from .. import cost, layers
from ..model import Entry, Input, Model, from_program
from ..passes import Context, Pass, matches
from . import scores
from .dependency import SAMPLES, Dependencies, analyse
from .goal import Costs, Plan, Ranking, reach


class Channels(Pass):
    """Remove the least important channels until the model meets a budget of multiply-accumulates or parameters.

    Which channels depend on each other is found from the graph (dependency.py). Goal: exactly one of `macs`
    and `params`, as the fraction of them that may remain, e.g. macs 0.5 for half; the result is at or below it, and as
    near as the rounding of channel counts allows. The pruned model computes exactly what the original would with the
    removed channels' readers set to zero; this is checked on random inputs before the pass returns.
    """

    macs: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """fraction of the multiply-accumulates that may remain"""
    params: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """fraction of the parameters that may remain"""
    criterion: scores.Criterion = "taylor"
    """l1, l2: norm of the channel's weights; bn_gain: batch-norm gain; taylor: first-order change of the loss (needs data)"""
    ranking: Ranking = "global"
    """global: least importance lost per cost saved, over all layers; layer: every layer shrinks by the same share"""
    multiple: int | None = pydantic.Field(default=None, ge=1)
    """channel counts stay a multiple of this; None: what the target's kernels compute in"""
    minimum: int = pydantic.Field(default=1, ge=1)
    """no layer gets fewer channels than this"""
    skip: tuple[str, ...] = ()
    """globs of layers whose output channels all stay"""
    samples: int = pydantic.Field(default=1024, ge=1)
    """samples used by taylor"""
    batch: int = pydantic.Field(default=8, ge=1)
    """samples per gradient of taylor; small batches estimate the squared change better"""

    needs_data: ClassVar[bool] = False

    @pydantic.model_validator(mode="after")
    def _one_goal(self) -> Channels:
        if (self.macs is None) == (self.params is None):
            raise ValueError("exactly one of 'macs' and 'params' is the goal, as the fraction that may remain")
        return self

    def apply(self, model: Model, context: Context) -> Model:
        """The model with fewer channels. Raises PlanishError for a goal that is out of reach or a quantized model."""
        layers.refuse_quantized(model, "prune.channels")
        if self.criterion == "taylor" and context.data is None:
            raise PlanishError(
                "prune.channels with criterion 'taylor' needs data (--data); l1, l2 and bn_gain need none"
            )
        pruned = model.copy()
        found = analyse(pruned)
        self._skip(found)
        plan = Plan(
            found,
            self._costs(model, pruned, found),
            self._scores(pruned, found, context),
            self.multiple or context.target.channel_multiple,
            self.minimum,
        )
        what, share = ("multiply-accumulates", self.macs) if self.macs is not None else ("parameters", self.params)
        assert share is not None
        full = plan.cost()
        reach(plan, full * share, self.ranking, what)
        say(f"prune.channels: {full:,.0f} -> {plan.cost():,.0f} {what} ({plan.cost() / full:.1%})")
        removed = plan.removed()
        remove(found, removed)
        result = renewed(pruned)
        check_equal(model, result, found, removed)
        return result.with_receipt(*self._receipt(model, result, found))

    def _skip(self, found: Dependencies) -> None:
        named = {name.rpartition(".")[0] for name, _ in found.axes}
        for pattern in self.skip:
            if not any(matches(name, [pattern]) for name in named):
                raise PlanishError(
                    f"prune.channels: skip '{pattern}' matches no layer; layers: {listed(sorted(named), 6)}"
                )
        for (name, axis), units in found.axes.items():
            if (name, axis) not in found.consumers and matches(name.rpartition(".")[0], self.skip):
                found.protect(units, "named in 'skip'")

    def _costs(self, original: Model, model: Model, found: Dependencies) -> Costs:
        """The goal's cost as a function of axis lengths: every weight counts its elements, times their uses for MACs."""
        weights = dict(model.graph.named_parameters())
        axes = {name: tuple(a for a in found.axes if a[0] == name) for name in weights}
        uses: dict[str, float] = {}
        total = float(original.parameters())
        if self.macs is not None:
            total = 0.0
            samples = SAMPLES if model.batched else model.inputs[0].shape[0]
            for node in model.graph.graph.nodes:
                count = cost.node_macs(node, found.shapes) / samples
                total += count
                names = [layers.parameter(a) for a in node.args]
                name = next((n for n in names if n in weights and weights[n].ndim > 1), None)
                if count and name is not None:
                    uses[name] = uses.get(name, 0.0) + count / weights[name].numel()
        else:
            uses = dict.fromkeys(weights, 1.0)
        terms = []
        for name, factor in uses.items():
            if axes[name]:
                lengths = [weights[name].shape[axis] for _, axis in axes[name]]
                whole = factor * weights[name].numel()
                total -= whole
                terms.append((whole / torch.tensor(lengths).prod().item(), axes[name]))
        return Costs(total, tuple(terms))

    def _scores(self, model: Model, found: Dependencies, context: Context) -> dict[int, float]:
        if self.criterion == "taylor":
            assert context.data is not None
            chosen = context.data.sample(self.samples, context.generator)
            scored = scores.taylor(model, found, chosen, self.batch, context.generator)
        elif self.criterion == "bn_gain":
            scored = scores.gains(model, found)
        else:
            scored = scores.norms(model, found, 1 if self.criterion == "l1" else 2)
        for units in found.axes.values():
            for unit in units:
                if found.group(unit) not in scored:
                    if self.criterion == "bn_gain":
                        found.protect([unit], "passes no batch norm whose gain could rank it")
                    scored[found.group(unit)] = 0.0
        return scored

    def _receipt(self, before: Model, after: Model, found: Dependencies) -> list[Entry]:
        protected = found.protected()
        entries = []
        old, new = dict(before.graph.named_parameters()), dict(after.graph.named_parameters())
        for name, value in old.items():
            shapes = [tuple(value.shape), tuple(new[name].shape)]
            sizes = [v.numel() * v.element_size() for v in (value, new[name])]
            action = "pruned" if shapes[0] != shapes[1] else "left"
            if action == "pruned":
                reason = f"{self.criterion}: {list(shapes[0])} -> {list(shapes[1])}"
            else:
                reason = _why_left(name, found, protected)
            entries.append(Entry(name, action, reason, *sizes))
        return entries


def _why_left(name: str, found: Dependencies, protected: dict[int, str]) -> str:
    """Why a parameter kept its shape: what protects the channels that it makes, else those that it reads."""
    axes = sorted((axis in found.consumers, axis) for axis in found.axes if axis[0] == name)
    for _, axis in axes:
        groups = [found.group(u) for u in found.axes[axis]]
        if any(g not in protected for g in groups):
            return "its channels are needed more than those removed"
        return protected[groups[0]]
    return "no channels were followed to it"


def remove(found: Dependencies, removed: set[int]) -> None:
    """Shrink the parameters and rewrite the constants of the analysed graph, without the groups `removed`."""
    shrunk: dict[str, torch.Tensor] = {}
    for (name, axis), units in found.axes.items():
        keep = [i for i, u in enumerate(units) if found.group(u) not in removed]
        if len(keep) < len(units):
            value = shrunk.get(name, layers.tensor(found.graph, name).detach())
            shrunk[name] = value.index_select(axis, torch.tensor(keep)).contiguous()
    for name, value in shrunk.items():
        layers.set_tensor(found.graph, name, value)

    def count(units: Sequence[int]) -> int:
        return sum(found.group(u) not in removed for u in units)

    for rewrite in found.rewrites:
        rewrite(count)
    found.graph.recompile()


def renewed(model: Model) -> Model:
    """The model traced again: every shape of the changed graph is derived anew, for any batch."""
    names = tuple(i.name for i in model.inputs)
    fresh = from_program(model.program(), names, model.source)
    return replace(model, graph=fresh.graph)


def check_equal(before: Model, after: Model, found: Dependencies, removed: set[int]) -> None:
    """Raise RuntimeError unless the pruned model equals the original with the readers of removed channels at zero."""
    masked = before.copy()
    for name, axis in found.consumers:
        gone = [i for i, u in enumerate(found.axes[name, axis]) if found.group(u) in removed]
        layers.tensor(masked.graph, name).data.index_fill_(axis, torch.tensor(gone, dtype=torch.long), 0)
    generator = torch.Generator().manual_seed(0)
    inputs = [random_input(before, i, generator) for i in before.inputs]
    with torch.no_grad():
        wanted, got = (x if isinstance(x, tuple) else (x,) for x in (masked(*inputs), after(*inputs)))
    for a, b in zip(wanted, got, strict=True):
        # Sums run in another order, so results differ by rounding. Integer outputs (an arg max) may then differ too.
        near = 1e-4 if a.dtype in (torch.float32, torch.float64) else 0.05
        floats = a.dtype.is_floating_point
        if a.shape != b.shape or (floats and not torch.allclose(a, b, rtol=near, atol=near * float(a.abs().max()))):
            raise RuntimeError(f"prune.channels changed what '{before.source}' computes: this is a fault of planish")


def random_input(model: Model, item: Input, generator: torch.Generator) -> torch.Tensor:
    """Normal values for a float input, zeros for an integer one (0 is a valid index everywhere)."""
    shape = (2, *item.shape[1:]) if model.batched else item.shape
    if not item.dtype.is_floating_point:
        return torch.zeros(shape, dtype=item.dtype)
    return torch.randn(shape, generator=generator).to(item.dtype)
