"""Rows of queries or keys, turned by rotary embedding while they are read (Su et al. 2021, in the form of Llama's halves)."""

import triton
import triton.language as tl


@triton.jit
def load(x_ptr, at, angle, inside, column, cos_ptr, sin_ptr, SIZE: tl.constexpr, ROTARY: tl.constexpr):
    """A tile (BM, P) float32 of rows that begin at `at` (BM, 1) and of `column` (1, P), zero beyond SIZE and where not `inside` (BM, 1).

    The first ROTARY features x become x cos + turned sin, where `turned` has the second half negated before the first; cos and sin
    (rows, ROTARY) are read in the rows `angle` (BM, 1). ROTARY = 0: as they are.
    """
    x = tl.load(x_ptr + at + column, inside & (column < SIZE), 0.0).to(tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        turns = inside & (column < ROTARY)
        first = column < HALF
        other = tl.load(x_ptr + at + tl.where(first, column + HALF, column - HALF), turns, 0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle * ROTARY + column, turns, 1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle * ROTARY + column, turns, 0.0).to(tl.float32)
        x = x * cos + tl.where(first, -other, other) * sin
    return x
