"""The loop order of every kernel that TVM compiles: a register-tiled template for sums of products, vectors for the rest.

TVM's default build keeps the loops as written, one scalar at a time (measured: 118 times slower than ONNX Runtime on ResNet-20).
The template is the classic register blocking of matrix products (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008), applied to convolutions in NHWC order: a tile of rows x columns output positions by
`vectors` vectors of output channels stays in registers while the sum runs; each step loads a few weight vectors and broadcasts
one input value per position. Bias, residual add, activation and requantization are applied to the tile before it is stored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..kernels.tvm import lowering
from ..kernels.tvm.lowering import VectorUnit
from ..targets.target import Target
from . import _tvm_compat

SPATIAL, REDUCE = 0, 2
"""TVM's numbers for the kinds of loop axes"""
MOST_ROWS = 4
"""rows in a tile: more would read as many image rows at once, each from another place"""
UNROLLED_PRODUCTS = 448
"""multiply-adds in one unrolled loop body: more than this outgrows the instruction cache and only costs compile time"""


@dataclass(frozen=True)
class Tiling:
    """The template's free choices for one workload."""

    rows: int
    """output rows in the register tile; divides the second-last-but-one output axis"""
    columns: int
    """output columns in the register tile; divides the second-last output axis"""
    vectors: int
    """vectors of output channels in the register tile"""
    unroll: int
    """steps of the innermost sum that are unrolled"""
    order: Literal["channels_inside", "channels_middle", "channels_outside"] = "channels_middle"
    """where the loop over blocks of output channels stands among the loops over rows and columns"""


@dataclass(frozen=True)
class Workload:
    """One sum of products: what a tuning record is keyed by."""

    op: str
    """TVM's name of the computation, e.g. conv2d_nhwc, matmul"""
    spatial: tuple[int, ...]
    """output shape, channels last"""
    reduce: tuple[int, ...]
    """extents of the sum, e.g. kernel height, kernel width, input channels"""
    inputs: tuple[tuple[int, ...], ...]
    """shapes of the operands as the sum reads them (the image with its padding)"""
    multiplies: bool
    """whether products are summed (convolution, matmul), and not plain values (pooling)"""

    @property
    def macs(self) -> int:
        """Multiply-accumulates; 0 for a plain sum or maximum."""
        return math.prod(self.spatial) * math.prod(self.reduce) if self.multiplies else 0

    @property
    def key(self) -> str:
        """The name under which the database files it: 'conv2d_nhwc 1x8x8x64 sum 3x3x64 of 1x10x10x64, 3x3x64x64'."""
        operands = ", ".join("x".join(map(str, s)) for s in self.inputs)
        return f"{self.op} {'x'.join(map(str, self.spatial))} sum {'x'.join(map(str, self.reduce))} of {operands}"


@dataclass(frozen=True)
class Scheduled:
    """A kernel with its loop order, and what is known about it."""

    function: Any
    """tirx.PrimFunc"""
    workload: Workload | None
    """None for a kernel without a single sum"""
    tiling: Tiling | None
    """None when the template was not applied"""
    origin: Literal["record", "default", "vectorized", "kernel", "none"]
    """tuned record, the template's default tiling, plain vectorization, a kernel of kernels/tvm, or TVM's own loops as they are"""
    reason: str = ""
    """for `none`: why the template does not apply"""

    @property
    def padded_bytes(self) -> int:
        """Bytes of the zero-bordered copy of the input that the kernel makes; 0 without padding."""
        if self.workload is None:
            return 0
        image = self.workload.inputs[0]
        temporary = [tuple(int(d) for d in b.shape) for b in self.function.body.block.alloc_buffers]
        return 4 * math.prod(image) if image in temporary else 0


def vector_unit(target: Target) -> VectorUnit:
    """Vector registers of a target's core: AVX-512 32 x 16, AVX2 16 x 8, NEON 32 x 4, else SSE's 16 x 4 (float32 lanes)."""
    if "avx512" in target.features:
        return VectorUnit(16, 32)
    if "avx2" in target.features:
        return VectorUnit(8, 16)
    if "neon" in target.features or (target.triple or "").startswith(("aarch64", "arm64")):
        return VectorUnit(4, 32)
    return VectorUnit(4, 16)


def schedule(function: Any, unit: VectorUnit, records: dict[str, Tiling]) -> Scheduled:
    """The kernel with the best known loop order: the record of its workload, else the default tiling, else vectors."""
    ir = _tvm_compat.load()
    if lowering.OP in function.attrs:
        return Scheduled(function, None, None, "kernel")
    work = workload(function)
    if work is None and _sums(ir.Schedule(function)):
        return Scheduled(function, None, None, "none", "several sums, as in a softmax")
    try:
        if work is None:
            return Scheduled(_vectorize(function, unit), None, None, "vectorized")
        record = records.get(work.key)
        tiling = record or default_tiling(work, unit)
        return Scheduled(tile(function, unit, tiling), work, tiling, "record" if record else "default")
    except ir.ScheduleError as error:
        return Scheduled(function, work, None, "none", str(error).strip().splitlines()[-1])


def workload(function: Any) -> Workload | None:
    """What the kernel sums; None when it has no sum or several."""
    ir = _tvm_compat.load()
    sch = ir.Schedule(function)
    sums = _sums(sch)
    if len(sums) != 1:
        return None
    block = sch.get(sums[0])
    spatial = tuple(int(v.dom.extent) for v in block.iter_vars if v.iter_type == SPATIAL)
    reduce = tuple(int(v.dom.extent) for v in block.iter_vars if v.iter_type == REDUCE)
    reads = [r.source for r in block.reads if not r.source.same_as(block.writes[0].source)]
    if not spatial or not all(isinstance(d, ir.tirx.IntImm) for b in reads for d in b.shape):
        return None
    shapes = tuple(tuple(int(d) for d in b.shape) for b in reads)
    return Workload(block.name_hint, spatial, reduce, shapes, len(reads) == 2)


def default_tiling(work: Workload, unit: VectorUnit) -> Tiling:
    """The tile that fits the accumulators with most products per loaded value: positions * vectors / (positions + vectors).

    Positions are rows * columns; each costs one broadcast input, each vector one weight load. Ties go to fewer rows.
    """
    height, width, blocks = _extents(work, unit)
    fitting = [
        Tiling(rows, columns, vectors, 4)
        for rows in _divisors(height)
        for columns in _divisors(width)
        for vectors in _divisors(blocks)
        if rows <= MOST_ROWS and rows * columns * vectors <= unit.accumulators
    ]

    def quality(tiling: Tiling) -> tuple[float, int]:
        positions = tiling.rows * tiling.columns
        return positions * tiling.vectors / (positions + tiling.vectors), -tiling.rows

    return max(fitting, key=quality)


def tilings(work: Workload, unit: VectorUnit, limit: int, seed: int) -> Iterator[Tiling]:
    """At most `limit` tilings worth measuring, the default first, then a seeded random choice of the legal ones."""
    height, width, blocks = _extents(work, unit)
    orders = ["channels_middle", "channels_outside", "channels_inside"] if height > 1 and blocks > 1 else []
    legal = [
        Tiling(rows, columns, vectors, unroll, order)  # pyright: ignore[reportArgumentType]
        for rows in _divisors(height)
        for columns in _divisors(width)
        for vectors in _divisors(blocks)
        for unroll in (1, 2, 4, 8, 16)
        for order in orders or ["channels_middle"]
        if rows <= MOST_ROWS
        and unit.accumulators // 3 <= rows * columns * vectors <= unit.registers - 2
        and rows * columns * vectors * unroll <= UNROLLED_PRODUCTS
        and work.reduce[-1] % unroll == 0
    ]
    first = default_tiling(work, unit)
    rest = [t for t in legal if t != first]
    random.Random(seed).shuffle(rest)
    yield from [first, *rest][:limit]


def tile(function: Any, unit: VectorUnit, tiling: Tiling) -> Any:
    """The kernel in the template's loop order. Raises TVM's ScheduleError where its structure does not allow it.

    Resulting order, for an output (n, height, width, channels):
    n, height/rows, channels/(vectors*lanes), width/columns | sum | rows, columns, vectors unrolled, lanes as one vector.
    """
    ir = _tvm_compat.load()
    sch = ir.Schedule(function)
    (total,) = _sums(sch)
    last = _inline_around(sch, total)
    *outer, channels = sch.get_loops(last)
    lanes = _lanes(int(sch.get(channels).extent), unit)
    blocks, inner = sch.split(channels, [None, tiling.vectors * lanes])
    tile_loops: list[Any] = []
    for depth, size in ((-1, tiling.columns), (-2, tiling.rows)):
        if len(outer) >= -depth:
            outer[depth], part = sch.split(outer[depth], [None, size])
            tile_loops.insert(0, part)
    place = {"channels_inside": len(outer), "channels_middle": max(len(outer) - 1, 0), "channels_outside": 0}
    outer.insert(place[tiling.order], blocks)
    sch.reorder(*outer, *tile_loops, inner)
    vectors, vector = sch.split(inner, [None, lanes])
    for loop in (*tile_loops, vectors):
        sch.unroll(loop)
    sch.vectorize(vector)
    sch.compute_at(total, outer[-1], preserve_unit_loops=True)
    _order_sum(sch, total, len(outer), tiling, lanes)
    return _finish(sch)


def _order_sum(sch: Any, total: Any, outside: int, tiling: Tiling, lanes: int) -> None:
    """Sum loops outermost, the register tile innermost; the zeroing of the tile stands before the sum."""
    loops = sch.get_loops(total)[outside:]
    kinds = [v.iter_type for v in sch.get(total).iter_vars]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == SPATIAL]
    reduce = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCE]
    steps = int(sch.get(reduce[-1]).extent)
    unroll = _largest_divisor(steps, tiling.unroll)
    outer_step, inner_step = sch.split(reduce[-1], [None, unroll])
    reduce[-1:] = [outer_step, inner_step]
    vectors, vector = sch.split(spatial[-1], [None, lanes])
    tile_loops = [*spatial[:-1], vectors]
    sch.reorder(*reduce, *tile_loops, vector)
    for loop in (inner_step, *tile_loops):
        sch.unroll(loop)
    sch.vectorize(vector)
    sch.decompose_reduction(total, reduce[0])


def _inline_around(sch: Any, total: Any) -> Any:
    """Fold what follows the sum into one last block, materialize padding before it with vectors, and return the last block."""
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    index = [sch.get(b).name_hint for b in blocks].index(sch.get(total).name_hint)
    for block in blocks[:index]:
        if _is_padding(sch, block):
            _vectorize_last(sch, block, 16)
        else:
            sch.compute_inline(block)
    after = blocks[index + 1 :]
    if not after:  # a bare sum: give it a block that stores the finished tile
        sch.cache_write(total, 0, "global")
        return sch.get_consumers(total)[0]
    for block in after[:-1]:
        sch.compute_inline(block)
    return after[-1]


def _vectorize(function: Any, unit: VectorUnit) -> Any:
    """A kernel without sums: all steps in one loop nest with the last axis as vectors."""
    ir = _tvm_compat.load()
    sch = ir.Schedule(function)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    for block in blocks:
        if sch.get_consumers(block):
            sch.compute_inline(block)
        else:
            _vectorize_last(sch, block, unit.lanes)
    return _finish(sch)


def _vectorize_last(sch: Any, block: Any, lanes: int) -> None:
    loops = sch.get_loops(block)
    if not loops:
        return
    count = math.gcd(int(sch.get(loops[-1]).extent), lanes)
    if count >= 4:
        _, vector = sch.split(loops[-1], [None, count])
        sch.vectorize(vector)


def _finish(sch: Any) -> Any:
    return sch.mod["main"].with_attr("tirx.is_scheduled", True)


def _sums(sch: Any) -> list[Any]:
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    return [b for b in blocks if any(v.iter_type == REDUCE for v in sch.get(b).iter_vars)]


def _is_padding(sch: Any, block: Any) -> bool:
    """Whether a block copies with a border: computing that anew at every tap would put a branch into the sum."""
    return "if_then_else" in str(sch.get(block).body)


def _lanes(channels: int, unit: VectorUnit) -> int:
    """Vector length for an axis: the register's, half of it, or for few odd channels one vector of all (LLVM splits it)."""
    common = math.gcd(channels, unit.lanes)
    if common >= unit.lanes // 2:
        return common
    return channels if channels <= 2 * unit.lanes else common


def _extents(work: Workload, unit: VectorUnit) -> tuple[int, int, int]:
    """Output height, width, and number of channel vectors; 1 for axes that the output does not have."""
    *front, channels = work.spatial
    height = front[-2] if len(front) > 1 else 1
    return height, front[-1] if front else 1, channels // _lanes(channels, unit)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in _divisors(n) if d <= max(limit, 1))


def as_record(tiling: Tiling) -> dict[str, Any]:
    """A tiling as the database's JSON holds it."""
    return asdict(tiling)
