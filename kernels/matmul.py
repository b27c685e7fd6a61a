"""Matrix product of two activations, for each of several batches (the heads of attention):

    accumulator = sum over k of (a[row, k] - a_zp) * (b[k, column] - b_zp)
    y           = requantize(accumulator, float32(a_scale * b_scale / y_scale))

Equal to ONNX Runtime's QLinearMatMul bit for bit. The operands are read, and the result is written, in steps of memory of their own
(`View`), so that the reshapes and transposes around attention cost nothing: export/views.py folds them into the steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from . import integer, layout
from .op import Array, Call, FloatOp, Node, Op, Tensor, Unsupported
from .parsing import clamp

DEEPEST = 1 << 15
"""products of codes whose sum fits 32 bits"""
COLUMNS = 4
"""of b that the C kernel holds at a time, as 16-bit numbers"""


@dataclass(frozen=True)
class View:
    """Where the elements of (batches, rows, columns) lie in the memory of a tensor."""

    offset: int
    batch: int
    """steps between neighbours"""
    row: int
    column: int

    def places(self, batches: int, rows: int, columns: int) -> Array:
        """(batches, rows, columns) positions in memory."""
        steps = ((batches, self.batch), (rows, self.row), (columns, self.column))
        b, r, c = (np.arange(n) * step for n, step in steps)
        return self.offset + b[:, None, None] + r[:, None] + c


class Matmul(Op):
    """MatMul of two activations."""

    onnx_types = ("MatMul",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. Operands (1, [batches,] rows, depth) and (1, [batches,] depth, columns); a missing or single batch serves all."""
        if len(node.inputs) != 2 or not all(isinstance(i, Tensor) for i in node.inputs):
            return None
        a, b = (i for i in node.inputs if isinstance(i, Tensor))
        y = node.output
        rows, depth = a.shape[-2:]
        columns = b.shape[-1]
        batches = y.size // (rows * columns)
        if depth >= DEEPEST:
            raise Unsupported(f"it sums {depth} products; fewer than {DEEPEST} are supported")
        return Node(
            op="matmul",
            name=node.name,
            inputs=(a, b),
            output=y,
            attributes={
                "batches": batches,
                "rows": rows,
                "columns": columns,
                "depth": depth,
                "zero_points": (a.zero_point, b.zero_point, y.zero_point),
                "rescale": np.float32(integer.rescale(a.scale, b.scale, y.scale)),
                "a": view(places(a.shape), batches, "its first operand"),
                "b": view(places(b.shape), batches, "its second operand"),
                "y": view(places(y.shape), batches, "its output"),
                **clamp(node),
            },
        )

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        t = node.attributes
        a, b = (
            layout.to_memory(x)[:, p].astype(np.float64) - zero_point
            for x, p, zero_point in zip(inputs, operands(node), t["zero_points"][:2], strict=True)
        )  # (n, batches, rows, depth), (n, batches, depth, columns)
        total = (a @ b).astype(np.int64)  # exact: the sums fit 32 bits
        codes = integer.requantize(total, t["rescale"], t["zero_points"][2], t["low"], t["high"])
        y = np.empty((len(codes), node.output.size), np.int8)
        y[:, t["y"].places(t["batches"], t["rows"], t["columns"])] = codes
        return layout.from_memory(y, node.output.shape)

    def macs(self, node: Node) -> int:
        """See Op."""
        return node.output.size * node.attributes["depth"]

    def call(self, node: Node) -> Call:
        """See Op."""
        return Call(
            kernel="matmul",
            sources=("matmul.c",),
            fields=fields(node),
            arrays={},
            scratch=2 * COLUMNS * node.attributes["depth"],
        )


def fields(node: Node) -> dict[str, int | float | str]:
    """Members of the C layer struct."""
    t = node.attributes
    a_zp, b_zp, y_zp = t["zero_points"]
    steps = {f"{name}_{k}": v for name in ("a", "b", "y") for k, v in asdict(t[name]).items()}
    return {
        **{k: t[k] for k in ("batches", "rows", "columns", "depth")},
        **steps,
        "a_zero_point": a_zp,
        "b_zero_point": b_zp,
        "y_zero_point": y_zp,
        "low": t["low"],
        "high": t["high"],
        "rescale": float(t["rescale"]),
    }


def operands(node: Node) -> tuple[Array, Array]:
    """Positions in memory of both operands: (batches, rows, depth) and (batches, depth, columns)."""
    t = node.attributes
    n = t["batches"]
    return t["a"].places(n, t["rows"], t["depth"]), t["b"].places(n, t["depth"], t["columns"])


def places(shape: tuple[int, ...]) -> Array:
    """Position in memory of every element of a tensor, in its ONNX shape."""
    return layout.from_memory(np.arange(int(np.prod(shape)))[None], shape)


def view(places: Array, batches: int, what: str) -> View:
    """The view of positions (1, ..., rows, columns) in memory. Raises Unsupported where they are not evenly spaced."""
    found = places.reshape(-1, *places.shape[-2:])  # (batches, rows, columns)
    if len(found) not in (1, batches):
        raise Unsupported(f"{what} has {len(found)} batches; 1 or {batches} are supported")
    first = int(found[0, 0, 0])
    steps = [int(found[i]) - first if n > 1 else 0 for i, n in zip(_NEIGHBOURS, found.shape, strict=True)]
    made = View(first, *steps)
    if not np.array_equal(made.places(*found.shape), found):
        raise Unsupported(f"{what} is not evenly spaced in memory")
    return made


_NEIGHBOURS = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
