"""Rotary embedding in the graph: x cos + rotate_half(x) sin, as Llama and its kin write it; perhaps of the first features alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..compress import layers
from .gpu_precision import CASTS


@dataclass(frozen=True)
class Rotary:
    """The parts of one rotary embedding."""

    x: Node
    """(batch, heads, tokens, size), not rotated yet"""
    cos: Node
    sin: Node
    """(tokens, rotary) or (1, tokens, rotary), contiguous; rotary <= size"""


def find(node: Node) -> Rotary | None:
    """The rotary embedding that gives `node`, None where it is something else."""
    if layers.op(node) == "aten.cat" and layers.argument(node, "dim") in (-1, 3):
        parts = layers.argument(node, "tensors")
        turned = find(parts[0]) if len(parts) == 2 else None
        if turned is None or layers.op(turned.x) != "aten.slice" or layers.op(parts[1]) != "aten.slice":
            return None
        x, width = turned.x.args[0], layers.argument(turned.x, "end")
        first, rest = _bounds(turned.x), _bounds(parts[1])
        fits = first == (0, width) and rest is not None and rest[0] == width and parts[1].args[0] is x
        return Rotary(x, turned.cos, turned.sin) if fits and isinstance(x, Node) else None
    if layers.op(node) != "aten.add" or layers.argument(node, "alpha") != 1:
        return None
    plain, turned = node.args[:2]
    if not (
        isinstance(plain, Node) and isinstance(turned, Node) and layers.op(plain) == layers.op(turned) == "aten.mul"
    ):
        return None
    x, half = plain.args[0], turned.args[0]
    cos, sin = (_table(n.args[1]) for n in (plain, turned))
    if not isinstance(x, Node) or cos is None or sin is None or _half_of(half) is not x:
        return None
    return Rotary(x, cos, sin)


def _half_of(node: object) -> Node | None:
    """The x where a node is rotate_half(x) = cat(-second half, first half)."""
    if not isinstance(node, Node) or layers.op(node) != "aten.cat" or layers.argument(node, "dim") not in (-1, 3):
        return None
    parts = layers.argument(node, "tensors")
    if len(parts) != 2 or layers.op(parts[0]) != "aten.neg":
        return None
    second, first = parts[0].args[0], parts[1]
    if not isinstance(second, Node) or layers.op(second) != "aten.slice" or layers.op(first) != "aten.slice":
        return None
    x, size = second.args[0], node.meta["val"].shape[-1]
    left, right = _bounds(first), _bounds(second)
    fits = left == (0, size // 2) and right is not None and right[0] == size // 2 and right[1] >= size
    return x if fits and first.args[0] is x and isinstance(x, Node) else None


def _bounds(node: Node) -> tuple[int, int] | None:
    """(start, end) of a slice of the last of four dimensions."""
    dim, start, end, step = (layers.argument(node, n) for n in ("dim", "start", "end", "step"))
    if dim not in (-1, 3) or step != 1 or not isinstance(end, int) or not isinstance(start, int | None):
        return None
    return start or 0, end


def _table(node: object) -> Node | None:
    """The table (1, tokens, rotary) that is used as (1, 1, tokens, rotary), before it was cast."""
    while isinstance(node, Node) and layers.op(node) in CASTS:
        node = node.args[0]
    if not isinstance(node, Node) or layers.op(node) != "aten.unsqueeze" or node.args[1] not in (1, -3):
        return None
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, Node) else None
    plain = isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[0] == 1 and value.is_contiguous()
    return source if plain and isinstance(source, Node) else None
