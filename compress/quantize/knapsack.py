"""The multiple-choice knapsack: one choice for every item, least loss in total, costs within a budget. Solved exactly.

Dynamic programming over the frontier (Nemhauser & Ullmann 1969): after each item the assignments that no other beats in both cost and
loss are kept. An assignment is dropped when even fractional choices for the rest (the linear relaxation, Sinha & Zoltners 1979) could
not bring it below the best whole assignment known, so the frontier stays small. No cost is rounded; integers stay integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...common.errors import PlanishError

SLACK = 1e-9
"""share by which a bound may exceed the best known loss before it is believed, for rounding in float64"""


@dataclass(frozen=True)
class Solution:
    """One choice an item."""

    choices: tuple[int, ...]
    """index of the choice of each item"""
    cost: float
    loss: float


@dataclass(frozen=True)
class _Frontier:
    """Assignments of the first items, sorted by cost, each with less loss than all that cost less."""

    cost: np.ndarray
    """(n,)"""
    loss: np.ndarray
    """(n,)"""
    choice: np.ndarray
    """(n,) of the last item"""
    before: np.ndarray
    """(n,) index in the frontier of the items before"""


def solve(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> Solution:
    """The assignment of least loss whose cost is at most `budget`; the cheapest of those with equal loss.

    `costs` and `losses` have one row an item with one entry a choice. Raises PlanishError when even the cheapest choices
    cost more, and says what they cost.
    """
    rows = [_undominated(c, x) for c, x in zip(costs, losses, strict=True)]
    least = sum(row[0][0] for row in rows)
    if least > budget:
        raise PlanishError(f"a budget of {budget:.10g} cannot be kept: the smallest assignment costs {least:.10g}")
    tails = _relaxations(rows)
    best = _greedy(rows, budget)
    frontier = _Frontier(np.zeros(1), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    history: list[_Frontier] = []
    for index, row in enumerate(rows):
        frontier = _prune(_extended(frontier, row), tails[index + 1], budget, best)
        history.append(frontier)
    place = int(np.argmin(history[-1].loss)) if history else 0
    found: list[int] = []
    for step in reversed(history):
        found.append(int(step.choice[place]))
        place = int(step.before[place])
    choices = tuple(reversed(found))
    return Solution(
        choices,
        sum((c[i] for c, i in zip(costs, choices, strict=True)), 0),
        sum((x[i] for x, i in zip(losses, choices, strict=True)), 0.0),
    )


Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""costs rising, losses falling, and the indices of the choices"""


def _undominated(costs: Sequence[float], losses: Sequence[float]) -> Row:
    """The choices that no other beats in both, by cost."""
    order = np.lexsort((losses, costs))
    cost, loss = np.asarray(costs, np.float64)[order], np.asarray(losses, np.float64)[order]
    keep = np.concatenate([[True], loss[1:] < np.minimum.accumulate(loss)[:-1]])
    return cost[keep], loss[keep], order[keep]


def _hull(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Steps of the lower convex hull of an item's choices: extra cost and change of loss, steepest first."""
    cost, loss, _ = row
    kept = [0]
    for i in range(1, len(cost)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (loss[b] - loss[a]) * (cost[i] - cost[a]) <= (loss[i] - loss[a]) * (cost[b] - cost[a]):
                break
            kept.pop()
        kept.append(i)
    return np.diff(cost[kept]), np.diff(loss[kept])


def _relaxations(rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For the items from each index on: breakpoints (cost, loss) of the least loss with fractional choices, convex and falling."""
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(1), np.zeros(1))]
    steps_cost, steps_loss, base_cost, base_loss = np.zeros(0), np.zeros(0), 0.0, 0.0
    for row in reversed(rows):
        cost, loss = _hull(row)
        steps_cost, steps_loss = np.concatenate([steps_cost, cost]), np.concatenate([steps_loss, loss])
        order = np.argsort(steps_loss / steps_cost, kind="stable")
        steps_cost, steps_loss = steps_cost[order], steps_loss[order]
        base_cost, base_loss = base_cost + row[0][0], base_loss + row[1][0]
        found.append(
            (
                np.concatenate([[base_cost], base_cost + np.cumsum(steps_cost)]),
                np.concatenate([[base_loss], base_loss + np.cumsum(steps_loss)]),
            )
        )
    return found[::-1]


def _greedy(rows: Sequence[Row], budget: float) -> float:
    """Loss of a good whole assignment: the hulls' steps, steepest first, each taken where it still fits."""
    steps = [(x / c, i, c, x) for i, row in enumerate(rows) for c, x in zip(*_hull(row), strict=True)]
    spent, loss = sum(row[0][0] for row in rows), sum(row[1][0] for row in rows)
    stopped = set[int]()
    for _, item, cost, change in sorted(steps, key=lambda s: s[:2]):
        if item not in stopped and spent + cost <= budget:
            spent, loss = spent + cost, loss + change
        else:
            stopped.add(item)
    return float(loss)


def _extended(frontier: _Frontier, row: Row) -> _Frontier:
    """Every assignment with every choice of the next item."""
    cost, loss, index = row
    count = len(frontier.cost)
    return _Frontier(
        (cost[:, None] + frontier.cost).ravel(),
        (loss[:, None] + frontier.loss).ravel(),
        np.repeat(index, count),
        np.tile(np.arange(count), len(cost)),
    )


def _prune(f: _Frontier, tail: tuple[np.ndarray, np.ndarray], budget: float, best: float) -> _Frontier:
    """Without what is beaten, what cannot be finished within the budget, and what cannot become the best."""
    left = budget - f.cost
    bound = f.loss + np.interp(left, *tail)
    good = (left >= tail[0][0]) & (bound <= best + SLACK * max(abs(best), 1.0))
    f = _Frontier(f.cost[good], f.loss[good], f.choice[good], f.before[good])
    order = np.lexsort((f.loss, f.cost))
    loss = f.loss[order]
    keep = np.concatenate([[True], loss[1:] < np.minimum.accumulate(loss)[:-1]])
    chosen = order[keep]
    return _Frontier(f.cost[chosen], f.loss[chosen], f.choice[chosen], f.before[chosen])
