"""`linear_int8_outlier` in TVM, with frozen outlier columns: the packed int8 product, and a thin one of gathered columns in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...common.errors import PlanishError
from ..linear_int8_outlier import TOP
from . import activations
from .lowering import Lowering, Use
from .packed import Packed, add_bias, half, linear, signed, single


class LinearInt8Outlier(Lowering):
    """Equal to the reference within float32 rounding, the integers and the count exactly. Raises PlanishError for the dynamic form.

    Without `outlier_weight` the outlier columns are stored in float32, as codes * scale: these may lie beyond float16.
    """

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """They always are."""
        return True

    def lower(self, use: Use) -> Sequence[Any]:
        """The expressions of y (..., out) and of the count of values beyond the threshold."""
        if use.attributes["dynamic"]:
            raise PlanishError(
                f"layer '{use.name}': outlier columns that are found at run time have no TVM form; frozen columns have"
            )
        relax, x = use.ir.relax, use.tensors["x"]
        op, codes, scale = relax.op, use.array("codes"), use.array("scale")
        found = use.optional("columns")
        columns = np.zeros(0, np.int64) if found is None else found
        outlier = np.zeros(codes.shape[1], bool)  # (in,)
        outlier[columns] = True
        threshold = relax.const(np.float32(use.attributes["threshold"]))
        hot = use.emit(op.greater_equal(op.abs(x), threshold))  # (..., in)
        inner = x
        if len(columns):
            apart = use.emit(op.logical_and(hot, relax.const(outlier)))
            inner = use.emit(op.where(apart, relax.const(np.float32(0)), x))
        rounded = self._rounded(use, inner)
        if len(columns):
            rounded = use.emit(op.multiply(rounded, relax.const((~outlier).astype(np.float32))))
        weight = Packed(codes.view(np.uint8), 8, codes.shape[1], scale[:, None], signed)
        y = linear(use, rounded, weight)
        if len(columns):
            chosen = use.emit(op.take(x, relax.const(columns), axis=-1))
            exact = use.optional("outlier_weight")
            thick = single(codes[:, columns] * scale[:, None]) if exact is None else half(exact)
            y = use.emit(op.add(y, linear(use, chosen, thick)))
        beyond = use.emit(op.logical_and(hot, relax.const(~outlier)))
        return [add_bias(use, y), self._count(use, beyond)]

    def _rounded(self, use: Use, x: Any) -> Any:
        """What the codes of each token of x stand for: round(x * (127 / c)) * (c / 127)."""
        tirx = use.ir.tirx
        top = tirx.const(float(TOP), "float32")

        def rounded(value: Any, largest: Any) -> Any:
            peak = activations.or_one(use, largest)
            return tirx.nearbyint(value * (top / peak)) * (peak / top)

        return activations.segments(use, x, use.shape(x)[-1], rounded, "rounded")

    def _count(self, use: Use, beyond: Any) -> Any:
        """int64, along the dimension `samples` or (1,)."""
        op, samples = use.ir.relax.op, int(use.attributes["samples"])
        ones = use.emit(op.astype(beyond, "int64"))
        rank = len(use.shape(ones))
        total = use.emit(op.sum(ones, axis=[d for d in range(rank) if d != samples]))
        return total if samples >= 0 else use.reshape(total, (1,))
