"""How many channels each layer keeps, so that a budget is met with the least important channels gone.

Groups that lie on the same axes the same number of times form a *class* (in a plain network: the channels between two
layers; with residual sums: the channels of a stage). Channels leave a class in blocks, so that every class keeps a
multiple of what the kernels compute in. Costs are products of axis lengths and are recounted after every block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm
from typing import Literal

import numpy as np

from ...common.errors import PlanishError
from .dependency import Axis, Dependencies

Ranking = Literal["global", "layer"]


@dataclass(frozen=True)
class Costs:
    """Total = constant + sum of factor * product of the lengths of the term's axes."""

    constant: float
    terms: tuple[tuple[float, tuple[Axis, ...]], ...]


class Plan:
    """Which groups still stand, by class, and what the model costs with them."""

    def __init__(
        self, found: Dependencies, costs: Costs, scores: dict[int, float], multiple: int, minimum: int
    ) -> None:
        self.axes = list(found.axes)
        index = {axis: i for i, axis in enumerate(self.axes)}
        protected = found.protected()
        places: dict[int, dict[int, int]] = {}  # group -> axis -> how often it lies there
        fixed = np.zeros(len(self.axes), int)  # (axes,) positions that stay
        for axis, units in found.axes.items():
            for unit in units:
                group = found.group(unit)
                if group in protected:
                    fixed[index[axis]] += 1
                else:
                    counts = places.setdefault(group, {})
                    counts[index[axis]] = counts.get(index[axis], 0) + 1
        classes: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for group, counts in places.items():
            classes.setdefault(tuple(sorted(counts.items())), []).append(group)
        self.groups = [sorted(g, key=lambda group: (-scores[group], group)) for g in classes.values()]
        """by class, the most important first"""
        self.scores = [np.array([scores[g] for g in groups]) for groups in self.groups]
        self.kept = [len(g) for g in self.groups]
        self.lies = np.zeros((len(self.groups), len(self.axes)), int)  # (classes, axes) length of an axis per group
        for row, signature in enumerate(classes):
            for axis, count in signature:
                self.lies[row, axis] = count
        self.lengths = fixed + np.array(self.kept, int) @ self.lies  # (axes,)
        self.steps = [self._step(found, row, multiple) for row in range(len(self.groups))]
        self.floor = np.minimum(self.lengths, minimum)
        self.constant = costs.constant
        self.terms = [(factor, [index[a] for a in axes]) for factor, axes in costs.terms]

    def _step(self, found: Dependencies, row: int, multiple: int) -> int:
        """Groups in a block: with several channels of a layer in each (grouped convolution), fewer make a multiple."""
        made = [i for i, axis in enumerate(self.axes) if axis not in found.consumers and self.lies[row, i]]
        return lcm(*(multiple // gcd(multiple, int(self.lies[row, i])) for i in made))

    def cost(self, lengths: np.ndarray | None = None) -> float:
        """What the model costs with these axis lengths (those that stand now when left out)."""
        lengths = self.lengths if lengths is None else lengths
        return self.constant + sum(factor * float(np.prod(lengths[axes])) for factor, axes in self.terms)

    def next(self, row: int) -> int | None:
        """How many groups the class keeps after one more block goes; None when it must stay as it is."""
        kept = self.below(row, self.kept[row])
        if kept < 0 or self.kept[row] < self.steps[row]:
            return None
        touched = self.lies[row] > 0
        return kept if (self.lengths_with(row, kept)[touched] >= self.floor[touched]).all() else None

    def below(self, row: int, kept: int) -> int:
        """The next smaller number of groups that the rounding allows."""
        return (kept - 1) // self.steps[row] * self.steps[row]

    def lengths_with(self, row: int, kept: int) -> np.ndarray:
        """The axis lengths, (axes,), if one class kept so many groups."""
        return self.lengths + (kept - self.kept[row]) * self.lies[row]

    def set(self, row: int, kept: int) -> None:
        """Keep the `kept` most important groups of a class."""
        self.lengths = self.lengths_with(row, kept)
        self.kept[row] = kept

    def price(self, row: int, kept: int, ranking: Ranking) -> float:
        """How much is lost by going down to `kept`; the lowest goes first.

        global: importance lost per cost saved. layer: the share of the class that stands, so that all shrink alike.
        """
        if ranking == "layer":
            return -self.kept[row] / len(self.groups[row])
        saved = self.cost() - self.cost(self.lengths_with(row, kept))
        lost = float(self.scores[row][kept : self.kept[row]].sum())
        return lost / max(saved, 1e-30)

    def removed(self) -> set[int]:
        """Groups that go."""
        return {g for groups, kept in zip(self.groups, self.kept, strict=True) for g in groups[kept:]}


def reach(plan: Plan, goal: float, ranking: Ranking, what: str) -> None:
    """Remove blocks until the plan costs at most `goal`, then give back every block that the goal leaves room for.

    Raises PlanishError when the goal cannot be reached; `what` is the cost's name in the message.
    """
    full = plan.cost()
    taken: list[tuple[float, int, int]] = []  # price, class, groups kept before
    while plan.cost() > goal:
        choices = []
        for row in range(len(plan.groups)):
            kept = plan.next(row)
            if kept is not None:
                choices.append((plan.price(row, kept, ranking), row, kept))
        if not choices:
            raise PlanishError(
                f"pruning channels reaches {plan.cost() / full:.3f} of the {what} at best; {goal / full:.3f} was asked"
                " (the receipt of a milder goal names the layers that must stay)"
            )
        price, row, kept = min(choices)
        taken.append((price, row, plan.kept[row]))
        plan.set(row, kept)
    back = True
    while back:
        back = False
        for _, row, before in sorted(taken, reverse=True):
            # Blocks of one class come back in the reverse order of their removal, whatever their prices.
            if plan.below(row, before) == plan.kept[row] and plan.cost(plan.lengths_with(row, before)) <= goal:
                plan.set(row, before)
                back = True
