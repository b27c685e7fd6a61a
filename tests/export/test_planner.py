"""The memory plan is valid for any buffers, as small as an exhaustive search finds, and the same in every run."""

import itertools
import random

import pytest
from planish.common.errors import PlanishError
from planish.export import planner
from planish.export.planner import Buffer, Placed, Plan, Sharing, check, plan


def network(seed, sizes=(1, 7, 64, 100, 1000, 4096), most=30):
    """Buffers of a random network: mostly chains, with tensors that live on for a shortcut."""
    rng = random.Random(seed)
    steps = rng.randrange(3, most)
    return [Buffer(f"t{i}", rng.choice(sizes), i, min(steps, i + rng.choice([1, 1, 1, 2, 5]))) for i in range(steps)]


def sharings(buffers, seed, share=0.7):
    """Some outputs may overlap an input that dies when they are written, by a random distance or at the same place."""
    rng = random.Random(seed)
    return tuple(
        Sharing(
            y.name, x.name, rng.choice([None, 0, 1, 5, y.size // 2, y.size]), x.size == y.size and rng.random() < 0.5
        )
        for x, y in itertools.product(buffers, repeat=2)
        if x is not y and x.last == y.first > x.first and rng.random() < share
    )


@pytest.mark.parametrize("seed", range(25))
def test_valid_and_near_the_bound(seed):
    buffers = network(seed)
    found = plan(buffers)
    check(found)
    assert found.bound <= found.least <= found.arena
    assert found.arena <= 1.15 * found.bound + 4 * len(buffers)
    assert [p.buffer for p in found.placed] == buffers


@pytest.mark.parametrize("seed", range(25))
def test_valid_and_near_the_bound_with_sharing(seed):
    buffers = network(seed)
    shared = sharings(buffers, seed)
    found, plain = plan(buffers, sharings=shared), plan(buffers)
    check(found)
    assert found.least <= found.arena <= plain.arena
    assert found.bound == plain.bound
    assert found.arena <= 1.15 * found.least + 8 * len(buffers)


def smallest(buffers, shared, alignment):
    """The smallest arena of all: every offset of every buffer is tried."""
    allowed = {(s.output, s.input): s for s in shared}

    def fits(one, at, other, there):
        if not one.meets(other) or at + one.size <= there or there + other.size <= at:
            return True
        for (y, p), (x, q) in (((one, at), (other, there)), ((other, there), (one, at))):
            sharing = allowed.get((y.name, x.name))
            if sharing and ((sharing.same and p == q) or (sharing.distance is not None and p + sharing.distance <= q)):
                return True
        return False

    def possible(arena, placed):
        if len(placed) == len(buffers):
            return True
        buffer = buffers[len(placed)]
        for at in range(0, arena - buffer.size + 1, alignment):
            if all(fits(buffer, at, o, p) for o, p in zip(buffers, placed, strict=False)) and possible(
                arena, [*placed, at]
            ):
                return True
        return False

    return next(a for a in itertools.count(max(b.size for b in buffers)) if possible(a, []))


@pytest.mark.parametrize("alignment", [1, 2])
@pytest.mark.parametrize("seed", range(30))
def test_as_small_as_brute_force_finds(seed, alignment):
    buffers = network(seed, sizes=(1, 2, 3, 5, 6), most=7)
    for shared in ((), sharings(buffers, seed, share=1.0)):
        found = plan(buffers, alignment, shared)
        check(found)
        assert found.optimal
        assert found.arena == smallest(buffers, shared, alignment)


@pytest.mark.parametrize("seed", range(20))
def test_no_byte_is_lost_in_a_simulated_arena(seed):
    """Every step reads its dying input byte by byte and writes its output as late as the distance of the sharing allows."""
    buffers = network(seed, sizes=(3, 8, 21, 40))
    shared = tuple(s for s in sharings(buffers, seed) if s.distance is not None and not s.same)
    shared = tuple({s.output: s for s in shared}.values())  # one input each: what a kernel has
    found = plan(buffers, 1, shared)
    check(found)
    places = {p.buffer.name: p for p in found.placed}
    over = {s.output: s for s in shared}
    arena = [None] * found.arena
    for step in range(max(b.last for b in buffers) + 1):
        for buffer in (b for b in buffers if b.first == step):
            y, sharing = places[buffer.name], over.get(buffer.name)
            x = places[sharing.input] if sharing else None
            written = 0
            for read in range(x.buffer.size if x else 0):
                # byte `read` is still needed: everything that the distance allows is written before
                while written < min(y.buffer.size, read + sharing.distance):
                    arena[y.offset + written] = (y.buffer.name, written)
                    written += 1
                assert arena[x.offset + read] == (x.buffer.name, read)
            for rest in range(written, y.buffer.size):
                arena[y.offset + rest] = (y.buffer.name, rest)
        for one in (p for p in found.placed if p.buffer.first <= step <= p.buffer.last):
            if any(s.input == one.buffer.name and one.buffer.last == step for s in shared):
                continue  # its bytes may be gone: it was read above
            assert [arena[one.offset + i] for i in range(one.buffer.size)] == [
                (one.buffer.name, i) for i in range(one.buffer.size)
            ]


def test_same_buffers_same_plan():
    buffers = network(3)
    shared = sharings(buffers, 3)
    assert plan(buffers, sharings=shared) == plan(buffers, sharings=shared)


def test_exact_where_greedy_by_size_is_not():
    """Two long-lived small buffers around large ones: placing by size alone leaves a hole."""
    buffers = [
        Buffer("a", 4, 0, 1),
        Buffer("b", 8, 1, 2),
        Buffer("c", 4, 2, 3),
        Buffer("d", 8, 3, 4),
        Buffer("e", 4, 0, 2),
    ]
    found = plan(buffers)
    assert found.arena == found.bound
    assert found.optimal


def test_overlaps_chain():
    """x -> y -> z, each over the one before it: one buffer and the sum of the distances are enough."""
    buffers = [Buffer("x", 100, 0, 1), Buffer("y", 100, 1, 2), Buffer("z", 100, 2, 3)]
    shared = (Sharing("y", "x", 12), Sharing("z", "y", 8))
    found = plan(buffers, 4, shared)
    check(found)
    assert (found.bound, found.arena, found.optimal) == (200, 120, True)


def test_a_growing_output_takes_its_input_in():
    """A 1 x 1 convolution to twice the channels: the input lies in the output's second half."""
    found = plan([Buffer("x", 64, 0, 1), Buffer("y", 128, 1, 2)], 4, [Sharing("y", "x", 64)])
    assert found.arena == 128
    assert found.offset("x") == found.offset("y") + 64


def test_in_place_means_the_same_place():
    """Without a distance the output lies exactly where the input does, or apart."""
    buffers = [Buffer("x", 64, 0, 1), Buffer("y", 64, 1, 2), Buffer("r", 32, 0, 2)]
    found = plan(buffers, 4, [Sharing("y", "x", None, same=True)])
    assert found.arena == 96
    assert found.offset("x") == found.offset("y")


def test_offsets_are_aligned():
    found = plan([Buffer("a", 3, 0, 1), Buffer("b", 5, 0, 1), Buffer("c", 1, 1, 2)], alignment=8)
    assert all(p.offset % 8 == 0 for p in found.placed)


def test_peak_names_what_lives_there():
    step, live = plan([Buffer("a", 10, 0, 1), Buffer("b", 20, 1, 2), Buffer("c", 5, 2, 3)]).peak()
    assert (step, [b.name for b in live]) == (1, ["b", "a"])


def test_no_buffers():
    assert plan([]).arena == 0


def test_a_large_graph_is_planned_with_a_stated_gap(monkeypatch):
    monkeypatch.setattr(planner, "EFFORT", 2000)
    monkeypatch.setattr(planner, "EXHAUSTIVE", 2000)
    buffers = [Buffer(f"t{i}", 17 * (i % 13) + 1, i, i + 1 + i % 4) for i in range(200)]
    found = plan(buffers)
    check(found)
    assert found.least <= found.arena <= 1.2 * found.least


def test_check_finds_overlap_and_misplacement():
    a, b = Buffer("a", 8, 0, 1), Buffer("b", 8, 1, 2)
    with pytest.raises(PlanishError, match="overlap"):
        check(Plan((Placed(a, 0), Placed(b, 4)), 12, 16, 4))
    with pytest.raises(PlanishError, match="lies at"):
        check(Plan((Placed(a, 4),), 8, 8, 4))
    check(Plan((Placed(a, 0), Placed(Buffer("c", 8, 2, 3), 0)), 8, 8, 4))


def test_check_allows_what_a_sharing_allows_and_nothing_more():
    x, y = Buffer("x", 8, 0, 1), Buffer("y", 8, 1, 2)

    def made(at_x, at_y, *shared):
        return Plan((Placed(x, at_x), Placed(y, at_y)), 16, 16, 4, shared)

    check(made(4, 0, Sharing("y", "x", 4)))
    check(made(4, 4, Sharing("y", "x", None, same=True)))
    for wrong in (
        made(0, 4, Sharing("y", "x", 4)),
        made(4, 4, Sharing("y", "x", 4)),
        made(4, 0, Sharing("y", "x", 8)),
        made(4, 0, Sharing("y", "x", None, same=True)),
        made(4, 0, Sharing("x", "y", 0)),
    ):
        with pytest.raises(PlanishError, match="overlap"):
            check(wrong)


def test_bad_buffers():
    with pytest.raises(PlanishError, match="from step 3 to 2"):
        plan([Buffer("a", 8, 3, 2)])
    with pytest.raises(PlanishError, match="same name"):
        plan([Buffer("a", 8, 0, 1), Buffer("a", 4, 1, 2)])
