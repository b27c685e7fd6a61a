"""The memory plan is valid for any buffers, near the lower bound, and the same in every run."""

import random

import pytest
from planish.common.errors import PlanishError
from planish.export.planner import Buffer, Placed, Plan, check, plan


def network(seed):
    """Buffers of a random network: mostly chains, with tensors that live on for a shortcut."""
    rng = random.Random(seed)
    steps = rng.randrange(3, 30)
    return [
        Buffer(f"t{i}", rng.choice([1, 7, 64, 100, 1000, 4096]), i, min(steps, i + rng.choice([1, 1, 1, 2, 5])))
        for i in range(steps)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_valid_and_near_the_bound(seed):
    buffers = network(seed)
    found = plan(buffers)
    check(found)
    assert found.bound <= found.arena
    assert found.arena <= 1.15 * found.bound + 4 * len(buffers)
    assert [p.buffer for p in found.placed] == buffers


def test_same_buffers_same_plan():
    assert plan(network(3)) == plan(network(3))


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


def test_offsets_are_aligned():
    found = plan([Buffer("a", 3, 0, 1), Buffer("b", 5, 0, 1), Buffer("c", 1, 1, 2)], alignment=8)
    assert all(p.offset % 8 == 0 for p in found.placed)


def test_peak_names_what_lives_there():
    step, live = plan([Buffer("a", 10, 0, 1), Buffer("b", 20, 1, 2), Buffer("c", 5, 2, 3)]).peak()
    assert (step, [b.name for b in live]) == (1, ["b", "a"])


def test_no_buffers():
    assert plan([]).arena == 0


def test_check_finds_overlap_and_misplacement():
    a, b = Buffer("a", 8, 0, 1), Buffer("b", 8, 1, 2)
    with pytest.raises(PlanishError, match="overlap"):
        check(Plan((Placed(a, 0), Placed(b, 4)), 12, 16, 4))
    with pytest.raises(PlanishError, match="lies at"):
        check(Plan((Placed(a, 4),), 8, 8, 4))
    check(Plan((Placed(a, 0), Placed(Buffer("c", 8, 2, 3), 0)), 8, 8, 4))
