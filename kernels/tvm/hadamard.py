"""`hadamard` in TVM: one small matrix product for each Kronecker factor, which the schedules of export/ tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..hadamard import hadamard_matrix, largest_block
from .lowering import Lowering, Use

SPLITS = (64, 32, 16, 8, 4, 2)
"""orders of Sylvester's matrix that are split off, as long as the rest is an order with a matrix"""


class Hadamard(Lowering):
    """Equal to the reference within float32 rounding."""

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y, of the shape of x."""
        relax, x, signs = use.ir.relax, use.tensors["x"], use.tensors.get("signs")
        block, transposed = int(use.attributes["block"]), bool(use.attributes["transposed"])
        shape = use.shape(x)
        value = use.emit(relax.op.multiply(x, signs)) if signs is not None and not transposed else x
        behind = block
        for order in factors(block):
            behind //= order
            matrix = hadamard_matrix(order).float().numpy()
            matrix = matrix.T if transposed else matrix  # rows are multiplied from the left: v H
            count = math.prod(shape) // order // behind
            if behind == 1:
                value = use.emit(relax.op.matmul(use.reshape(value, (count, order)), _constant(use, matrix)))
            else:
                value = use.reshape(value, (count, order, behind))
                value = use.emit(relax.op.matmul(_constant(use, matrix.T), value))
        value = use.reshape(value, shape)
        return [use.emit(relax.op.multiply(value, signs)) if signs is not None and transposed else value]


def factors(block: int) -> list[int]:
    """Orders whose matrices' Kronecker product is that of order `block`, first to last."""
    found, rest = [], block
    while step := next((s for s in SPLITS if rest % s == 0 and largest_block(rest // s) == rest // s), 0):
        found.append(step)
        rest //= step
    return [*found, rest] if rest > 1 or not found else found


def _constant(use: Use, values: np.ndarray) -> Any:
    return use.ir.relax.const(np.ascontiguousarray(values, np.float32))
