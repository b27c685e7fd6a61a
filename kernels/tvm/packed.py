"""The kernel behind the packed linear ops: y = x W^T with the codes of W decoded in registers, tile by tile.

    y[m, o] = sum over groups g of scale[o, g] * (sum over k of value(code[o, g, k]) * x[m, g, k]  -  zero[o, g] * sum over k of x[m, g, k])

The codes of `tile` neighbouring outputs stand side by side in 32-bit words (tiles, groups, words, tile), word w of an output holding
the codes w * 32 / bits and following as a little-endian stream of bits (three words for 32 codes of 3 bits). One vector load so
brings 32 / bits steps of the sum for as many outputs as a register has lanes; a shift, a mask and a conversion decode one step,
which is then used for all rows of the register tile. A batch-1 product is bound by reading the weights: they stay as small as stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .lowering import Use, VectorUnit

Decode = Callable[[Callable[[Any], Any], Any], Any]
"""value(code, k): float32 of weight k of a group, where code(k) is the uint32 code of weight k"""
MOST_ROWS, MOST_VECTORS = 8, 4
"""of a register tile: more rows and vectors than these bring no more products per load that count"""
MOST_UNROLLED = 512
"""multiply-adds in the unrolled loop body"""


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) as codes, for `linear`."""

    codes: np.ndarray
    """(out, in) uint8"""
    bits: int
    group: int
    """columns that share a scale; divides in"""
    scale: np.ndarray
    """(out, in // group), float32 or another type that a cast widens"""
    zero: np.ndarray | float = 0.0
    """what is subtracted from every value: (out, in // group), uint8 or float32, or one number"""
    decode: Decode | None = None
    """the value of a code; None: the code itself as a number"""


@dataclass(frozen=True)
class Tile:
    """A register tile: `rows` of x by `vectors` registers of outputs."""

    rows: int
    vectors: int


def linear(use: Use, x: Any, weight: Packed) -> Any:
    """The product x W^T (..., out) for a Relax expression x (..., in)."""
    out, channels = weight.codes.shape
    *front, _ = use.shape(x)
    rows = math.prod(front)
    groups = channels // weight.group
    tile = choose(rows, out, weight.bits, use.unit)
    width = tile.vectors * use.unit.lanes
    tiles = -(-out // width)
    operands = [use.reshape(x, (rows, groups, weight.group))]
    operands += [use.constant(a) for a in (_words(weight, width), _tiled(weight.scale, width))]
    shifts = isinstance(weight.zero, np.ndarray)
    if shifts:
        operands.append(use.constant(_tiled(np.asarray(weight.zero), width)))
    function = _kernel(use, weight, tile, (rows, groups, tiles))
    (y,) = use.call(function, operands, [(rows, tiles, width)], rows * out * channels)
    y = use.reshape(y, (rows, tiles * width))
    if tiles * width != out:
        y = use.emit(use.ir.relax.op.strided_slice(y, axes=[1], begin=[0], end=[out]))
    return use.reshape(y, (*front, out))


def add_bias(use: Use, y: Any) -> Any:
    """The sum y + bias (..., out) where the op has a bias; TVM fuses it with what follows."""
    return use.emit(use.ir.relax.op.add(y, use.tensors["bias"])) if "bias" in use.tensors else y


def choose(rows: int, out: int, bits: int, unit: VectorUnit) -> Tile:
    """The tile with most products per load, rows * vectors / (rows + vectors), less what padded outputs waste.

    Its rows divide those of x; its accumulators fit the registers.
    """
    fitting = [
        Tile(r, v)
        for r in range(1, MOST_ROWS + 1)
        for v in range(1, MOST_VECTORS + 1)
        if rows % r == 0 and r * v <= min(unit.accumulators, MOST_UNROLLED // chunk(bits))
    ]

    def quality(tile: Tile) -> tuple[float, int]:
        width = tile.vectors * unit.lanes
        used = out / (-(-out // width) * width)
        return used * tile.rows * tile.vectors / (tile.rows + tile.vectors), tile.vectors

    return max(fitting, key=quality)


def chunk(bits: int) -> int:
    """Codes after which the stream of bits is at the start of a word again."""
    return 32 // math.gcd(32, bits)


def _words(weight: Packed, width: int) -> np.ndarray:
    """(tiles, groups, words, width) uint32; outputs and codes beyond the end are 0."""
    out, channels = weight.codes.shape
    groups, step = channels // weight.group, chunk(weight.bits)
    words = -(-weight.group // step) * step * weight.bits // 32
    stream = np.zeros((-(-out // width) * width, groups, words), np.uint64)
    codes = weight.codes.reshape(out, groups, weight.group).astype(np.uint64)
    for k in range(weight.group):
        word, shift = divmod(k * weight.bits, 32)
        stream[:out, :, word] |= codes[..., k] << np.uint64(shift)
        if shift + weight.bits > 32:
            stream[:out, :, word + 1] |= codes[..., k] >> np.uint64(32 - shift)
    tiled = stream.astype(np.uint32).reshape(-1, width, groups, words)
    return np.ascontiguousarray(tiled.transpose(0, 2, 3, 1))


def _tiled(values: np.ndarray, width: int) -> np.ndarray:
    """(tiles, groups, width) of (out, groups); 0 beyond the end."""
    out, groups = values.shape
    padded = np.zeros((-(-out // width) * width, groups), values.dtype)
    padded[:out] = values
    return np.ascontiguousarray(padded.reshape(-1, width, groups).transpose(0, 2, 1))


def _kernel(use: Use, weight: Packed, tile: Tile, extents: tuple[int, int, int]) -> Any:
    """A kernel of x (rows, groups, group), words, scale and perhaps zero to y (rows, tiles, width), with its loop order."""
    te, tirx = use.ir.te, use.ir.tirx
    rows, groups, tiles = extents
    width, bits, group = tile.vectors * use.unit.lanes, weight.bits, weight.group
    length = -(-group // chunk(bits)) * chunk(bits)  # of a group with the unused codes at its end
    x = te.placeholder((rows, groups, group), "float32", name="x")
    words = te.placeholder((tiles, groups, length * bits // 32, width), "uint32", name="words")
    scale = te.placeholder((tiles, groups, width), str(weight.scale.dtype), name="scale")
    operands = [x, words, scale]
    decode = weight.decode or (lambda code, k: code(k).astype("int32").astype("float32"))
    lined = x
    if length != group:  # zeros meet the unused codes
        lined = te.compute(
            (rows, groups, length),
            lambda i, g, c: tirx.if_then_else(c < group, x[i, g, tirx.min(c, group - 1)], 0.0),
            name="lined",
        )
    k, g, c = te.reduce_axis((0, length), "k"), te.reduce_axis((0, groups), "g"), te.reduce_axis((0, group), "c")

    def product(i: Any, o: Any, g: Any, lane: Any) -> Any:
        return decode(lambda k: _code(tirx, words, bits, (o, g, lane), k), k) * lined[i, g, k]

    part = te.compute((rows, tiles, groups, width), lambda *at: te.sum(product(*at), axis=k), name="part")
    total, zero = None, weight.zero
    if isinstance(zero, np.ndarray) or zero:
        total = te.compute((rows, groups), lambda i, g: te.sum(x[i, g, c], axis=c), name="total")
    if isinstance(zero, np.ndarray):
        operands.append(te.placeholder((tiles, groups, width), str(zero.dtype), name="zero"))

    def centred(i: Any, o: Any, g: Any, lane: Any) -> Any:
        if total is None:
            return part[i, o, g, lane]
        point = (
            operands[-1][o, g, lane].astype("float32") if isinstance(zero, np.ndarray) else tirx.const(zero, "float32")
        )
        return part[i, o, g, lane] - point * total[i, g]

    y = te.compute(
        (rows, tiles, width),
        lambda i, o, lane: te.sum(scale[o, g, lane].astype("float32") * centred(i, o, g, lane), axis=g),
        name="y",
    )
    return _schedule(use, te.create_prim_func([*operands, y]), tile, chunk(bits))


def _code(tirx: Any, words: Any, bits: int, place: tuple[Any, Any, Any], k: Any) -> Any:
    """Code k of output (o, lane) in group g, uint32: `place` is (o, g, lane)."""
    o, g, lane = place
    word, shift = k * bits // 32, k * bits % 32
    code = words[o, g, word, lane] >> shift.astype("uint32")
    if 32 % bits:  # it may go on in the next word; k is a number once the loop is unrolled
        last = int(words.shape[2]) - 1
        following = words[o, g, tirx.min(word + 1, last), lane] << (32 - tirx.max(shift, 1)).astype("uint32")
        code = tirx.Select(shift + bits > 32, code | following, code)
    return code & tirx.const((1 << bits) - 1, "uint32")


def _schedule(use: Use, function: Any, tile: Tile, step: int) -> Any:
    """Loop order: tile of outputs, rows / tile.rows, group | sum in steps of `step` codes, unrolled | rows, vectors, lanes."""
    sch = use.ir.Schedule(function)
    y, part = sch.get_sblock("y"), sch.get_sblock("part")
    row, o, lane, g = sch.get_loops(y)
    row, inner_row = sch.split(row, [None, tile.rows])
    vector, lane = sch.split(lane, [tile.vectors, None])
    sch.reorder(o, row, g, inner_row, vector, lane)
    for loop in (inner_row, vector):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.compute_at(part, g, preserve_unit_loops=True)
    *spatial, lane, k = sch.get_loops(part)[3:]
    vector, lane = sch.split(lane, [tile.vectors, None])
    k, unrolled = sch.split(k, [None, step])
    sch.reorder(k, unrolled, *spatial, vector, lane)
    for loop in (unrolled, *spatial, vector):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.decompose_reduction(part, k)
    sch.decompose_reduction(y, g)
    return sch.mod["main"]
