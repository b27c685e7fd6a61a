"""Transpose: the axes in another order. In C a copy in the order of memory, or nothing where only axes of size 1 move."""

from __future__ import annotations

from . import integer, layout, lookup
from .op import Array, Call, FloatOp, Node, Op, Unsupported
from .parsing import only, tables


class Transpose(Op):
    """Transpose that leaves the batch in front."""

    onnx_types = ("Transpose",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        rank = len(x.shape)
        perm = tuple(int(a) for a in node.attributes.get("perm") or range(rank)[::-1])
        if sorted(perm) != list(range(rank)) or perm[:1] != (0,):
            raise Unsupported(f"perm {list(perm)}; an order of the axes that starts with 0, the batch, is supported")
        if rank > layout.MOST_DIMENSIONS + 1:
            raise Unsupported(f"it has {rank} dimensions; up to {layout.MOST_DIMENSIONS + 1} are supported")
        if node.output.shape != tuple(x.shape[a] for a in perm):
            raise Unsupported(f"shape {x.shape} by perm {list(perm)} is not {node.output.shape}")
        return Node("transpose", node.name, (x,), node.output, {"perm": perm}, tables(node))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        return integer.look_up(inputs[0], node.constants.get("table")).transpose(node.attributes["perm"])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        if _plain(node):
            return lookup.call(node)
        strides = layout.strides(node.inputs[0].shape)
        return layout.strided_copy(node, 0, [strides[a] for a in node.attributes["perm"]])

    def alias(self, node: Node) -> bool:
        """See Op."""
        return "table" not in node.constants and _plain(node)


def _plain(node: Node) -> bool:
    """Whether the axes above size 1 keep their order in memory."""
    source = [a for a in layout.order(len(node.inputs[0].shape)) if node.inputs[0].shape[a] > 1]
    perm = node.attributes["perm"]
    target = [perm[a] for a in layout.order(len(perm)) if node.output.shape[a] > 1]
    return source == target
