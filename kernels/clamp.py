"""Relu and Clip (Relu6) that stand alone: not fused into the op before them.

With one quantization on both sides the codes are clamped; with two, a table moves them as well. Exact.
"""

from __future__ import annotations

import numpy as np

from . import integer, lookup, parsing
from .op import Array, Call, FloatOp, Node, Op, Unsupported


class Clamp(Op):
    """Relu, Clip."""

    onnx_types = ("Relu", "Clip")

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. The bounds of Clip are inputs 1 and 2, or attributes min and max."""
        x = parsing.only(node)
        if node.output.shape != x.shape:
            raise Unsupported(f"its output has shape {node.output.shape}; its input {x.shape}")
        bounds = parsing.clamp(node, *((0.0, np.inf) if node.type == "Relu" else _bounds(node)))
        same = x.scale == node.output.scale and x.zero_point == node.output.zero_point
        entries = None if same else integer.rescale_table(x, node.output, bounds["low"], bounds["high"])
        return Node("clamp", node.name, (x,), node.output, bounds, {} if entries is None else {"table": entries})

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        bounds = node.attributes["low"], node.attributes["high"]
        return np.clip(integer.look_up(inputs[0], node.constants.get("table")), *bounds).astype(np.int8)

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        if node.constants:
            return lookup.call(node)
        return Call(
            kernel="clamp_codes",
            sources=("clamp_codes.c",),
            fields={"size": node.output.size, "low": node.attributes["low"], "high": node.attributes["high"]},
            arrays={},
            overlap=0,
            in_place=(0,),
        )


def _bounds(node: FloatOp) -> tuple[float, float]:
    found = [-np.inf, np.inf]
    for i, name in enumerate(("min", "max")):
        value = parsing.constant(node, i + 1)
        if value is None:
            value = node.attributes.get(name)
        if value is not None:
            found[i] = float(np.asarray(value).item())
    return found[0], found[1]
