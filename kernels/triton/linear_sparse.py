"""Products with 2:4 sparse weights (kernels/gpu/linear_sparse.py has the layout, the two forms and the numbers).

`expand` computes a tile of y transposed, (BN outputs, BM tokens), the weight on the left. A step of its loop reads one unit of 256
columns: 8 blocks of 8 groups. For each set of words and each of the four columns j of a group it makes one word of the dense
weight from the two kept ones by masks, and multiplies it with columns j of x:

    m_j = all ones where column j is kept
    w_0 = m_0 ? first : 0                      w_1 = m_1 ? (m_0 ? second : first) : 0
    w_3 = m_3 ? second : 0                     w_2 = m_2 ? (m_3 ? first : second) : 0

So the columns of the sum are taken in another order than stored, which no sum minds: a product sees the columns j of the groups of a
word, in x as in the weight, and nothing is shuffled between threads. Few tokens leave cores idle: then SPLIT programs share the units of
a tile, write their sums, and `finish` adds them in order.
"""

# pyright: reportArgumentType=false
# (numbers given to compile-time parameters, whose annotation is Triton's own)
from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from ..gpu import cusparselt
from ..gpu.core import Core
from ..gpu.linear_sparse import BLOCK, GROUP, UNIT, dense
from . import quantize_tokens
from .ahead import Variant
from .config import Config, core_of, launch, tuned
from .epilogue import store
from .tf32 import rounded

EXPAND, HARDWARE = "expand", "hardware"
MANY = 64
"""tokens beyond which time is products rather than bytes"""
AMPLE = 1 << 17
"""bytes of shared memory that hold enough programs with three stages"""
FINISH = Config("finish", {"BM": 4, "BN": 256}, warps=4, stages=2)


@triton.jit
def quarters(x):
    """The four tensors (...) of x (..., 2, 2)."""
    even, odd = tl.split(x)
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def mask(positions, BIT: tl.constexpr, WIDTH: tl.constexpr):
    """All ones in each place of a word whose group keeps the column of BIT."""
    if WIDTH == 16:  # noqa: SIM108 - the compiler takes one branch
        full = ((positions >> BIT) & 0x00010001) * 0xFFFF
    else:
        full = ((positions >> BIT) & 0x01010101) * 0xFF
    return full


@triton.jit
def widened(word, SHIFT: tl.constexpr):
    """The bits of 1152 + value as float16 for two of the four int8 values of a word: places 0 and 2, or with SHIFT 8 places 1 and 3.

    1024 + n, n below 1024, has the bits 0x6400 + n; n = value + 128 is the byte with its sign turned. A conversion runs at a fraction of the rate.
    """
    return (((word >> SHIFT) & 0x00FF00FF) ^ 0x00800080) | 0x64006400


@triton.jit
def unpacked(word, TYPE: tl.constexpr, WIDTH: tl.constexpr, FILL: tl.constexpr):
    """The values of words (BN, 8) int32, place by place: (BN, 8 * places) of TYPE."""
    if WIDTH == 16:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        value = tl.join(low, high).reshape(word.shape[0], word.shape[1] * 2)
        if FILL:
            value -= 1152.0
        value = value.to(TYPE)
    else:
        even = tl.join((word & 0xFF).to(tl.uint8), ((word >> 16) & 0xFF).to(tl.uint8))  # places 0 and 2
        odd = tl.join(((word >> 8) & 0xFF).to(tl.uint8), ((word >> 24) & 0xFF).to(tl.uint8))
        value = tl.join(even, odd).reshape(word.shape[0], word.shape[1] * 4).to(tl.int8, bitcast=True)
    return value


@triton.jit
def added(total, first, second, positions, x, SET: tl.constexpr, WIDTH: tl.constexpr, FILL: tl.constexpr):
    """`total` (BN, BM) and the product of one set of words.

    `first` and `second` are the kept values (BN, 8), `positions` words (BN, 8), x is (BM, 8, places, 2, 2), its last two dimensions
    the column of a group. FILL is a word of zeros.
    """
    TYPE: tl.constexpr = x.dtype
    BM: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1] * x.shape[2]
    x_0, x_1, x_2, x_3 = quarters(x)
    m_0 = mask(positions, 4 * SET, WIDTH)
    m_1 = mask(positions, 4 * SET + 1, WIDTH)
    m_2 = mask(positions, 4 * SET + 2, WIDTH)
    m_3 = mask(positions, 4 * SET + 3, WIDTH)
    w_0 = (first & m_0) | (FILL & ~m_0)
    w_1 = (((first & ~m_0) | (second & m_0)) & m_1) | (FILL & ~m_1)
    w_2 = (((second & ~m_3) | (first & m_3)) & m_2) | (FILL & ~m_2)
    w_3 = (second & m_3) | (FILL & ~m_3)
    total = tl.dot(
        unpacked(w_0, TYPE, WIDTH, FILL), x_0.reshape(BM, K).T, total, input_precision="tf32", out_dtype=total.dtype
    )
    total = tl.dot(
        unpacked(w_1, TYPE, WIDTH, FILL), x_1.reshape(BM, K).T, total, input_precision="tf32", out_dtype=total.dtype
    )
    total = tl.dot(
        unpacked(w_2, TYPE, WIDTH, FILL), x_2.reshape(BM, K).T, total, input_precision="tf32", out_dtype=total.dtype
    )
    total = tl.dot(
        unpacked(w_3, TYPE, WIDTH, FILL), x_3.reshape(BM, K).T, total, input_precision="tf32", out_dtype=total.dtype
    )
    return total


@triton.jit
def expand(
    x_ptr,  # (rows, columns) float16, bfloat16, float32, or int8
    values_ptr,  # (outs, units * SETS * 2 * 8) int32
    positions_ptr,  # (outs, units * 8) int32
    scale_ptr,  # (outs,) float32 or None
    step_ptr,  # (rows,) float32, of int8 x, or None
    y_ptr,  # (rows, outs); (SPLIT, rows, outs) float32 or int32 where SPLIT > 1
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    outs,
    columns,
    units,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """A tile of y, or of one part of its sums."""
    SETS: tl.constexpr = BITS // 4
    FILL: tl.constexpr = 0 if BITS == 16 else 0x64806480  # pyright: ignore[reportAssignmentType]  # what `widened` makes of zeros
    tiles_n, part = tl.cdiv(outs, BN), tl.program_id(1)
    out = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    row = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    known, real = (row < rows)[:, None], (out < outs)[:, None]
    each = tl.cdiv(units, SPLIT)
    first = part * each
    last = tl.minimum(first + each, units)
    block = tl.arange(0, 8)
    wide = out.to(tl.int64)[:, None]
    values = values_ptr + wide * (units * (16 * SETS)) + (first * (16 * SETS) + block)[None, :]  # (BN, 8)
    positions = positions_ptr + wide * (units * 8) + (first * 8 + block)[None, :]  # (BN, 8)
    column = first * 256 + tl.arange(0, 256)
    x_row = x_ptr + row.to(tl.int64)[:, None] * columns
    if x_ptr.dtype.element_ty == tl.int8:  # noqa: SIM108
        total = tl.zeros((BN, BM), tl.int32)
    else:
        total = tl.zeros((BN, BM), tl.float32)
    for _ in range(first, last):
        x = tl.load(x_row + column[None, :], known & (column < columns)[None, :], 0)  # (BM, 256)
        if x_ptr.dtype.element_ty == tl.float32:
            x = rounded(x)
        bits = tl.load(positions, real, 0)
        if x_ptr.dtype.element_ty == tl.int8:
            x_0, x_1 = tl.split(x.reshape(BM, 8, 4, 2, 2, 2).permute(0, 1, 2, 4, 5, 3))  # block, place, column, set
            first_0, second_0 = tl.load(values, real, 0), tl.load(values + 8, real, 0)
            first_1, second_1 = tl.load(values + 16, real, 0), tl.load(values + 24, real, 0)
            total = added(total, first_0, second_0, bits, x_0, 0, 8, 0)
            total = added(total, first_1, second_1, bits, x_1, 1, 8, 0)
        else:
            x_0, x_1, x_2, x_3 = quarters(x.reshape(BM, 8, 2, 2, 2, 2, 2).permute(0, 1, 2, 5, 6, 3, 4))
            first_0, second_0 = tl.load(values, real, 0), tl.load(values + 8, real, 0)
            first_1, second_1 = tl.load(values + 16, real, 0), tl.load(values + 24, real, 0)
            if BITS == 16:
                first_2, second_2 = tl.load(values + 32, real, 0), tl.load(values + 40, real, 0)
                first_3, second_3 = tl.load(values + 48, real, 0), tl.load(values + 56, real, 0)
            else:  # an int8 word of set s holds what float16 words of the sets s and s + 2 would
                first_2, second_2 = widened(first_0, 8), widened(second_0, 8)
                first_3, second_3 = widened(first_1, 8), widened(second_1, 8)
                first_0, second_0 = widened(first_0, 0), widened(second_0, 0)
                first_1, second_1 = widened(first_1, 0), widened(second_1, 0)
            total = added(total, first_0, second_0, bits, x_0, 0, 16, FILL)
            total = added(total, first_1, second_1, bits, x_1, 1, 16, FILL)
            total = added(total, first_2, second_2, bits, x_2, 2, 16, FILL)
            total = added(total, first_3, second_3, bits, x_3, 3, 16, FILL)
        values += 16 * SETS
        positions += 8
        column += 256
    token, output = row[None, :], out[:, None]
    if SPLIT == 1:
        z = scaled(total, scale_ptr, step_ptr, token, output, rows, outs)
        store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, token, output, rows, outs, ACTIVATION)
    else:
        at = (part * rows + token).to(tl.int64) * outs + output
        tl.store(y_ptr + at, total, (token < rows) & real)


@triton.jit
def scaled(total, scale_ptr, step_ptr, token, output, rows, outs):
    """The product in float32 of sums in units of the stored values."""
    z = total.to(tl.float32)
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + output, output < outs, 0.0)
    if step_ptr is not None:
        z *= tl.load(step_ptr + token, token < rows, 0.0)
    return z


@triton.jit
def finish(
    parts_ptr,  # (SPLIT, rows, outs) float32, int32, or the type of y
    scale_ptr,
    step_ptr,
    y_ptr,
    bias_ptr,
    factor_ptr,
    residual_ptr,
    rows,
    outs,
    SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile (BM, BN) of y from the sums of the parts."""
    token = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    output = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    inside = (token < rows) & (output < outs)
    total = tl.load(parts_ptr + token.to(tl.int64) * outs + output, inside, 0)
    for part in tl.static_range(1, SPLIT):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(parts_ptr + (part * rows + token).to(tl.int64) * outs + output, inside, 0)
    z = scaled(total, scale_ptr, step_ptr, token, output, rows, outs)
    store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, token, output, rows, outs, ACTIVATION)


def run(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    activation_bits: int,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x."""
    ends = (bias, factor, residual, activation)
    if activation_bits == 16:
        return multiply(x, None, values, positions, scale, bits, x.dtype, *ends)
    columns = positions.shape[1] * BLOCK * GROUP
    codes, step, *_ = quantize_tokens.run(x, None, None, None, None, None, "", 0.0, 0, False, "int8", 0, columns)
    return multiply(codes, step, values, positions, scale, bits, x.dtype, *ends)


def multiply(
    x: torch.Tensor,
    step: torch.Tensor | None,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., out) in `dtype` of x (..., in) in floats, or of int8 codes with their scales `step` (..., 1)."""
    n, k = values.shape[0], x.shape[-1]
    y = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    if not y.numel():
        return y
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    config = choose(core_of(x), m, n, k, bits, x.dtype, _usable(x, values, bits))
    ends = (bias, factor, residual)
    if config.form == HARDWARE:
        sums = cusparselt.product(rows, _compressed(values, positions, bits, x.dtype))
        if scale is None and not activation and ends == (None, None, None):
            return sums.view(y.shape)
        _finish(sums[None], scale, step, y, *ends, activation)
        return y
    units, c = positions.shape[1] // BLOCK, config.constants
    split = triton.cdiv(units, triton.cdiv(units, c["SPLIT"]))
    kind = torch.int32 if x.dtype == torch.int8 else torch.float32
    sums = y if split == 1 else torch.empty((split, m, n), dtype=kind, device=x.device)
    tiles = triton.cdiv(m, c["BM"]) * triton.cdiv(n, c["BN"])
    launch(
        expand, (tiles, split), config, rows, values, positions, *((scale, step) if split == 1 else (None, None)), sums,
        *(ends if split == 1 else (None, None, None)), m, n, k, units,
        BITS=bits, SPLIT=split, ACTIVATION=activation if split == 1 else "", BN=c["BN"], BM=c["BM"],
    )  # fmt: skip
    if split > 1:
        _finish(sums, scale, step, y, *ends, activation)
    return y


def _finish(
    parts: torch.Tensor,
    scale: torch.Tensor | None,
    step: torch.Tensor | None,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> None:
    split, m, n = parts.shape
    c = FINISH.constants
    launch(
        finish, (triton.cdiv(m, c["BM"]), triton.cdiv(n, c["BN"])), FINISH,
        parts, scale, step, y, bias, factor, residual, m, n, SPLIT=split, ACTIVATION=activation, **c,
    )  # fmt: skip


_compressed_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""stored values: cuSPARSELt's form by type"""


def _compressed(values: torch.Tensor, positions: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The form of a weight that cuSPARSELt takes, made once for each type of x."""
    forms: dict[torch.dtype, torch.Tensor] = _compressed_forms.setdefault(values, {})  # pyright: ignore[reportAssignmentType]
    if dtype not in forms:
        forms[dtype] = cusparselt.compress(dense(values, positions, bits).to(dtype))
    return forms[dtype]


def _usable(x: torch.Tensor, values: torch.Tensor, bits: int) -> bool:
    """Whether the sparse tensor cores can serve this product now.

    A CUDA graph that is being captured cannot hold the making of cuSPARSELt's form: a first call before the capture makes it.
    """
    if not x.is_cuda or (bits == 8) != (x.dtype == torch.int8) or not cusparselt.takes(x.dtype, *_matrix(x, values)):
        return False
    reason = cusparselt.missing()
    if reason is not None:
        _say(reason)
        return False
    return x.dtype in (_compressed_forms.get(values) or {}) or not torch.cuda.is_current_stream_capturing()


def _matrix(x: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
    return values.shape[0], x.shape[-1]


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"2:4 sparse layers multiply their zeros too: {reason}", stacklevel=2)


def choose(core: Core, m: int, n: int, k: int, bits: int, dtype: torch.dtype, usable: bool) -> Config:
    """The tuned choice or the default one, with sparse tensor cores only where they are usable."""
    found = tuned(variant(bits, dtype), core, m, n, k)
    if found is None or (found.form == HARDWARE and not usable):
        return default(core, m, n, k, bits, dtype, usable)
    return found


def variant(bits: int, dtype: torch.dtype) -> str:
    """Key of the shipped tables: linear_sparse.16, linear_sparse.8, and linear_sparse.8a8 for int8 activations."""
    return f"linear_sparse.{bits}{'a8' if dtype == torch.int8 else ''}"


def default(
    core: Core, m: int, n: int, k: int, bits: int = 16, dtype: torch.dtype = torch.bfloat16, usable: bool = False
) -> Config:
    """Sparse tensor cores for many tokens; else tiles as high as the tokens, and a sum split so that all cores have work."""
    if usable and m > MANY:
        return Config(HARDWARE)
    tile, warps = _tile(core, m, bits, dtype)
    tiles = triton.cdiv(n, tile["BN"]) * triton.cdiv(m, tile["BM"])
    units = triton.cdiv(k, UNIT)
    few = m <= MANY
    wanted = core.multiprocessors * (8 // warps if few else 1)  # programs: eight warps a core hide what each waits for
    split = max(1, min(wanted // tiles, units // 2, 16))
    return Config(EXPAND, {**tile, "SPLIT": split}, warps, 3 if few and core.shared_bytes > AMPLE else 2)


def _tile(core: Core, m: int, bits: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """(tile, warps): two warps multiply without the barriers that groups of four need on Hopper."""
    widens = bits == 8 and dtype != torch.int8  # needs more registers
    if dtype == torch.float32 or (widens and m <= 16):
        return {"BN": 32, "BM": 16}, 2
    if m <= 16:
        return {"BN": 64, "BM": 16}, 2
    if m <= 32:
        return {"BN": 64, "BM": 32}, 4
    if dtype == torch.int8:
        return {"BN": 128, "BM": 64}, 8
    return (
        ({"BN": 64, "BM": 64}, 4) if core.warp_groups else ({"BN": 128, "BM": 32}, 8)
    )  # else registers do not suffice


def candidates(core: Core, m: int, n: int, k: int, bits: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Config]:
    """What is worth timing on a GPU."""
    found = [Config(HARDWARE)] if m > 16 else []
    heights = [16, 32] if m <= 32 else [32, 64, 128]
    for bm in heights:
        for bn, warps in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8)):
            if bm * bn > 64 * 128 or (bm >= 64 and warps == 2):
                continue
            tiles = triton.cdiv(n, bn) * triton.cdiv(m, bm)
            for waves in (1, 2, 4):
                split = max(1, min(waves * core.multiprocessors // tiles, triton.cdiv(k, UNIT) // 2, 16))
                config = Config(EXPAND, {"BN": bn, "BM": bm, "SPLIT": split}, warps, 3 if bn * bm <= 4096 else 2)
                if config not in found:
                    found.append(config)
    return found[:40]


def variants(core: Core) -> list[Variant]:
    """float16 and int8 values, few and many tokens, and the sum of parts."""
    found = []
    for m, bits, dtype in (
        (1, 16, "bf16"), (128, 16, "bf16"), (1, 8, "bf16"), (1, 8, "i8"), (1024, 8, "i8"),
    ):  # fmt: skip
        kind = torch.int8 if dtype == "i8" else torch.bfloat16
        config = default(core, m, 4096, 4096, bits, kind)
        c = config.constants
        whole = c["SPLIT"] == 1
        types = {
            "x_ptr": f"*{dtype}", "values_ptr": "*i32", "positions_ptr": "*i32",
            "y_ptr": "*bf16" if whole else "*i32" if dtype == "i8" else "*fp32",
            "rows": "i32", "outs": "i32", "columns": "i32", "units": "i32",
        }  # fmt: skip
        absent: dict[str, None] = {"bias_ptr": None, "factor_ptr": None, "residual_ptr": None}
        for name, used in (("scale_ptr", whole and bits == 8), ("step_ptr", whole and dtype == "i8")):
            if used:
                types[name] = "*fp32"
            else:
                absent[name] = None
        constants = {**absent, "BITS": bits, "ACTIVATION": "", **c}
        label = f"w{bits}{'a8' if dtype == 'i8' else 'a16'} 2:4, {m} tokens"
        loose = ("rows", "units")
        found.append(
            Variant("linear_sparse", "expand", types, constants, config.warps, config.stages, True, label, loose)
        )
    types = {
        "parts_ptr": "*i32", "scale_ptr": "*fp32", "step_ptr": "*fp32", "y_ptr": "*bf16", "bias_ptr": "*fp32",
        "residual_ptr": "*bf16", "rows": "i32", "outs": "i32",
    }  # fmt: skip
    constants = {"factor_ptr": None, "SPLIT": 4, "ACTIVATION": "silu", **FINISH.constants}
    label = "w8a8 2:4, sum of four parts"
    found.append(
        Variant("linear_sparse", "finish", types, constants, FINISH.warps, FINISH.stages, False, label, ("rows",))
    )
    return found
