"""`linear_ovp` in TVM: a code and the one beside it say what it means; both tables stand in registers.

Four bits: a table for pairs without outlier and one for codes beside the identifier. Eight bits: two's complement, and shifts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..outlier_victim import CEILING, Codec, codec
from .lowering import Lowering, Use
from .packed import Decode, Packed, Reader, add_bias, linear


class LinearOvp(Lowering):
    """Equal to the reference within float32 rounding; rounded activations are the reference's."""

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether activations are rounded."""
        return int(attributes["x_bits"]) > 0

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out)."""
        relax, x, attributes = use.ir.relax, use.tensors["x"], use.attributes
        form = codec(int(attributes["bits"]), str(attributes["grid"]))
        step = use.optional("x_scale")
        if step is not None:
            x = _round_trip(use, x, float(step), codec(int(attributes["x_bits"]), str(attributes["x_grid"])))
        codes = form.read(torch.from_numpy(use.array("codes").copy())).numpy()  # (out, in)
        tables = None
        if form.bits == 4:
            tables = np.stack([form.normal_value.numpy(), form.outlier_value.numpy()])
        scale = use.array("scale")[:, None]
        y = linear(use, x, Packed(codes, form.bits, codes.shape[1], scale, _decode(form), tables=tables))
        if step is not None:
            y = use.emit(relax.op.multiply(y, relax.const(np.float32(step))))
        return [add_bias(use, y)]


def _decode(form: Codec) -> Decode:
    def decode(reader: Reader, k: Any) -> Any:
        tirx, code = reader.tirx, reader.code(k)
        mark = tirx.const(form.identifier, "uint32")
        beside = reader.code(k + 1 - 2 * (k % 2)) == mark
        if form.bits == 4:
            return tirx.Select(beside, reader.look_up(1, code), reader.look_up(0, code))
        normal = tirx.Select(code == mark, tirx.const(0, "int32"), reader.signed(k))
        return tirx.Select(beside, _abfloat(tirx, code), normal).astype("float32")

    return decode


def _abfloat(tirx: Any, code: Any) -> Any:
    """The 8-bit outlier: sign, 4 bits of exponent e, 3 of mantissa m: (8 + m) << (e + 4), at most 2^15; e = m = 0 is 0. int32."""

    def number(value: int) -> Any:
        return tirx.const(value, "uint32")

    shift = ((code >> number(3)) & number(15)) + number(4)
    size = tirx.min((((code & number(7)) + number(8)) << shift).astype("int32"), tirx.const(CEILING, "int32"))
    size = tirx.Select((code & number(127)) == number(0), tirx.const(0, "int32"), size)
    return tirx.Select(code >= number(128), -size, size)


def _round_trip(use: Use, x: Any, step: float, form: Codec) -> Any:
    """What x / step becomes by encoding and decoding: whole numbers."""
    te, tirx = use.ir.te, use.ir.tirx
    shape = use.shape(x)
    size, last = math.prod(shape), len(form.magnitude) - 1
    value = te.placeholder((size,), "float32", name="x")
    levels = te.placeholder((last + 1,), "float32", name="levels")
    divisor, zero = tirx.const(step, "float32"), tirx.const(0.0, "float32")
    threshold, top = tirx.const(form.threshold, "float32"), tirx.const(float(last), "float32")

    def kept(c: Any) -> Any:
        """Whether an element is no victim."""
        outlier = tirx.abs(value[c] / divisor) >= threshold
        other = tirx.abs(value[c + 1 - 2 * (c % 2)] / divisor) >= threshold
        return tirx.any(tirx.Not(other), tirx.all(outlier, c % 2 == 0))

    def rounded(c: Any) -> Any:
        q = value[c] / divisor
        half = tirx.min(tirx.abs(q) * tirx.const(2.0, "float32"), top).astype("int32")
        size = levels[half]
        return tirx.if_then_else(kept(c), tirx.Select(q < zero, zero - size, size), zero)

    y = te.compute((size,), rounded, name="y")
    operands = [use.reshape(x, (size,)), use.ir.relax.const(form.magnitude.numpy())]
    (made,) = use.call(te.create_prim_func([value, levels, y]), operands, [(size,)], what="rounded")
    return use.reshape(made, shape)
