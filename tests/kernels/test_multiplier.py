"""Integer multipliers give the float contract's code for every sum in their range."""

from __future__ import annotations

import numpy as np
import pytest
from planish.kernels import integer
from planish.kernels.c import multiplier

REACH = 40000


def integer_codes(sums: np.ndarray, m: int, zero_point: int, low: int, high: int) -> np.ndarray:
    """The formula of multiplier.py."""
    return np.clip((sums * m + ((2 * zero_point + 1) << 31)) >> 32, low, high)


@pytest.mark.parametrize(
    ("zero_point", "low", "high"), [(-128, -128, 127), (3, -128, 127), (-20, -20, 127), (0, -8, 7)]
)
def test_every_sum(zero_point: int, low: int, high: int) -> None:
    rng = np.random.default_rng(zero_point + 200)
    factors = np.exp(rng.uniform(np.log(1e-4), np.log(0.4), 60)).astype(np.float32)
    least = rng.integers(-REACH, 0, factors.size)
    most = rng.integers(1, REACH, factors.size)
    words = multiplier.words(factors, least, most, zero_point, low, high)
    found = words < multiplier.FLOAT
    assert found.mean() > 0.9
    for word, factor, first, last in zip(words[found], factors[found], least[found], most[found], strict=True):
        sums = np.arange(first, last + 1)
        expected = integer.requantize(sums, factor, zero_point, low, high)
        np.testing.assert_array_equal(integer_codes(sums, int(word), zero_point, low, high), expected)


def test_others_keep_their_float_factor() -> None:
    """Halves right between two codes go to the even one, which no multiplier does; nor does one exist from 0.5 on."""
    factors = np.array([0.5, 0.25, 0.75, 3.0], np.float32)
    words = multiplier.words(factors, np.full(4, -1000), np.full(4, 1000), 0, -128, 127)
    assert (words >= multiplier.FLOAT).all()
    np.testing.assert_array_equal((words ^ multiplier.FLOAT).view(np.float32), factors)


def test_constant_outputs_have_one() -> None:
    """A factor of 0, as dead channels have."""
    (word,) = multiplier.words(np.zeros(1, np.float32), np.array([-9000]), np.array([9000]), 5, -128, 127)
    assert int(word) == 0
