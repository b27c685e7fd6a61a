"""Arithmetic behind a profile on a GPU: what a program must move and compute, and how near to the card's ceilings it comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..compress import layers
from ..compress.model import Model
from ..export.gpu_precision import Types, described


@dataclass(frozen=True)
class Work:
    """What one inference needs at least."""

    weight_bytes: int
    """constants, each read once; of a table that is only looked up, the rows"""
    activation_bytes: int
    """inputs and outputs"""
    operations: int
    """multiplications and additions of products"""

    @property
    def bytes(self) -> int:
        """What passes through memory."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best, measured in the same run."""

    copy: float
    """bytes read and written a second by a large copy"""
    product: float
    """operations a second of a large 16-bit matrix product"""
    integer: float | None
    """the same with int8, where torch has one"""


def work(model: Model, example: Sequence[torch.Tensor]) -> Work:
    """What a program does with inputs of the example's shapes, from the shapes alone."""
    types = described(model, example=example)
    constants = [n for n in model.graph.graph.nodes if n.op == "get_attr"]
    tables = {
        n for n in constants if all(layers.op(u) in ("aten.embedding", "planish.embedding_wna16") for u in n.users)
    }
    weights = {str(n.target): layers.read(model.graph, n) for n in constants if n not in tables}
    rows = sum(math.prod(types[n][1]) * types[n][0].itemsize for t in tables for n in t.users)
    output = next(n for n in model.graph.graph.nodes if n.op == "output")
    ends = [*(n for n in model.graph.graph.nodes if n.op == "placeholder"), *output.all_input_nodes]
    moved = sum(math.prod(types[n][1]) * types[n][0].itemsize for n in ends if n in types)
    counted = sum(_operations(n, types) for n in model.graph.graph.nodes)
    return Work(sum(t.numel() * t.element_size() for t in weights.values()) + rows, moved, counted)


def _operations(node: Node, types: Types) -> int:
    """Two for each multiplication of a product; 0 for other ops."""
    kind = layers.op(node)
    shapes = [types[a][1] for a in node.all_input_nodes if a in types]
    if node not in types or not shapes or not node.args or not isinstance(node.args[0], Node):
        return 0
    made, first = math.prod(types[node][1]), shapes[0]
    if kind in ("aten.linear", "aten.matmul", "aten.mm", "aten.bmm") or (
        kind.startswith("planish.") and "linear" in kind
    ):
        return 2 * made * first[-1]
    if kind == "aten.scaled_dot_product_attention":
        return 4 * math.prod(first) * types[node.args[1]][1][-2]  # pyright: ignore[reportArgumentType]
    if kind.startswith("aten.conv") and len(shapes) > 1:
        return 2 * made * math.prod(shapes[1][1:])
    return 0


def achieved(needed: Work, milliseconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Bytes and operations a second, and what share of the ceilings they are."""
    seconds = milliseconds * 1e-3
    moved, done = needed.bytes / seconds, needed.operations / seconds
    found: dict[str, Any] = {
        "bytes_per_second": moved,
        "share_of_copy": moved / ceilings.copy,
        "operations_per_second": done,
        "share_of_16_bit_product": done / ceilings.product,
    }
    if ceilings.integer:
        found["share_of_int8_product"] = done / ceilings.integer
    return found


def grouped(rows: Sequence[tuple[str, int, float]], most: int = 40) -> list[tuple[str, int, float]]:
    """The slowest `most` kernels, and the rest as one row: (name, calls, microseconds)."""
    kept, rest = list(rows[:most]), rows[most:]
    if rest:
        kept.append((f"{len(rest)} others", sum(r[1] for r in rest), sum(r[2] for r in rest)))
    return kept
