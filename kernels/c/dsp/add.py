"""Add with integer factors and SMLAW: two multiplications and one saturation an element, no float.

The formula of kernels/add.py depends on one pair of codes, of which there are 65536. Factors and a start value are looked
for at export until all of them give the formula's code. Where none do, the float formula runs: with scales of few digits many
sums lie right between two codes, and rounding those to the even one is no linear function.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from ... import add, elementwise, integer
from ...op import Array, Call, Node
from ..version import Version

SHIFT = 20
"""PLANISH_DSP_ADD_SHIFT: sums have this many bits below the code's"""
NARROW_SHIFTS = (20, 17, 14)
"""tried for codes of fewer bits, whose scales differ more; larger factors fit with smaller shifts"""
TRIALS = sorted(range(-256, 257, 32), key=abs)
"""changes to the factors, in units of 2^-(shift + 8)"""


@dataclass(frozen=True)
class Factors:
    """What planish_dsp_add multiplies by."""

    a: int
    b: int
    start: int


class Add(Version):
    """Every operand that the portable version takes."""

    op = "add"
    features = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if any(t.bits != 8 for t in (*node.inputs, node.output)):
            return _narrow(node)
        factors = search(node, SHIFT)
        if factors is None:
            ratio_a, ratio_b, fixed = (float(v) for v in add.factors(node))
            made = elementwise.call(node, "dsp_add_float", {"ratio_a": ratio_a, "ratio_b": ratio_b, "fixed": fixed})
            source = "dsp/add_float.c"
        else:
            numbers = {"factor_a": factors.a, "factor_b": factors.b, "start": factors.start}
            made = elementwise.call(node, "dsp_add", numbers)
            source = "dsp/add.c"
        return replace(made, sources=(source,), headers=("dsp/add.h",))


def _narrow(node: Node) -> Call | None:
    """For operands or a sum of 4 or 2 bits; two activations whose sizes are multiples of 4."""
    shift, factors = next(((s, f) for s in NARROW_SHIFTS if (f := search(node, s)) is not None), (0, None))
    if factors is None or len(node.inputs) != 2 or any(t.size % 4 for t in node.inputs):
        return None
    bits = {k: t.bits for k, t in zip(("A_BITS", "B_BITS", "Y_BITS"), (*node.inputs, node.output), strict=True)}
    made = elementwise.call(
        node, "dsp_add_narrow", {"factor_a": factors.a, "factor_b": factors.b, "start": factors.start}
    )
    return replace(
        made,
        sources=(),
        headers=("dsp/add.h",),
        template="dsp/add_narrow.c",
        defines={**bits, "SHIFT": shift},
        overlap=max(0, node.output.bytes - node.inputs[0].bytes),
        in_place=tuple(i for i, t in enumerate(node.inputs) if t.bytes == node.output.bytes),
    )


def search(node: Node, shift: int) -> Factors | None:
    """Factors with which every pair of codes gives the formula's code, sums having `shift` bits below it."""
    ratio_a, ratio_b, fixed = add.factors(node)
    codes = [_codes(t.bits) for t in node.inputs] + [_codes(8)]  # of a and b; a constant b has 8 bits
    a, b = ((c + integer.UNSIGNED).astype(np.float32) for c in codes[:2])
    inner = np.broadcast_to(integer.fma(b, ratio_b, fixed)[None, :], (a.size, b.size))
    low, high = node.attributes["low"], node.attributes["high"]
    outer = np.broadcast_to(a[:, None], inner.shape)
    y = integer.from_unsigned(integer.fma(outer, ratio_a, inner), low, high).astype(np.int64)  # (a, b)
    # (start + sum) >> shift must be at least the code where that is not the lowest, at most where not the highest
    least = np.where(y > low, y << shift, -(2**62))
    most = np.where(y < high, (y + 1 << shift) - 1, 2**62)
    first = [round(float(r) * 2 ** (shift + 8)) for r in (ratio_a, ratio_b)]
    for change_a, change_b in itertools.product(TRIALS, TRIALS):
        factor_a, factor_b = first[0] + change_a, first[1] + change_b
        if max(abs(factor_a), abs(factor_b)) >= 2**31:
            return None
        terms = _terms(factor_b, codes[1])
        total = _terms(factor_a, codes[0])[:, None] + terms[None, :]
        lowest, highest = int((least - total).max()), int((most - total).min())
        start = (lowest + highest) // 2
        sums = [start + int(f(v)) for f in (np.min, np.max) for v in (terms, total)] + [start]
        if lowest <= highest and min(sums) >= -(2**31) and max(sums) < 2**31:
            return Factors(factor_a, factor_b, start)
    return None


def _codes(bits: int) -> Array:
    """int64 codes of a width, ascending."""
    return np.arange(-1 << bits - 1, 1 << bits - 1, dtype=np.int64)


def _terms(factor: int, codes: Array) -> Array:
    """int64: what each code adds to a sum."""
    return (factor * 256 * codes) >> 16
