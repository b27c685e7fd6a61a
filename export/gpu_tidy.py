"""What tracing leaves in a graph and no GPU needs: type checks, casts to the same type, slices of everything, dropout."""

from __future__ import annotations

import sys

from torch.fx import Node

from ..compress import layers
from ..compress.model import Model
from .gpu_precision import CASTS, Types, described

CHECKS = ("aten._assert_tensor_metadata", "aten._assert_scalar")
SAME = ("aten.alias", "aten.detach", "aten.detach_", "aten.dropout", "aten.lift_fresh_copy")
"""in inference they give what they read"""


def tidy(model: Model) -> None:
    """Remove them, in place."""
    graph, types = model.graph.graph, described(model)
    for node in list(graph.nodes):
        kind = layers.op(node)
        source = node.args[0] if node.args else None
        if kind in CHECKS:
            graph.erase_node(node)
        elif isinstance(source, Node) and (kind in SAME or _keeps(node, kind, source, types)):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    layers.drop_unused(model.graph)


def _keeps(node: Node, kind: str, source: Node, types: Types) -> bool:
    """Whether a cast or a slice changes nothing."""
    if kind in CASTS:
        return types[node][0] == types[source][0]
    if kind == "aten.slice":
        start, end, step = (layers.argument(node, n) for n in ("start", "end", "step"))
        return start in (None, 0) and end in (None, sys.maxsize) and step == 1
    return False
