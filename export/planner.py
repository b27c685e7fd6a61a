"""Static memory plan: an offset in one arena for every activation, so that the generated C allocates nothing.

A buffer lives from the step that writes it to the last step that reads it; buffers that live at the same time must not
overlap. Finding the smallest arena is the dynamic storage allocation problem (NP-hard; Garey and Johnson SR2). Placing
buffers one after another, each at the lowest offset that is free during its life, reaches the optimum for some order, so
several orders are tried and the best is improved by exchanges until it meets the lower bound or a fixed effort is spent.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..common.errors import PlanishError

EFFORT = 3000
"""exchanges tried at most; each places every buffer anew"""
SEED = 0
"""the search is random but the same in every run"""


@dataclass(frozen=True)
class Buffer:
    """Memory that is needed from step `first` to step `last`, both included."""

    name: str
    size: int
    """bytes"""
    first: int
    last: int

    def meets(self, other: Buffer) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placed:
    """A buffer and its first byte in the arena."""

    buffer: Buffer
    offset: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.buffer.size


@dataclass(frozen=True)
class Plan:
    """Offsets of all buffers. `arena` bytes are needed; no plan needs fewer than `bound`."""

    placed: tuple[Placed, ...]
    """in the order in which the buffers were given"""
    arena: int
    bound: int
    alignment: int

    def offset(self, name: str) -> int:
        """First byte of the buffer called `name`."""
        return next(p.offset for p in self.placed if p.buffer.name == name)

    def peak(self) -> tuple[int, list[Buffer]]:
        """The step with the most live bytes and what lives there, largest first."""
        return peak([p.buffer for p in self.placed])


def peak(buffers: Sequence[Buffer]) -> tuple[int, list[Buffer]]:
    """The step with the most live bytes and what lives there, largest first."""
    steps = sorted({b.first for b in buffers})
    if not steps:
        return 0, []
    step = max(steps, key=lambda s: sum(b.size for b in buffers if b.first <= s <= b.last))
    return step, sorted((b for b in buffers if b.first <= step <= b.last), key=lambda b: (-b.size, b.name))


def plan(buffers: Iterable[Buffer], alignment: int = 4) -> Plan:
    """A plan whose offsets are multiples of `alignment`. Same buffers, same plan."""
    given = list(buffers)
    for buffer in given:
        if buffer.size < 0 or buffer.first > buffer.last:
            raise PlanishError(
                f"buffer '{buffer.name}' has {buffer.size} bytes from step {buffer.first} to {buffer.last}"
            )
    bound = sum(b.size for b in peak(given)[1])
    meets = [[i for i, other in enumerate(given) if i != j and other.meets(buffer)] for j, buffer in enumerate(given)]

    def arena_of(order: Sequence[int]) -> tuple[int, list[int]]:
        offsets = _place(given, meets, order, alignment)
        return max((o + b.size for o, b in zip(offsets, given, strict=True)), default=0), offsets

    indices = list(range(len(given)))
    keys = (
        lambda i: (-given[i].size, given[i].first),
        lambda i: (-given[i].size * (given[i].last - given[i].first + 1), given[i].first),
        lambda i: (given[i].first - given[i].last, -given[i].size),
        lambda i: (given[i].first, -given[i].size),
        lambda i: (-given[i].last, -given[i].size),
    )
    orders = [sorted(indices, key=key) for key in keys]
    best, offsets, order = min(((*arena_of(o), o) for o in orders), key=lambda r: r[0])
    generator = random.Random(SEED)
    for _ in range(EFFORT if len(given) > 1 else 0):
        if best <= _aligned(bound, alignment):
            break
        trial = list(order)
        moved = trial.pop(generator.randrange(len(trial)))
        trial.insert(generator.randrange(len(trial) + 1), moved)
        found, places = arena_of(trial)
        if found <= best:  # equal ones too, so that the search can cross plateaus
            best, offsets, order = found, places, trial
    placed = tuple(Placed(b, o) for b, o in zip(given, offsets, strict=True))
    return Plan(placed, best, bound, alignment)


def check(plan: Plan) -> None:
    """Raise PlanishError unless all buffers lie inside the arena, are aligned, and none overlaps another while both live."""
    for index, one in enumerate(plan.placed):
        if one.offset % plan.alignment or one.offset < 0 or one.end > plan.arena:
            raise PlanishError(f"memory plan: '{one.buffer.name}' lies at {one.offset} to {one.end} of {plan.arena}")
        for other in plan.placed[:index]:
            if one.buffer.meets(other.buffer) and one.offset < other.end and other.offset < one.end:
                raise PlanishError(
                    f"memory plan: '{one.buffer.name}' and '{other.buffer.name}' overlap while both live"
                )


def _place(
    buffers: Sequence[Buffer], meets: Sequence[Sequence[int]], order: Sequence[int], alignment: int
) -> list[int]:
    """Each buffer in turn at the lowest offset that is free during its life."""
    offsets = [-1] * len(buffers)
    for index in order:
        taken = sorted((offsets[i], offsets[i] + buffers[i].size) for i in meets[index] if offsets[i] >= 0)
        start = 0
        for low, high in taken:
            if low - start >= buffers[index].size:
                break
            start = max(start, _aligned(high, alignment))
        offsets[index] = start
    return offsets


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
