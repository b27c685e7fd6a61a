"""y = x W^T for weights of 8, 4 or 2 bits in groups, x in 16 bits: kernels/gpu/linear_wna16.py. Three forms.

The product is turned: a tile (outputs, tokens) = W tile x x^T tile, with W as the tensor cores' left operand, which is taken from
registers (mma.sync and, on Hopper, wgmma). The stored order (kernels/gpu/shuffle.py) is chosen so that what a thread loads, 16 bytes, is
what it hands to the tensor core: weights go through shared memory only as stored words on their way from global memory
(asynchronous copies, STAGES deep), never as floats. Layouts are not written here: they follow from loads, joins, permutations
and reshapes, and `ttg.convert_layout` of the left operand is empty (looked at with ahead.compile_all(..., keep=folder)).

small       Up to 32 tokens, bound by memory. Each of S warps takes its own slice of the inputs (a product with a leading dimension S, which
            Triton lays across warps); the block adds the slices at the end, so that few outputs a block still fill all multiprocessors
            without a second kernel.
middle      Tiles of 16 T outputs by BLOCK_M tokens, all warps on the same inputs; the sum may be split over PARTS blocks.
dequantize  Many tokens: W in 16 bits once, then torch.matmul.

Where a group is at least a block's step along the inputs (AFTER), codes less zero points are multiplied as exact small
integers in 16 bits, and the scale is applied to the float32 sum of each group: one multiplication an output and group, not one a
weight, and nothing is rounded. Else weights are scaled, in 16 bits, before the product.

Instructions. An H100 delivers 29 weights of four bits a clock to each multiprocessor (3.35 TB/s, 132 of them, 1.75 GHz), which issues 128
thread instructions a clock, 64 of them on the integer units. What ahead.compile_all shows of the main loop of `small`, one token in
bfloat16, 4096 x 4096, thread instructions a weight; codes and x arrive by LDGSTS.128 and leave shared memory by LDS.128 and LDSM:

                      sm_90  all  integer units    sm_80  all  integer units
    w4 g128             2.7       0.9                3.3       1.4              shift, mask (two on sm_80), subtraction of a pair
    w8 g32              7.6       1.3                7.5       1.5              through float32; 14.5 weights a clock
    nf4 g64             5.5       2.6                4.4       2.6              codebook.py
    nvfp4 g16           5.6       1.9                5.6       1.9              and a product of each pair with its scale

So codes of four bits keep up with memory with a third of the issue slots to spare; NF4 and NVFP4 are bound by
instructions, at about 0.8 of memory's rate.
Integer units: LOP3, SHF, PRMT of unpacking. `middle` is wgmma with the left operand in registers on sm_90 (HGMMA m64n64k16 and m64n128k16), mma.sync
elsewhere, where two rows of warps share the tile and Triton passes 16-bit weights through shared memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ..gpu.core import Core
from . import split_k
from .ahead import Variant
from .codebook import loaded
from .config import Config, core_of, launch, on_gpu, tuned
from .dequantize import again, by_group, by_row, weights
from .epilogue import store
from .record import OPEN


@triton.jit
def _group_words(ptr, t, kt, tiles, groups, inside, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Words (A, B, P, C, 32) of scales or zero points of tiles t of outputs and kt of inputs, (A, B, 1, C, 1) together."""
    KT: tl.constexpr = 256 // BITS
    P: tl.constexpr = 1 if GROUP >= KT else KT // GROUP  # pyright: ignore[reportAssignmentType]
    p = tl.arange(0, P)[None, None, :, None, None]
    g = tl.arange(0, 32)[None, None, None, None, :] // 4
    at = kt * KT // GROUP + p  # one group of several tiles, or P groups of one
    return tl.load(ptr + (t * groups + at) * 8 + g, inside & (p >= 0) & (g >= 0), 0)


@triton.jit
def small(
    x_ptr,  # (rows, inputs)
    codes_ptr,  # (out tiles, tiles, 32, 4) int32
    scale_ptr,  # (out tiles, groups, 8) int32
    zero_ptr,  # like scale, or None
    table_ptr,  # (2, 2, 4) int32 of a codebook, else None
    row_ptr,  # (columns,) float32
    y_ptr,  # (rows, columns); (PARTS, rows, columns) float32 where the sum is split
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    columns,
    inputs,
    tiles,
    groups,
    steps,
    mask,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    FRACTION: tl.constexpr,
    GPU: tl.constexpr,
    AFTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A block: BLOCK_M tokens by 16 T outputs; a step: J tiles of inputs for each of the S warps. Grid (tokens, outputs, parts)."""
    SQUARES: tl.constexpr = 16 // BITS
    BLOCK_N: tl.constexpr = 16 * T
    BLOCK_K: tl.constexpr = J * 16 * SQUARES
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    table = None
    if table_ptr is not None:
        table = loaded(table_ptr, TYPE)
    first = tl.program_id(2) * steps
    t = tl.program_id(1) * T + tl.arange(0, T)[:, None, None, None]  # (T, 1, 1, 1)
    s = first * S + tl.arange(0, S)[None, None, :, None]
    kt = s * J + tl.arange(0, J)[None, :, None, None]  # (1, J, S, 1)
    word = tl.arange(0, 128)[None, None, None, :]
    code_at = codes_ptr + (t * tiles + kt) * 128 + word
    t3 = tl.reshape(t, (T, 1, 1))
    k3 = (first * S + tl.arange(0, S)[None, :, None]) * J  # (1, S, 1): the first tile of each slice
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[None, None, :]
    k = (first * S + tl.arange(0, S)[:, None, None]) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
    x_at = x_ptr + m.to(tl.int64) * inputs + k  # (S, BLOCK_K, BLOCK_M)
    acc = tl.zeros((S, BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        q = tl.load(code_at, (t * 16 < columns) & (kt < tiles) & (word >= 0), 0)
        x = tl.load(x_at, (m < rows) & (k < inputs), 0.0)
        t5 = tl.reshape(t, (T, 1, 1, 1, 1))
        kt5 = tl.reshape(kt, (1, J, 1, S, 1))
        inside = (t5 * 16 < columns) & (kt5 < tiles)
        zero = None
        scale = None
        if zero_ptr is not None:
            zero = by_group(_group_words(zero_ptr, t5, kt5, tiles, groups, inside, GROUP, BITS), SQUARES)
        if not AFTER:
            scale = by_group(_group_words(scale_ptr, t5, kt5, tiles, groups, inside, GROUP, BITS), SQUARES)
        w = weights(tl.reshape(q, (T, J, S, 8, 4, 4)), mask, scale, zero, table, FORMAT, FRACTION, BITS, TYPE, GPU)
        w = tl.reshape(w, (T, J, S, 8, 4, SQUARES // 2, 2, 2, 2, 2))  # T J S g c square2 f h r e
        w = tl.reshape(
            tl.permute(w, (2, 0, 8, 3, 1, 5, 7, 4, 6, 9)), (S, BLOCK_N, BLOCK_K)
        )  # S, T r g, J square2 h c f e
        # After a join, Triton gives a thread runs of four inputs of mma.sync's operand: inputs f h c e are renamed h c f e on both sides.
        x = tl.permute(tl.reshape(x, (S, BLOCK_K // 32, 2, 2, 4, 2, BLOCK_M)), (0, 1, 3, 4, 2, 5, 6))
        x = tl.reshape(x, (S, BLOCK_K, BLOCK_M))
        if AFTER:
            g = tl.arange(0, 32)[None, None, :] // 4
            there = (t3 * 16 < columns) & (k3 < tiles) & (g >= 0)
            sums = tl.dot(w, x)
            factor = by_row(
                tl.load(scale_ptr + (t3 * groups + k3 * (16 * SQUARES) // GROUP) * 8 + g, there, 0), BLOCK_M
            )
            acc += sums * tl.reshape(tl.permute(factor, (1, 0, 4, 2, 5, 3, 6)), (S, BLOCK_N, BLOCK_M))
        else:
            acc = tl.dot(w, x, acc)
        code_at += S * J * 128
        x_at += S * BLOCK_K
        kt += S * J
        k3 += S * J
        k += S * BLOCK_K
    z = tl.sum(acc, 0)  # (BLOCK_N, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    z *= tl.load(row_ptr + column, column < columns, 0.0)
    y_ptr += tl.program_id(2).to(tl.int64) * rows * columns
    store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, row, column, rows, columns, ACTIVATION)


@triton.jit
def middle(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    table_ptr,
    row_ptr,
    y_ptr,
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    columns,
    inputs,
    tiles,
    groups,
    steps,
    mask,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    FRACTION: tl.constexpr,
    GPU: tl.constexpr,
    AFTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WGMMA: tl.constexpr,
    T: tl.constexpr,
    J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Arguments of `small`. A block: BLOCK_M tokens by 16 T outputs; a step: J tiles of inputs. Grid (tokens, outputs, parts)."""
    SQUARES: tl.constexpr = 16 // BITS
    BLOCK_N: tl.constexpr = 16 * T
    BLOCK_K: tl.constexpr = J * 16 * SQUARES
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    table = None
    if table_ptr is not None:
        table = loaded(table_ptr, TYPE)
    first = tl.program_id(2) * steps
    t = tl.program_id(1) * T + tl.arange(0, T)[None, None, :, None]  # (1, 1, T, 1)
    kt = first * J + tl.arange(0, J)[None, :, None, None]  # (1, J, 1, 1)
    k3 = first * J + tl.arange(0, 1)[None, :, None]  # (1, 1, 1): the first tile of a step
    word = tl.arange(0, 128)[None, None, None, :]
    code_at = codes_ptr + (t * tiles + kt) * 128 + word
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    k = first * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    x_at = x_ptr + m.to(tl.int64) * inputs + k  # (BLOCK_K, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        q = tl.load(code_at, (t * 16 < columns) & (kt < tiles) & (word >= 0), 0)
        x = tl.load(x_at, (m < rows) & (k < inputs), 0.0)
        t5 = tl.reshape(t, (1, 1, 1, T, 1))
        kt5 = tl.reshape(kt, (1, J, 1, 1, 1))
        inside = (t5 * 16 < columns) & (kt5 < tiles)
        zero = None
        scale = None
        if zero_ptr is not None:
            zero = by_group(_group_words(zero_ptr, t5, kt5, tiles, groups, inside, GROUP, BITS), SQUARES)
        if not AFTER:
            scale = by_group(_group_words(scale_ptr, t5, kt5, tiles, groups, inside, GROUP, BITS), SQUARES)
        w = weights(tl.reshape(q, (1, J, T, 8, 4, 4)), mask, scale, zero, table, FORMAT, FRACTION, BITS, TYPE, GPU)
        if WGMMA:
            w = tl.permute(
                tl.reshape(w, (J, T, 8, 4, SQUARES, 2, 2, 2)), (1, 6, 2, 0, 4, 5, 3, 7)
            )  # T r g, J square h c e
        else:  # renamed as in `small`
            w = tl.reshape(w, (J, T, 8, 4, SQUARES // 2, 2, 2, 2, 2))  # J T g c square2 f h r e
            w = tl.permute(w, (1, 7, 2, 0, 4, 6, 3, 5, 8))
            x = tl.permute(tl.reshape(x, (BLOCK_K // 32, 2, 2, 4, 2, BLOCK_M)), (0, 2, 3, 1, 4, 5))
            x = tl.reshape(x, (BLOCK_K, BLOCK_M))
        w = tl.reshape(w, (BLOCK_N, BLOCK_K))
        if AFTER:
            g = tl.arange(0, 32)[None, None, :] // 4
            t3 = tl.reshape(t, (1, T, 1))
            there = (t3 * 16 < columns) & (k3 < tiles) & (g >= 0)
            sums = tl.dot(w, x)
            factor = by_row(
                tl.load(scale_ptr + (t3 * groups + k3 * (16 * SQUARES) // GROUP) * 8 + g, there, 0), BLOCK_M
            )
            acc += sums * tl.reshape(tl.permute(factor, (0, 1, 4, 2, 5, 3, 6)), (BLOCK_N, BLOCK_M))
        else:
            acc = tl.dot(w, x, acc)
        code_at += J * 128
        x_at += BLOCK_K
        kt += J
        k3 += J
        k += BLOCK_K
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    acc *= tl.load(row_ptr + column, column < columns, 0.0)
    y_ptr += tl.program_id(2).to(tl.int64) * rows * columns
    store(acc, y_ptr, bias_ptr, factor_ptr, residual_ptr, row, column, rows, columns, ACTIVATION)


@triton.jit
def dequantize(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    table_ptr,
    row_ptr,
    w_ptr,  # (columns, inputs)
    columns,
    inputs,
    tiles,
    groups,
    mask,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    FRACTION: tl.constexpr,
    GPU: tl.constexpr,
    T: tl.constexpr,
    J: tl.constexpr,
):
    """W, rounded once. A block: 16 T outputs by J tiles of inputs. Grid (inputs, outputs)."""
    SQUARES: tl.constexpr = 16 // BITS
    BLOCK_K: tl.constexpr = J * 16 * SQUARES
    TYPE: tl.constexpr = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float16 if tl.float32 == TYPE else TYPE  # pyright: ignore[reportAssignmentType]
    t = tl.program_id(1) * T + tl.arange(0, T)[None, None, :, None]  # (1, 1, T, 1)
    kt = tl.program_id(0) * J + tl.arange(0, J)[None, :, None, None]  # (1, J, 1, 1)
    word = tl.arange(0, 128)[None, None, None, :]
    q = tl.load(codes_ptr + (t * tiles + kt) * 128 + word, (t * 16 < columns) & (kt < tiles) & (word >= 0), 0)
    t5 = tl.reshape(t, (1, 1, 1, T, 1))
    kt5 = tl.reshape(kt, (1, J, 1, 1, 1))
    inside = (t5 * 16 < columns) & (kt5 < tiles)
    zero = None
    if zero_ptr is not None:
        zero = by_group(_group_words(zero_ptr, t5, kt5, tiles, groups, inside, GROUP, BITS), SQUARES)
    scale = by_group(_group_words(scale_ptr, t5, kt5, tiles, groups, inside, GROUP, BITS), SQUARES)
    table = None
    if table_ptr is not None:
        table = loaded(table_ptr, EXACT)
    w = weights(tl.reshape(q, (1, J, T, 8, 4, 4)), mask, None, zero, table, FORMAT, FRACTION, BITS, EXACT, GPU)
    w = w.to(tl.float32) * again(scale, 2)  # pyright: ignore[reportArgumentType]
    w = tl.permute(tl.reshape(w, (J, T, 8, 4, SQUARES, 2, 2, 2)), (1, 6, 2, 0, 4, 5, 3, 7))  # T r g, J square h c e
    w = tl.reshape(w, (16 * T, BLOCK_K))
    n = tl.program_id(1) * 16 * T + tl.arange(0, 16 * T)[:, None]
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    w *= tl.load(row_ptr + n, n < columns, 0.0)
    tl.store(w_ptr + n.to(tl.int64) * inputs + k, w.to(TYPE), (n < columns) & (k < inputs))


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    row: torch.Tensor,
    bits: int,
    group: int,
    fraction: bool,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x; the arguments as kernels/gpu/linear_wna16.py stores them."""
    n, k = len(row), x.shape[-1]
    core = core_of(x)
    m = x.numel() // k
    config = DEQUANTIZE if x.dtype == torch.float32 else choose(core, m, n, k, bits, group)
    if config.form == "dequantize" and recorded():
        config = default(core, min(m, FUSED), n, k, bits, group)
    stored = Stored(codes, scale, zero, row, bits, group, fraction)
    return product(config, core, x, stored, (bias, factor, residual), activation)


def recorded() -> bool:
    """Whether launches are noted for another runtime (record.py), which has no product of torch's."""
    return OPEN.get() is not None


@dataclass(frozen=True)
class Stored:
    """A weight as kernels/gpu/linear_wna16.py or linear_codebook.py stores it."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    row: torch.Tensor
    bits: int
    group: int
    fraction: bool = False
    format: str = ""
    """of a codebook; '' where codes are numbers"""
    table: torch.Tensor | None = None
    """of a codebook"""


def product(
    config: Config,
    core: Core,
    x: torch.Tensor,
    w: Stored,
    ends: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    activation: str,
) -> torch.Tensor:
    """The product x (..., in) W^T by a configuration, and the epilogue with bias, factor and residual."""
    n, k = len(w.row), x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    m = y.numel() // n
    if m == 0:
        return y
    tiles, groups = w.codes.shape[1], w.scale.shape[1]
    c, mask = config.constants, ((1 << w.bits) - 1) * 0x10001
    common = {"BITS": w.bits, "GROUP": w.group, "FORMAT": w.format, "FRACTION": w.fraction, "GPU": on_gpu(x)}
    x2 = x.reshape(m, k).contiguous()
    if config.form == "dequantize":
        whole = x.new_empty((n, k))
        grid = (triton.cdiv(tiles, c["J"]), triton.cdiv(n, 16 * c["T"]))
        launch(
            dequantize,
            grid,
            config,
            w.codes,
            w.scale,
            w.zero,
            w.table,
            w.row,
            whole,
            n,
            k,
            tiles,
            groups,
            mask,
            **common,
            **c,
        )
        if all(e is None for e in ends) and not activation:
            return torch.matmul(x2, whole.t(), out=y.view(m, n)).view_as(y)
        split_k.finish(torch.matmul(x2, whole.t())[None], y.view(m, n), *ends, activation)
        return y
    if k % 16 and not recorded():  # rows that begin at 32 bytes are read 16 bytes at a time
        x2 = F.pad(x2, (0, -k % 16))
    slices = c.get("S", 1)
    steps = triton.cdiv(triton.cdiv(tiles, slices * c["J"]), c["PARTS"])
    parts = triton.cdiv(tiles, slices * c["J"] * steps)
    sums = y if parts == 1 else x.new_empty((parts, m, n), dtype=torch.float32)
    own = {"S": c["S"]} if config.form == "small" else {"WGMMA": core.warp_groups}
    launch(
        small if config.form == "small" else middle,
        (triton.cdiv(m, c["BLOCK_M"]), triton.cdiv(n, 16 * c["T"]), parts),
        config,
        x2, w.codes, w.scale, w.zero, w.table, w.row, sums, *(ends if parts == 1 else (None, None, None)),
        m, n, x2.shape[1], tiles, groups, steps, mask,
        **common, **own, AFTER=_after(c["J"], w.bits, w.group, c["BLOCK_M"]), ACTIVATION=activation if parts == 1 else "",
        T=c["T"], J=c["J"], BLOCK_M=c["BLOCK_M"], STAGES=config.stages,
    )  # fmt: skip
    if parts > 1:
        split_k.finish(sums, y.view(m, n), *ends, activation)
    return y


def _after(tiles: int, bits: int, group: int, block_m: int) -> bool:
    """Whether the scale is applied to sums: where a step of J tiles lies in one group, and outputs are fewer than weights."""
    return group % (tiles * 256 // bits) == 0 and block_m <= 64


def shared_bytes(core: Core, form: str, constants: Mapping[str, int], bits: int, group: int, stages: int) -> int:
    """Bytes of shared memory that a block of `small` or `middle` takes with zero points; without them it takes less.

    As Triton 3.7 to 3.9 allocate. Triton 3.6 also passes W in 16 bits through it where wgmma or `small` could take registers;
    that is not counted, for pyproject.toml asks for 3.7.
    """
    c, s, wide = constants, constants.get("S", 1), 256 // bits
    steps = s * c["J"]
    codes, x = steps * c["T"] * 512, steps * wide * c["BLOCK_M"] * 2
    zeros = c["J"] * max(1, wide // group)  # words of eight rows, as many scales but where they follow the sum
    scales = 1 if _after(c["J"], bits, group, c["BLOCK_M"]) else zeros
    ahead = (stages - 1) * (codes + x + s * c["T"] * (zeros + scales) * 128)
    if form == "small":
        return ahead
    return ahead + (x if core.warp_groups else steps * c["T"] * 32 * wide)  # wgmma reads x there; else W passes through


def _deepest(core: Core, form: str, constants: Mapping[str, int], bits: int, group: int, most: int, budget: int) -> int:
    """The most stages, 2 to `most`, that fit a budget of shared memory; 0 where none do."""
    fit = (s for s in range(most, 1, -1) if shared_bytes(core, form, constants, bits, group, s) <= budget)
    return next(fit, 0)


DEQUANTIZE = Config("dequantize", {"T": 4, "J": 2}, 4, 1)
"""the third form"""
FUSED = 1024
"""tokens beyond which weights are dequantized first"""


def choose(core: Core, m: int, n: int, k: int, bits: int, group: int) -> Config:
    """The tuned choice, else `default`."""
    return tuned(f"linear_wna16.w{bits}.g{min(group, 256)}", core, m, n, k) or default(core, m, n, k, bits, group)


def default(core: Core, m: int, n: int, k: int, bits: int = 4, group: int = 128) -> Config:
    """Constants: T tiles of 16 outputs and BLOCK_M tokens a block, J tiles of inputs a step (for each of S warps), PARTS of the sum.

    As many outputs a block as leave a block for each multiprocessor, since every block reads all of x; then parts of the sum.
    """
    if m > FUSED:
        return DEQUANTIZE
    tiles, rows = triton.cdiv(k, 256 // bits), triton.cdiv(n, 16)
    step = max(1, min(2, group * bits // 256))  # tiles of inputs: in one group, and at most two
    if m <= 16:
        block_m = 8 if m <= 8 else 16
        t = 1
        while t < 4 and rows >= 2 * t * 0.9 * core.multiprocessors:
            t *= 2
        waves = (
            triton.cdiv(rows, t) > core.multiprocessors
        )  # then two blocks share a multiprocessor: one loads as the other ends
        j = step if tiles >= 8 * step * 4 and not waves else 1
        blocks, steps, warps = triton.cdiv(rows, t), triton.cdiv(tiles, 8 * j), 8
        constants = {"S": 8, "T": t, "J": j, "BLOCK_M": block_m}
        form, deepest, budget = "small", 6, core.shared_bytes // 2 * 19 // 20 if waves else core.shared_bytes
    else:
        block_m = max(32, min(128, triton.next_power_of_2(m)))
        t, warps = (8, 8) if m > 256 else (4, 4)
        j = max(1, (step if block_m <= 64 else 1) * (bits // 4))  # 64 or 128 inputs
        j = j if block_m > 64 or group % (j * 256 // bits) == 0 else 1
        blocks, steps = triton.cdiv(rows, t) * triton.cdiv(m, block_m), triton.cdiv(tiles, j)
        constants = {"T": t, "J": j, "BLOCK_M": block_m}
        form, deepest, budget = "middle", 4, core.shared_bytes
    parts = 1
    while (
        parts < 16
        and blocks * parts * 2 <= 1.1 * core.multiprocessors * (1 if form == "small" else 2)
        and steps >= 4 * parts
    ):
        parts *= 2
    stages = _deepest(core, form, constants, bits, group, deepest, budget) or 2
    return Config(form, {**constants, "PARTS": parts}, warps, stages)


def candidates(core: Core, m: int, n: int, k: int, bits: int = 4, group: int = 128) -> list[Config]:
    """What tuning tries: every form that can be the best for so many tokens."""
    found = [default(core, m, n, k, bits, group)]
    tiles, rows, wide = triton.cdiv(k, 256 // bits), triton.cdiv(n, 16), 256 // bits
    if m <= 32:
        block_m = max(8, triton.next_power_of_2(m))
        for s in (4, 8, 16):
            for t in (1, 2, 4):
                for j in (1, 2, 4) if bits > 2 else (1, 2):
                    blocks = triton.cdiv(rows, t)
                    constants = {"S": s, "T": t, "J": j, "BLOCK_M": block_m}
                    stages = 0
                    for most, share in ((6, 2), (3, 1)):  # two blocks a multiprocessor, else one
                        stages = stages or _deepest(
                            core, "small", constants, bits, group, most, core.shared_bytes // share
                        )
                    for parts in (1, 2) if blocks < core.multiprocessors else (1,):
                        if s * j * parts <= tiles and stages and t * j * block_m <= 64:
                            found.append(Config("small", {**constants, "PARTS": parts}, s, stages))
    if m > 8:
        for block_m in (16, 32, 64, 128, 256):
            if block_m > 2 * m or 16 * block_m < min(m, 2048):
                continue
            for t, warps in ((4, 4), (8, 4), (8, 8)):
                for inputs in (64, 128):
                    j = max(1, inputs // wide)
                    if block_m * t > 128 * warps * 2:
                        continue
                    blocks = triton.cdiv(rows, t) * triton.cdiv(m, block_m)
                    constants = {"T": t, "J": j, "BLOCK_M": block_m}
                    stages = _deepest(core, "middle", constants, bits, group, 4, core.shared_bytes)
                    for parts in (1, 2, 4, 8) if blocks < core.multiprocessors else (1,):
                        if stages and blocks * parts <= 4 * core.multiprocessors:
                            found.append(Config("middle", {**constants, "PARTS": parts}, warps, stages))
    if m > 128:
        found.append(DEQUANTIZE)
    unique = [c for i, c in enumerate(found) if c not in found[:i]]
    return unique[:: -(-len(unique) // 40)]  # at most 40, spread over all


def variants(core: Core) -> list[Variant]:
    """w4a16 g128 of 4096 x 4096 at 1 and 128 tokens, w8a16 g32 with zero points between codes, and dequantization."""
    found = []
    for m, bits, group, fraction in ((1, 4, 128, False), (128, 4, 128, False), (1, 8, 32, True)):
        config = default(core, m, 4096, 4096, bits, group)
        found.append(variant(core, config, f"w{bits}a16 g{group}, {m} tokens", bits, group, fraction))
    return [*found, variant(core, DEQUANTIZE, "w4 g128 to bfloat16", 4, 128)]


def variant(
    core: Core,
    config: Config,
    label: str,
    bits: int,
    group: int,
    fraction: bool = False,
    format: str = "",
) -> Variant:
    """A configuration for compilation ahead of time, x in bfloat16."""
    c, pointers = config.constants, {"codes_ptr": "*i32", "scale_ptr": "*i32", "row_ptr": "*fp32"}
    sizes = {"columns": "i32", "inputs": "i32", "tiles": "i32", "groups": "i32", "mask": "i32"}
    constants: dict[str, object] = {"BITS": bits, "GROUP": group, "FORMAT": format, "FRACTION": fraction, "GPU": True}
    constants |= {"T": c["T"], "J": c["J"]}
    for name, present in (("zero_ptr", fraction), ("table_ptr", format)):
        if present:
            pointers[name] = "*i32"
        else:
            constants[name] = None
    if config.form == "dequantize":
        types, matrix, loose = {**pointers, "w_ptr": "*bf16", **sizes}, False, ("groups", "mask")
    else:
        sums = "*bf16" if c["PARTS"] == 1 else "*fp32"
        types = {**pointers, "x_ptr": "*bf16", "y_ptr": sums, **sizes, "rows": "i32", "steps": "i32"}
        constants |= {"bias_ptr": None, "factor_ptr": None, "residual_ptr": None, "ACTIVATION": ""}
        constants |= {
            "BLOCK_M": c["BLOCK_M"],
            "STAGES": config.stages,
            "AFTER": _after(c["J"], bits, group, c["BLOCK_M"]),
        }
        constants |= {"S": c["S"]} if config.form == "small" else {"WGMMA": core.warp_groups}
        matrix, loose = True, ("rows", "groups", "steps", "mask")
    return Variant("linear_wna16", config.form, types, constants, config.warps, config.stages, matrix, label, loose)
