"""`embedding_wna16` in TVM: the rows' bytes are read where they are stored, and decoded into the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .lowering import Lowering, Use


class EmbeddingWna16(Lowering):
    """Equal to the reference to the bit."""

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., columns)."""
        te, tirx = use.ir.te, use.ir.tirx
        bits, group = int(use.attributes["bits"]), int(use.attributes["group"])
        codes, scale, zero = use.array("codes"), use.array("scale"), use.optional("zero_point")
        shape, groups = use.shape("indices"), scale.shape[1]
        flat = use.reshape(use.tensors["indices"], (math.prod(shape),))
        arrays = [codes, scale] + ([] if zero is None else [zero])
        rows = te.placeholder((math.prod(shape),), str(flat.ty.dtype), name="indices")
        stored = [te.placeholder(a.shape, str(a.dtype), name=n) for a, n in zip(arrays, ("codes", "scale", "zero"), strict=False)]  # fmt: skip
        count = 8 // bits  # codes of a byte

        def value(i: Any, g: Any, k: Any) -> Any:
            byte = stored[0][rows[i], g, tirx.floordiv(k, count)].astype("int32")
            code = (byte >> (tirx.floormod(k, count) * bits)) & ((1 << bits) - 1)
            middle = 1 << (bits - 1) if zero is None else stored[2][rows[i], g].astype("int32")
            return (code - middle).astype("float32") * stored[1][rows[i], g]

        y = te.compute((math.prod(shape), groups, group), value, name="y")
        sch = use.ir.Schedule(te.create_prim_func([rows, *stored, y]))
        *_, k = sch.get_loops(sch.get_sblock("y"))
        if group % count == 0:
            _, inside = sch.split(k, [None, count])
            sch.unroll(inside)
        operands = [flat, *(use.constant(a) for a in arrays)]
        (found,) = use.call(sch.mod["main"], operands, [(math.prod(shape), groups, group)])
        return [use.reshape(found, (*shape, groups * group))]
