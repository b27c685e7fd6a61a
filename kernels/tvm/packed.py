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

MOST_ROWS, MOST_VECTORS = 8, 4
"""of a register tile: more rows and vectors than these bring no more products per load that count"""
AVX512_LANES, AVX512_PERMUTE = 16, "llvm.x86.avx512.permvar.sf.512"
"""a register that holds a whole table of 16 values, and the instruction that looks 16 codes up in it"""
MOST_UNROLLED = 512
"""multiply-adds in the unrolled loop body"""


class Reader:
    """Reads the codes of one output in one group, as expressions inside a kernel."""

    def __init__(self, tirx: Any, words: Any, tables: Any, bits: int, place: tuple[Any, Any, Any]) -> None:
        """`words` as in the module's text, `tables` (n, width) or None, `place` (tile, group, lane)."""
        self.tirx, self.bits = tirx, bits
        self._words, self._tables, self._place = words, tables, place

    def code(self, k: Any) -> Any:
        """Code k of the group, uint32."""
        return self._shifted(k) & self.tirx.const((1 << self.bits) - 1, "uint32")

    def signed(self, k: Any) -> Any:
        """Code k of the group as a number in two's complement, int32."""
        above = self.tirx.const(32 - self.bits, "uint32")
        return (self._shifted(k) << above).astype("int32") >> (32 - self.bits)

    def look_up(self, index: int, code: Any) -> Any:
        """Entry `code` (below 16) of table `index`: a permutation of a register that holds the table, else a tree of choices."""
        tirx, tables = self.tirx, self._tables
        assert tables is not None
        if tables.lanes == AVX512_LANES:
            table = tables.operand[index, tirx.floormod(self._place[2], AVX512_LANES)]
            return tirx.call_llvm_pure_intrin("float32", AVX512_PERMUTE, table, code.astype("int32"))
        entries: list[Any] = [tirx.const(float(v), "float32") for v in tables.values[index]]
        for bit in range(4):
            chosen = (code & tirx.const(1 << bit, "uint32")) != 0
            entries = [
                low if low is high else tirx.Select(chosen, high, low)
                for low, high in zip(entries[0::2], entries[1::2], strict=True)
            ]
        return entries[0]

    def _shifted(self, k: Any) -> Any:
        """Code k at the low end of a word, other codes above it."""
        tile, group, lane = self._place
        word, shift = k * self.bits // 32, k * self.bits % 32
        code = self._words[tile, group, word, lane] >> shift.astype("uint32")
        if 32 % self.bits == 0:
            return code
        # it may go on in the next word; k is a number once the loop is unrolled
        last = int(self._words.shape[2]) - 1
        following = self._words[tile, group, self.tirx.min(word + 1, last), lane]
        following = following << (32 - self.tirx.max(shift, 1)).astype("uint32")
        return self.tirx.Select(shift + self.bits > 32, code | following, code)


@dataclass(frozen=True)
class Tables:
    """Tables of 16 values that a kernel looks codes up in."""

    operand: Any
    """te placeholder (n, width): each table repeated along the width"""
    values: np.ndarray
    """(n, 16) float32"""
    lanes: int


Decode = Callable[[Reader, Any], Any]
"""decode(reader, k): weight k of the group as float32"""


def signed(reader: Reader, k: Any) -> Any:
    """The code itself, in two's complement."""
    return reader.signed(k).astype("float32")


def unsigned(reader: Reader, k: Any) -> Any:
    """The code itself."""
    return reader.code(k).astype("int32").astype("float32")


def table(reader: Reader, k: Any) -> Any:
    """The code's entry in the first table."""
    return reader.look_up(0, reader.code(k))


def half_float(reader: Reader, k: Any) -> Any:
    """The code's bits as a float16."""
    return reader.tirx.reinterpret("float16", reader.code(k).astype("uint16")).astype("float32")


def single_float(reader: Reader, k: Any) -> Any:
    """The code's bits as a float32."""
    return reader.tirx.reinterpret("float32", reader.code(k))


def plain(scale: Any) -> Any:
    """A stored scale as the number that it is."""
    return scale.astype("float32")


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) as codes, for `linear`."""

    codes: np.ndarray
    """(out, in) unsigned integers below 2^bits"""
    bits: int
    group: int
    """columns that share a scale; divides in"""
    scale: np.ndarray
    """(out, in // group)"""
    decode: Decode
    zero: np.ndarray | None = None
    """what is subtracted from every value: (out, in // group), uint8 or float32"""
    tables: np.ndarray | None = None
    """(n, 16) float32 for `Reader.look_up`"""
    widen: Callable[[Any], Any] = plain
    """the float32 scale of a stored one"""


def symmetric(codes: np.ndarray, bits: int, group: int, scale: np.ndarray) -> Packed:
    """Codes (out, in) with zero at 2^(bits - 1): stored in two's complement, so that nothing is subtracted."""
    return Packed(codes ^ np.uint8(1 << (bits - 1)), bits, group, scale, signed)


def half(weight: np.ndarray) -> Packed:
    """A weight (out, in) in float16."""
    ones = np.ones((len(weight), 1), np.float32)
    return Packed(weight.astype(np.float16).view(np.uint16), 16, weight.shape[1], ones, half_float)


def single(weight: np.ndarray) -> Packed:
    """A weight (out, in) in float32."""
    ones = np.ones((len(weight), 1), np.float32)
    codes = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return Packed(codes, 32, weight.shape[1], ones, single_float)


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
    if weight.zero is not None:
        operands.append(use.constant(_tiled(weight.zero, width)))
    if weight.tables is not None:
        operands.append(use.constant(np.tile(weight.tables, (1, -(-width // 16)))[:, :width].astype(np.float32)))
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
    operands, zero, tables = [x, words, scale], None, None
    if weight.zero is not None:
        zero = te.placeholder((tiles, groups, width), str(weight.zero.dtype), name="zero")
        operands.append(zero)
    if weight.tables is not None:
        tables = Tables(te.placeholder((len(weight.tables), width), "float32", "tables"), weight.tables, use.unit.lanes)
        operands.append(tables.operand)
    lined = x
    if length != group:  # zeros meet the unused codes
        lined = te.compute(
            (rows, groups, length),
            lambda i, g, c: tirx.if_then_else(c < group, x[i, g, tirx.min(c, group - 1)], 0.0),
            name="lined",
        )
    k, g, c = te.reduce_axis((0, length), "k"), te.reduce_axis((0, groups), "g"), te.reduce_axis((0, group), "c")

    def product(i: Any, o: Any, g: Any, lane: Any) -> Any:
        return weight.decode(Reader(tirx, words, tables, bits, (o, g, lane)), k) * lined[i, g, k]

    part = te.compute((rows, tiles, groups, width), lambda *at: te.sum(product(*at), axis=k), name="part")
    total = None
    if zero is not None:
        total = te.compute((rows, groups), lambda i, g: te.sum(x[i, g, c], axis=c), name="total")

    def centred(i: Any, o: Any, g: Any, lane: Any) -> Any:
        if zero is None or total is None:
            return part[i, o, g, lane]
        return part[i, o, g, lane] - zero[o, g, lane].astype("float32") * total[i, g]

    y = te.compute(
        (rows, tiles, width),
        lambda i, o, lane: te.sum(weight.widen(scale[o, g, lane]) * centred(i, o, g, lane), axis=g),
        name="y",
    )
    return _schedule(use, te.create_prim_func([*operands, y]), tile, chunk(bits))


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
