"""Products with weights of 8-bit floats: the kernel of `planish::gpu_linear_float8` and `planish::gpu_linear_fp8` (kernels/gpu/linear_fp8.py).

A tile is (BN rows of the weight, BM tokens). Where x is in 8-bit floats too, tensor cores multiply both as they are. Else the weight is decoded
in registers to the type of x, by moving the bits of a byte to where a 16-bit float has them: less work than the conversion
instructions of sm_89 and newer, which know float16 alone. Rows of the weight are filled up with zeros, so K is masked for x alone, and
only where it is shorter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.core import Core
from ..gpu.linear_dynamic import DTYPES
from ..linear_fp8 import DTYPES as FLOATS
from . import epilogue, split_k, tiles
from .ahead import Variant
from .config import Config, core_of, launch, on_gpu, tuned
from .tiles import Operands


def _decoder(shift: int, kind: str, one: int) -> tl.constexpr:
    """PTX for the values of four bytes ($2) as pairs of 16-bit floats ($0, $1).

    A byte goes to the high half of 16 bits, its exponent and mantissa `shift` to the right, and the difference of the exponents' biases is
    multiplied in, which is exact: `one` has the bits of that power of two.
    """
    mask = 0x7F00 >> shift
    body = "prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424; "  # both before an output is written
    for pair, to in (("a", "$0"), ("b", "$1")):
        body += f"shr.b32 m, {pair}, {shift}; and.b32 m, m, {mask * 0x10001}; lop3.b32 {pair}, {pair}, s, m, 0xEA; "
        body += f"fma.rn.{kind}x2 {to}, {pair}, f, s; "  # s is -0 twice, which changes no product
    return tl.constexpr(f"{{ .reg .b32 a, b, m, f, s; mov.b32 f, {one * 0x10001}; mov.b32 s, 0x80008000; {body}}}")


E4M3_FP16 = _decoder(1, "f16", (15 + 8) << 10)
E5M2_FP16 = _decoder(0, "f16", 15 << 10)
E4M3_BF16 = _decoder(4, "bf16", (127 + 120) << 7)
E5M2_BF16 = _decoder(3, "bf16", (127 + 112) << 7)


@triton.jit
def decoded(codes, like, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """The values of bytes in the type of `like`. With PTX, for a GPU, four bytes at a time."""
    if PTX and like.dtype == tl.float16:
        to_float16: tl.constexpr = E4M3_FP16 if FORMAT == "e4m3" else E5M2_FP16
        return tl.inline_asm_elementwise(to_float16, "=r,=r,r", [codes], tl.float16, True, 4)  # pyright: ignore[reportArgumentType]
    if PTX and like.dtype == tl.bfloat16:
        to_bfloat16: tl.constexpr = E4M3_BF16 if FORMAT == "e4m3" else E5M2_BF16
        return tl.inline_asm_elementwise(to_bfloat16, "=r,=r,r", [codes], tl.bfloat16, True, 4)  # pyright: ignore[reportArgumentType]
    high = codes.to(tl.uint16) << 8
    low: tl.constexpr = 1 if FORMAT == "e4m3" else 0  # pyright: ignore[reportAssignmentType]
    half = (((high & 0x7F00) >> low) | (high & 0x8000)).to(tl.float16, bitcast=True).to(tl.float32)
    return (half * (256.0 if FORMAT == "e4m3" else 1.0)).to(like.dtype)


@triton.jit
def linear_float8(
    x_ptr, token_scale_ptr, weight_ptr, scale_ptr, bias_ptr, factor_ptr, residual_ptr, y_ptr, parts_ptr,
    tokens, outs, channels, columns,
    FORMAT: tl.constexpr, ACTIVATIONS: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Writes y (tokens, outs), or for SPLIT > 1 parts (SPLIT, tokens, outs) float32, of x (tokens, channels) and weight (outs, columns)."""
    row, column = tiles.tile(tl.program_id(0), tokens, outs, BN, BM, BAND)
    out = row * BN + tl.arange(0, BN)
    token = column * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    each = tl.cdiv(columns // BK, SPLIT)
    first = part * each
    last = tl.minimum(first + each, columns // BK)
    k = tl.arange(0, BK)
    weight = weight_ptr + out.to(tl.int64)[:, None] * columns + (first * BK + k)[None, :]  # (BN, BK)
    x_at = x_ptr + token.to(tl.int64)[:, None] * channels + (first * BK + k)[None, :]  # (BM, BK)
    known, wanted = (token < tokens)[:, None], (out < outs)[:, None]
    z = tl.zeros((BN, BM), tl.float32)
    for step in range(first, last):
        w = tl.load(weight, wanted, 0.0)
        x = tl.load(x_at, known if EVEN else known & (step * BK + k < channels)[None, :], 0.0)
        if ACTIVATIONS == "none":
            if x.dtype == tl.float32:
                z = tl.dot(decoded(w, x, FORMAT, PTX), x.T, z, input_precision="ieee")
            else:
                z = tl.dot(decoded(w, x, FORMAT, PTX), x.T, z)
        else:
            z = tl.dot(w, x.T, z)
        weight += BK
        x_at += BK
    token, out = token[None, :], out[:, None]
    z *= tl.load(scale_ptr + out, out < outs, 0.0)
    if token_scale_ptr is not None:
        z *= tl.load(token_scale_ptr + token, token < tokens, 0.0)
    if SPLIT == 1:
        epilogue.store(z, y_ptr, bias_ptr, factor_ptr, residual_ptr, token, out, tokens, outs, ACTIVATION)
    else:
        at = (part * tokens + token).to(tl.int64) * outs + out
        tl.store(parts_ptr + at, z, (token < tokens) & (out < outs))


HELD = 128
"""decoded weights of a step that a thread holds beside its sums"""


def _operands(core: Core, activations: str) -> Operands:
    if activations == "none":
        return Operands(1, 2, tiles.macs(core) / 2, held=HELD)
    return Operands(1, 1, tiles.macs(core) if core.warp_groups else tiles.macs(core) / 2)


@functools.cache
def default(core: Core, m: int, n: int, k: int, activations: str = "none") -> Config:
    """The fitting specialization that tiles.py expects to be the shortest, for m tokens, n rows and k columns."""
    return tiles.ordered(core, m, n, k, k, _operands(core, activations))[0]


def choose(core: Core, m: int, n: int, k: int, activations: str = "none") -> Config:
    """The tuned specialization of the shape's bucket where its steps fit k, else `default`."""
    found = tuned(f"linear_float8.{activations}", core, m, n, k)
    if found is not None and k % found.constants["BK"] == 0:
        return found
    return default(core, triton.next_power_of_2(m), n, k, activations)


def candidates(core: Core, m: int, n: int, k: int, activations: str = "none") -> list[Config]:
    """What a tuning script tries: the first 32."""
    return tiles.ordered(core, m, n, k, k, _operands(core, activations))[:32]


def product(
    x: torch.Tensor,
    token_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    activations: str,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    config: Config | None = None,
) -> torch.Tensor:
    """Output y (..., out) of x (..., in) in floats, or (..., columns) uint8 with its scale; `config` instead of the chosen one is for tuning."""
    (outs, columns), channels = weight.shape, x.shape[-1]
    tokens = x.numel() // max(channels, 1)
    y = x.new_empty((*x.shape[:-1], outs), dtype=dtype)
    if not tokens:
        return y
    config = config or choose(core_of(x), tokens, outs, columns, activations)
    c = config.constants
    parts = y.new_empty((c["SPLIT"], tokens, outs), dtype=torch.float32) if c["SPLIT"] > 1 else None
    if activations != "none":
        weight, x = weight.view(FLOATS[format]), x.view(FLOATS[activations])
    factor, residual = (None if v is None else v.contiguous() for v in (factor, residual))
    launch(
        linear_float8, (triton.cdiv(outs, c["BN"]) * triton.cdiv(tokens, c["BM"]), c["SPLIT"]), config,
        x.contiguous(), token_scale, weight, scale, bias, factor, residual, y, parts, tokens, outs, channels, columns,
        FORMAT=format, ACTIVATIONS=activations, PTX=on_gpu(x), EVEN=channels == columns,
        ACTIVATION=activation, **c,
    )  # fmt: skip
    if parts is not None:
        split_k.finish(parts, y.view(tokens, outs), bias, factor, residual, activation)
    return y


def run(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    activations: str,
    dtype: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Output y (..., out) of `dtype` for codes (..., columns)."""
    return product(codes, token_scale, weight, scale, format, activations, DTYPES[dtype], bias, factor, residual, activation)  # fmt: skip


def variants(core: Core) -> list[Variant]:
    """Weights alone, for one token and for many; both in 8 bits where the core multiplies them."""
    types = {"weight_ptr": "*u8", "scale_ptr": "*fp32", "y_ptr": "*bf16"}
    types |= {"tokens": "i32", "outs": "i32", "channels": "i32", "columns": "i32"}
    absent = ("token_scale_ptr", "bias_ptr", "factor_ptr", "residual_ptr", "parts_ptr")
    cases = [("none", 1, "e4m3 weights, 1 token"), ("none", 1024, "e4m3 weights, 1024 tokens")]
    if core.fp8:
        cases += [("e4m3", 16, "e4m3, 16 tokens"), ("e4m3", 1024, "e4m3, 1024 tokens")]
    made = []
    for activations, tokens, label in cases:
        config = default(core, tokens, 4096, 4096, activations)
        more = {"x_ptr": "*bf16"}
        if activations != "none":
            more = {"x_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv", "token_scale_ptr": "*fp32"}
        if config.constants["SPLIT"] > 1:
            more["parts_ptr"] = "*fp32"
        constants: dict[str, Any] = {n: None for n in absent if n not in more}
        constants |= {
            "FORMAT": "e4m3",
            "ACTIVATIONS": activations,
            "PTX": True,
            "EVEN": True,
            "ACTIVATION": "",
        }
        made.append(Variant("linear_float8", "linear_float8", types | more, constants | dict(config.constants), config.warps, config.stages, True, label, ("tokens",)))  # fmt: skip
    return made
