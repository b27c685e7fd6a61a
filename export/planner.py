"""Static memory plan: an offset in one arena for every activation, so that the generated C allocates nothing.

A buffer lives from the step that writes it to the last step that reads it. Of two buffers a and b that live at the same time,
one begins before the other, and

    offset(b) >= offset(a) + gap(a, b)      or      offset(a) >= offset(b) + gap(b, a)

where gap(a, b) is the size of a (rounded up to the alignment). A kernel that has read its input up to where it writes may lay its output y over that
input x (`Sharing`): then gap(y, x) is only the distance that the kernel needs, which can be 0.

Finding the smallest arena is the dynamic storage allocation problem (NP-hard; Garey and Johnson SR2). Two facts are used. (1) Placing
buffers in the order of an optimal plan's offsets, each as low as those before it allow, gives an arena as small; so a search
through orders misses nothing. Orders are improved by exchanges, then tried exhaustively, with pruning, up to a fixed
effort. (2) At every step, the live buffers need the sum of their sizes less what one sharing can save: no plan is smaller
than `least`. Where the exhaustive search ends, `least` is the arena itself: the plan is optimal.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..common.errors import PlanishError

EFFORT = 60_000
"""buffers placed at most while orders are exchanged"""
EXHAUSTIVE = 400_000
"""buffers looked at in partial orders, at most, while a better plan, or the proof that there is none, is searched for"""
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
    slot: str | None = None
    """buffers of one slot lie at the same offset, as far as none of them meets another: the same step of many patches"""

    def meets(self, other: Buffer) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Sharing:
    """An output that may lie over an input although both live at the same step."""

    output: str
    input: str
    distance: int | None
    """the output may begin this many bytes or more before the input; None: it may not overlap it that way"""
    same: bool = False
    """it may also begin where the input begins"""


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
    """Offsets of all buffers; `arena` bytes are needed."""

    placed: tuple[Placed, ...]
    """in the order in which the buffers were given"""
    arena: int
    bound: int
    """bytes that live at once in the fullest step: no plan without sharing needs fewer"""
    alignment: int
    sharings: tuple[Sharing, ...] = ()
    least: int = 0
    """bytes that every plan with these sharings needs at least"""

    @property
    def optimal(self) -> bool:
        """Whether it is proven that no plan is smaller."""
        return self.arena == self.least

    def offset(self, name: str) -> int:
        """First byte of the buffer called `name`."""
        return next(p.offset for p in self.placed if p.buffer.name == name)

    def peak(self) -> tuple[int, list[Buffer]]:
        """The step that needs the most bytes and what lives there, largest first."""
        return peak([p.buffer for p in self.placed], self.sharings)


def peak(buffers: Sequence[Buffer], sharings: Sequence[Sharing] = ()) -> tuple[int, list[Buffer]]:
    """The step that needs the most bytes and what lives there, largest first."""
    steps = sorted({b.first for b in buffers})
    if not steps:
        return 0, []
    step = max(steps, key=lambda s: _need([b for b in buffers if b.first <= s <= b.last], sharings, 1))
    return step, sorted((b for b in buffers if b.first <= step <= b.last), key=lambda b: (-b.size, b.name))


def least(buffers: Sequence[Buffer], sharings: Sequence[Sharing] = (), alignment: int = 1) -> int:
    """Bytes that the fullest step needs at least, whatever the plan."""
    steps = {b.first for b in buffers}
    return max((_need([b for b in buffers if b.first <= s <= b.last], sharings, alignment) for s in steps), default=0)


def plan(buffers: Iterable[Buffer], alignment: int = 4, sharings: Iterable[Sharing] = ()) -> Plan:
    """A plan whose offsets are multiples of `alignment`. Same buffers, same plan."""
    given, shared = tuple(buffers), tuple(sharings)
    lowest = least(given, shared, alignment)
    for buffer in given:
        if buffer.size < 0 or buffer.first > buffer.last:
            raise PlanishError(
                f"buffer '{buffer.name}' has {buffer.size} bytes from step {buffer.first} to {buffer.last}"
            )
    if len({b.name for b in given}) < len(given):
        raise PlanishError("two buffers have the same name")
    slots = _slots(given)
    problem = _problem(slots, shared, alignment, lowest)
    found = _exchange(problem)
    if found.arena > lowest:
        found, complete = _exhaust(problem, found)
        if complete and len(slots) == len(given):
            lowest = found.arena
    offsets = {b.name: o for slot, o in zip(slots, found.offsets, strict=True) for b in slot}
    arena = found.arena
    if arena > lowest and len(slots) < len(given):
        # every buffer by itself, in the order of the slots: what one patch need not leave free for another
        alone = _problem([[b] for b in given], shared, alignment, lowest)
        free = _exchange(alone, sorted(range(len(given)), key=lambda i: (offsets[given[i].name], i)))
        if free.arena < arena:
            arena, offsets = free.arena, {b.name: o for b, o in zip(given, free.offsets, strict=True)}
    placed = tuple(Placed(b, offsets[b.name]) for b in given)
    return Plan(placed, arena, least(given), alignment, shared, lowest)


def _slots(buffers: Sequence[Buffer]) -> list[list[Buffer]]:
    """Buffers that are placed together."""
    slots: dict[str, list[Buffer]] = {}
    single: list[list[Buffer]] = []
    for buffer in buffers:
        members = [] if buffer.slot is None else slots.setdefault(buffer.slot, [])
        if buffer.slot is None or any(buffer.meets(m) for m in members):
            single.append([buffer])
        else:
            members.append(buffer)
    return [*single, *slots.values()]


def check(plan: Plan) -> None:
    """Raise PlanishError unless all buffers lie inside the arena, are aligned, and those that live together are apart.

    Apart: no byte in common, or an output and its input as their sharing allows.
    """
    allowed = {(s.output, s.input): s for s in plan.sharings}
    for index, one in enumerate(plan.placed):
        if one.offset % plan.alignment or one.offset < 0 or one.end > plan.arena:
            raise PlanishError(f"memory plan: '{one.buffer.name}' lies at {one.offset} to {one.end} of {plan.arena}")
        for other in plan.placed[:index]:
            if one.buffer.meets(other.buffer) and not (_apart(one, other, allowed) or _apart(other, one, allowed)):
                raise PlanishError(
                    f"memory plan: '{one.buffer.name}' and '{other.buffer.name}' overlap while both live"
                )


def _apart(lower: Placed, upper: Placed, allowed: dict[tuple[str, str], Sharing]) -> bool:
    if lower.end <= upper.offset:
        return True
    sharing = allowed.get((lower.buffer.name, upper.buffer.name))
    if sharing is None:
        return False
    if sharing.same and lower.offset == upper.offset:
        return True
    return sharing.distance is not None and lower.offset + sharing.distance <= upper.offset


def _need(live: Sequence[Buffer], sharings: Sequence[Sharing], alignment: int) -> int:
    """Bytes that these buffers, which all meet, need at least: their sum less all that pairs of them can have in common."""
    size = {b.name: _aligned(b.size, alignment) for b in live}
    slack = max((size[b.name] - b.size for b in live), default=0)  # the topmost buffer may end unaligned
    savings = [
        (_saving(s, size[s.input], size[s.output], alignment), s)
        for s in sharings
        if s.input in size and s.output in size
    ]
    return sum(size.values()) - slack - _most(savings, size)


def _saving(sharing: Sharing, x: int, y: int, alignment: int) -> int:
    """Bytes that two buffers of x (input) and y (output) bytes can have in common."""
    saved = min(x, y) if sharing.same else 0
    if sharing.distance is not None:
        saved = max(saved, x + y - max(x + _aligned(sharing.distance, alignment), y))
    return saved


def _most(savings: Sequence[tuple[int, Sharing]], size: dict[str, int]) -> int:
    """An upper bound of what sharings save together.

    A union is at least the sum of the sizes less what every pair has in common. The inputs of one output are apart from each other,
    so it covers no more of them than its own size.
    """
    by_output: dict[str, int] = {}
    for saved, sharing in savings:
        by_output[sharing.output] = by_output.get(sharing.output, 0) + saved
    return sum(min(saved, size[name]) for name, saved in by_output.items())


@dataclass(frozen=True)
class _Found:
    offsets: tuple[int, ...]
    arena: int


@dataclass(frozen=True)
class _Item:
    """What is placed as one: a buffer, or a slot."""

    bytes: int
    """of the largest member"""
    size: int
    """the same, aligned"""
    lives: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        return self.lives[0][0]

    @property
    def span(self) -> int:
        """Steps from the beginning to the end."""
        return self.lives[-1][1] - self.lives[0][0] + 1


@dataclass(frozen=True)
class _Problem:
    """Items by index, and for each the others that it meets."""

    items: tuple[_Item, ...]
    neighbours: tuple[tuple[tuple[int, int, int, bool], ...], ...]
    """for item i: (j, gap(i, j), gap(j, i), whether both may begin at one place) for every j that it meets"""
    alignment: int
    least: int
    """no plan is smaller"""

    def arena(self, offsets: Sequence[int]) -> int:
        """Bytes up to the end of the last item."""
        return max((o + i.bytes for o, i in zip(offsets, self.items, strict=True)), default=0)

    def place(self, order: Sequence[int], given: dict[int, int] | None = None) -> list[int]:
        """Each buffer in turn at the lowest offset that the `given` ones and those before it leave free."""
        offsets = [-1] * len(self.items)
        for i, offset in (given or {}).items():
            offsets[i] = offset
        for i in order:
            taken = [(offsets[j] - low, offsets[j] + high) for j, low, high, _ in self.neighbours[i] if offsets[j] >= 0]
            taken.sort()
            start = 0
            for low, high in taken:  # places strictly between low and high are taken
                if start <= low:
                    break
                start = max(start, high)
            for j, _, _, same in self.neighbours[i]:
                if same and 0 <= offsets[j] < start and self._fits(i, offsets[j], j, offsets):
                    start = offsets[j]
            offsets[i] = start
        return offsets

    def saving(self, i: int, j: int, up: int, down: int, same: bool) -> int:
        """Bytes that items i and j can have in common; up: gap(i, j), down: gap(j, i)."""
        one, other = self.items[i].size, self.items[j].size
        together = min(max(up + other, one), max(down + one, other), max(one, other) if same else one + other)
        return one + other - together

    def _fits(self, i: int, start: int, partner: int, offsets: Sequence[int]) -> bool:
        return all(
            j == partner or offsets[j] < 0 or start <= offsets[j] - low or start >= offsets[j] + high
            for j, low, high, _ in self.neighbours[i]
        )


def _problem(slots: Sequence[Sequence[Buffer]], sharings: Sequence[Sharing], alignment: int, lowest: int) -> _Problem:
    shared = {(s.output, s.input): s for s in sharings}
    items = tuple(
        _Item(
            max(b.size for b in slot),
            _aligned(max(b.size for b in slot), alignment),
            tuple(sorted((b.first, b.last) for b in slot)),
        )
        for slot in slots
    )
    neighbours: list[list[tuple[int, int, int, bool]]] = [[] for _ in slots]
    for i, one in enumerate(slots):
        for j, other in enumerate(slots[:i]):
            met = [(a, b) for a in one for b in other if a.meets(b)]
            if not met:
                continue
            down = max(_gap(a, b, shared, alignment) for a, b in met)
            up = max(_gap(b, a, shared, alignment) for a, b in met)
            same = all(_same(a, b, shared) for a, b in met)
            neighbours[i].append((j, down, up, same))
            neighbours[j].append((i, up, down, same))
    return _Problem(items, tuple(tuple(n) for n in neighbours), alignment, lowest)


def _gap(lower: Buffer, upper: Buffer, shared: dict[tuple[str, str], Sharing], alignment: int) -> int:
    """How far after `lower` begins `upper` may begin."""
    sharing = shared.get((lower.name, upper.name))
    whole = _aligned(lower.size, alignment)
    if sharing is None or sharing.distance is None:
        return whole
    return min(whole, _aligned(sharing.distance, alignment))


def _same(one: Buffer, other: Buffer, shared: dict[tuple[str, str], Sharing]) -> bool:
    return any(p in shared and shared[p].same for p in ((one.name, other.name), (other.name, one.name)))


def _exchange(problem: _Problem, start: Sequence[int] | None = None) -> _Found:
    """The best of several orders, improved by moving one item at a time: more often one that ends at the arena's end.

    `start`: an order to begin with, too.
    """
    given = problem.items
    indices = list(range(len(given)))
    keys = (
        lambda i: (-given[i].size, given[i].first),
        lambda i: (-given[i].size, -given[i].first),
        lambda i: (-given[i].size * given[i].span, given[i].first),
        lambda i: (-given[i].span, -given[i].size),
        lambda i: (given[i].first, -given[i].size),
        lambda i: (-given[i].lives[-1][1], -given[i].size),
    )
    orders = [*([] if start is None else [list(start)]), *(sorted(indices, key=key) for key in keys)]
    tried = [(problem.place(order), order) for order in orders]
    offsets, order = min(tried, key=lambda t: problem.arena(t[0]))
    best = problem.arena(offsets)
    generator = random.Random(SEED)
    for _ in range(EFFORT // max(len(given), 1) if len(given) > 1 else 0):
        if best <= problem.least:
            break
        trial = list(order)
        tops = [i for i in order if offsets[i] + given[i].bytes == best]
        near = [j for i in tops for j, *_ in problem.neighbours[i]] + tops
        moved = generator.choice(near) if generator.random() < 0.7 else generator.choice(trial)
        trial.remove(moved)
        trial.insert(generator.randrange(len(trial) + 1), moved)
        places = problem.place(trial)
        found = problem.arena(places)
        if found <= best:  # equal ones too, so that the search can cross plateaus
            best, offsets, order = found, places, trial
    return _Found(tuple(offsets), best)


def _exhaust(problem: _Problem, found: _Found) -> tuple[_Found, bool]:
    """The best plan of an exhaustive search, and whether the search ended within its effort."""
    visits = EXHAUSTIVE // max(1, len(problem.items))
    while found.arena > problem.least:
        search = _Search(problem, found.arena, visits)
        complete = search.visit({}, dict.fromkeys(search.hard, 0), 0, 0)
        if search.better is None:
            return found, complete
        found, visits = search.better, search.visits
    return found, True


class _Search:
    """Search for a plan below `limit` bytes. Buffers are placed in the order of their offsets, each where those before it allow.

    Buffers that find a place below `limit` wherever the others lie are put back at the end.
    """

    def __init__(self, problem: _Problem, limit: int, visits: int) -> None:
        self.problem = problem
        self.limit = limit
        self.visits = visits
        """partial orders that may still be visited"""
        self.better: _Found | None = None
        self.hard, self.easy = self._split()
        self.cliques = _cliques(problem, self.hard)
        self.groups = _rigid(problem, set(self.hard))
        self.savings = {
            (i, j): problem.saving(i, j, up, down, same)
            for i in self.hard
            for j, up, down, same in problem.neighbours[i]
            if j < i and problem.saving(i, j, up, down, same)
        }
        self.seen: set[tuple[tuple[tuple[int, int], ...], int, int]] = set()

    def visit(self, offsets: dict[int, int], earliest: dict[int, int], last: int, end: int) -> bool:
        """Place the rest at or after `last`, where `end` bytes are taken already; False when the effort is spent.

        `offsets` of what is placed, `earliest` offsets of what is not. Ends when `better` is found.
        """
        problem = self.problem
        self.visits -= 1
        if self.visits < 0:
            return False
        if not earliest:
            places = problem.place(self.easy[::-1], offsets)
            self.better = _Found(tuple(places), problem.arena(places))
            return True
        state = (tuple(sorted(earliest.items())), last, end)
        if state in self.seen or self._hopeless(earliest, last):
            return True
        self.seen.add(state)
        choices = [(max(earliest[i] for i in g), g) for g in self.groups if all(i in earliest for i in g)]
        for start, group in sorted(choices, key=lambda c: (c[0], -problem.items[c[1][0]].size, c[1])):
            after = {i: e for i, e in earliest.items() if i not in group}
            for i in group:
                for j, gap, _, _ in problem.neighbours[i]:
                    if j in after:
                        after[j] = max(after[j], start + gap)
            ends = max(end, *(start + problem.items[i].bytes for i in group))
            if start < last or ends >= self.limit:
                continue
            if not self.visit(offsets | dict.fromkeys(group, start), after, start, ends):
                return False
            if self.better is not None:
                return True
        return True

    def _hopeless(self, earliest: dict[int, int], last: int) -> bool:
        """Whether the unplaced buffers of some step cannot end below the limit."""
        problem = self.problem
        for clique in self.cliques:
            rest = [i for i in clique if i in earliest]
            if not rest:
                continue
            start = max(last, min(earliest[i] for i in rest))
            if start + self._need(rest) >= self.limit:
                return True
            if any(earliest[i] + problem.items[i].bytes >= self.limit for i in rest):
                return True
        return False

    def _need(self, rest: Sequence[int]) -> int:
        """Bytes that items which all meet need at least."""
        items = [self.problem.items[i] for i in rest]
        slack = max(i.size - i.bytes for i in items)
        inside = set(rest)
        shared = sum(saved for (i, j), saved in self.savings.items() if i in inside and j in inside)
        return max(sum(i.size for i in items) - shared - slack, *(i.bytes for i in items))

    def _split(self) -> tuple[list[int], list[int]]:
        """Buffers that matter, and those that always find a place, in the order in which they were left out.

        The others take at most low + high bytes of places each, open intervals; what is not more than all the places stays free.
        """
        problem = self.problem
        left = set(range(len(problem.items)))
        easy: list[int] = []
        while True:
            for i in sorted(left):
                taken = sum(low + high for j, low, high, _ in problem.neighbours[i] if j in left)
                if taken <= self.limit - problem.alignment - problem.items[i].size:
                    easy.append(i)
                    left.discard(i)
                    break
            else:
                return sorted(left), easy


def _cliques(problem: _Problem, chosen: Sequence[int]) -> list[list[int]]:
    """The chosen items that live at each step, largest sets only."""
    lives = [(i, life) for i in chosen for life in problem.items[i].lives]
    found = {tuple(i for i, (begin, end) in lives if begin <= step <= end) for step in {life[0] for _, life in lives}}
    sets = [set(f) for f in found]
    return [sorted(s) for s in sorted(sets, key=sorted) if not any(s < other for other in sets)]


def _rigid(problem: _Problem, chosen: set[int]) -> list[tuple[int, ...]]:
    """Single items, and sets that may all begin at one place: those are placed together."""
    groups: list[tuple[int, ...]] = [(i,) for i in sorted(chosen)]
    waiting = list(groups)
    meets = {(i, j): same for i in chosen for j, _, _, same in problem.neighbours[i]}
    while waiting:
        group = waiting.pop()
        for i in group:
            for j, _, _, same in problem.neighbours[i]:
                grown = tuple(sorted({*group, j}))
                fits = same and j in chosen and j not in group and all(meets.get((j, k), True) for k in group)
                if fits and grown not in groups:
                    groups.append(grown)
                    waiting.append(grown)
    return groups


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
