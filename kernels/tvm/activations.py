"""Activations rounded to codes while the model runs: kernels from x to the real values that its codes stand for.

Rounding is half to even, divisions are float32 divisions as in the references, so the codes are theirs. The largest magnitude of a
segment is found lane by lane first: a maximum does not depend on the order, and so it takes vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .lowering import Use

Round = Callable[[Any, Any], Any]
"""round(value, largest): the rounded float32 value, given the largest magnitude of its segment"""


def symmetric(use: Use, x: Any, bits: int, segment: int) -> Any:
    """What x (..., n) becomes with one scale for every `segment` columns of a row: max |x| / (2^(bits-1) - 1), 1 where x is zero."""
    top = float((1 << (bits - 1)) - 1)

    def rounded(value: Any, largest: Any) -> Any:
        step = largest / use.ir.tirx.const(top, "float32")
        step = or_one(use, step)
        return clip(use, use.ir.tirx.nearbyint(value / step), -top, top) * step

    return segments(use, x, segment, rounded, "rounded")


def segments(use: Use, x: Any, segment: int, rounded: Round, what: str) -> Any:
    """`rounded` of every value of x (..., n) and the largest magnitude among the `segment` neighbours that it belongs to."""
    te, tirx = use.ir.te, use.ir.tirx
    shape = use.shape(x)
    count, lanes = math.prod(shape) // segment, math.gcd(segment, use.unit.lanes)
    value = te.placeholder((count, segment), "float32", name="x")
    k, lane = te.reduce_axis((0, segment // lanes), "k"), te.reduce_axis((0, lanes), "lane")
    partial = te.compute((count, lanes), lambda r, j: te.max(tirx.abs(value[r, k * lanes + j]), axis=k), name="partial")
    largest = te.compute((count,), lambda r: te.max(partial[r, lane], axis=lane), name="largest")
    y = te.compute((count, segment), lambda r, c: rounded(value[r, c], largest[r]), name="y")
    sch = use.ir.Schedule(te.create_prim_func([value, y]))
    row, column = sch.get_loops(sch.get_sblock("y"))
    _vectorize(sch, column, lanes)
    sch.compute_at(sch.get_sblock("largest"), row, preserve_unit_loops=True)
    sch.compute_at(sch.get_sblock("partial"), row, preserve_unit_loops=True)
    found = sch.get_sblock("partial")
    *_, j, step = sch.get_loops(found)
    sch.reorder(step, j)
    sch.vectorize(j)
    sch.decompose_reduction(found, step)
    (made,) = use.call(sch.mod["main"], [use.reshape(x, (count, segment))], [(count, segment)], what=what)
    return use.reshape(made, shape)


def affine(use: Use, x: Any) -> Any:
    """What x becomes with one unsigned 8-bit grid for the whole tensor, that of ONNX's DynamicQuantizeLinear."""
    te, tirx = use.ir.te, use.ir.tirx
    shape = use.shape(x)
    size = math.prod(shape)
    value = te.placeholder((size,), "float32", name="x")
    top, zero = tirx.const(255.0, "float32"), tirx.const(0.0, "float32")
    k, i = te.reduce_axis((0, size), "k"), te.reduce_axis((0, size), "i")
    least = te.compute((1,), lambda _: te.min(value[k], axis=k), name="least")
    most = te.compute((1,), lambda _: te.max(value[i], axis=i), name="most")

    def rounded(c: Any) -> Any:
        low, high = tirx.min(least[0], zero), tirx.max(most[0], zero)
        step = or_one(use, (high - low) / top)
        point = tirx.nearbyint(clip(use, -low / step, 0.0, 255.0))
        return (clip(use, tirx.nearbyint(value[c] / step) + point, 0.0, 255.0) - point) * step

    y = te.compute((size,), rounded, name="y")
    sch = use.ir.Schedule(te.create_prim_func([value, y]))
    _vectorize(sch, sch.get_loops(sch.get_sblock("y"))[-1], math.gcd(size, use.unit.lanes))
    (made,) = use.call(sch.mod["main"], [use.reshape(x, (size,))], [(size,)], what="rounded")
    return use.reshape(made, shape)


def or_one(use: Use, step: Any) -> Any:
    """The step, 1 where it is not positive."""
    tirx = use.ir.tirx
    return tirx.Select(step > tirx.const(0.0, "float32"), step, tirx.const(1.0, "float32"))


def clip(use: Use, value: Any, low: float, high: float) -> Any:
    """The value, at least `low` and at most `high`."""
    tirx = use.ir.tirx
    return tirx.max(tirx.min(value, tirx.const(high, "float32")), tirx.const(low, "float32"))


def _vectorize(sch: Any, loop: Any, lanes: int) -> None:
    if lanes > 1:
        _, vector = sch.split(loop, [None, lanes])
        sch.vectorize(vector)
