"""The same values under another quantization: dequantize followed at once by quantize. A table, and exact.

The importer hands such a pair on as an Identity. Where the quantization does not change either, the output is its input.
"""

from __future__ import annotations

from . import integer, lookup
from .op import Array, Call, FloatOp, Node, Op, Unsupported
from .parsing import only, tables


class Rescale(Op):
    """Identity, and Dropout, which does nothing at inference."""

    onnx_types = ("Identity", "Dropout")

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        if node.output.shape != x.shape:
            raise Unsupported(f"its output has shape {node.output.shape}; its input {x.shape}")
        return Node("rescale", node.name, (x,), node.output, {}, tables(node))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        return integer.look_up(inputs[0], node.constants.get("table"))

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        if self.alias(node):
            raise AssertionError(f"'{node.name}' is an alias of its input: it has no call")
        return lookup.call(node)

    def alias(self, node: Node) -> bool:
        """See Op."""
        return "table" not in node.constants
