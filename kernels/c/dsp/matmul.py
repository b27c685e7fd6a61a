"""Matrix product of two activations with SMLAD: two rows by two columns at a time."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import ClassVar

from ... import matmul
from ...matmul import View
from ...op import Call, Node
from ..version import Version

UNIT = 4
"""depths that one step multiplies, and codes of a word"""
ROOM = 1024
"""bytes that columns wait in, about"""
REACH = 2**30
"""codes before saturation must stay below it"""


class Matmul(Version):
    """Every view of the operands; those that lie in whole words are read so."""

    op: ClassVar[str] = "matmul"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        t = node.attributes
        depth, columns = t["depth"], t["columns"]
        reach = depth * 255 * 255 * float(t["rescale"])
        if any(x.bits != 8 for x in (*node.inputs, node.output)) or reach >= REACH:
            return None
        units = math.ceil(depth / UNIT)
        held = min(_whole(columns), max(UNIT, ROOM // (8 * units) // UNIT * UNIT))
        a, b = t["a"], t["b"]
        transposed = View(b.offset, b.batch, b.column, b.row)
        b_words = 1 if _words(transposed) else 2 if _words(b) and columns % UNIT == 0 else 0
        return Call(
            kernel="dsp_matmul",
            sources=("dsp/matmul.c",),
            headers=("dsp/matmul.h",),
            fields={
                **matmul.fields(node),
                "units": units,
                "held": held,
                "a_words": int(_words(a)),
                "b_words": b_words,
            },
            arrays={},
            scratch=8 * units * (held + 2),
        )


def _words(view: View) -> bool:
    """Whether rows are runs of codes that begin on words."""
    steps = asdict(view)
    return steps.pop("column") == 1 and all(v % UNIT == 0 for v in steps.values())


def _whole(columns: int) -> int:
    return math.ceil(columns / UNIT) * UNIT
