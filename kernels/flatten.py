"""`Flatten`: a tensor under another shape, in the order in which C stores both (channels last). It is the same bytes, so no code runs.

ONNX has no such op: the graph rewriter (export/rewrite.py) puts it where an ONNX Reshape and the op after it allow it.
"""

from __future__ import annotations

from typing import ClassVar

from . import layout
from .op import Array, Call, FloatOp, Node, Op


class Flatten(Op):
    """Elements keep their place in memory: of (n, c, h, w) the order is h, w, c."""

    onnx_types: ClassVar[tuple[str, ...]] = ()

    def parse(self, node: FloatOp) -> Node | None:
        """Never: no ONNX node means this."""
        return None

    def reference(self, node: Node, *inputs: Array) -> Array:
        """int8 codes (n, *shape[1:]) for int8 codes (n, ...)."""
        x = inputs[0]
        return layout.from_memory(layout.to_memory(x), node.output.shape)

    def macs(self, node: Node) -> int:
        """None."""
        return 0

    def call(self, node: Node) -> Call:
        """There is none: the output is an alias of the input."""
        raise AssertionError(f"'{node.name}' is an alias of its input: it has no call")

    def alias(self, node: Node) -> bool:
        """Always."""
        return True
