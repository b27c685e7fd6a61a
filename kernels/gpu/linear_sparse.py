"""2:4 sparse weights on a GPU: `planish::gpu_linear_sparse`, and `planish::gpu_linear_sparse_int8` behind gpu_quantize_tokens.

Two products serve one layer (kernels/triton/linear_sparse.py):

    expand     for few tokens, where time is bytes: the kept values and their positions are read, the dense tile is made in registers, and
               multiplied by ordinary tensor cores. Zeros are multiplied: it saves memory traffic (0.5625 of float16, 0.625 of int8), no
               arithmetic
    hardware   for many, where time is products: the sparse tensor cores, which skip the zeros, through the cuSPARSELt that PyTorch binds
               (Triton has no sparse product). Its own compressed form is made on the device from the stored one when first
               needed, and takes as much memory again. Where PyTorch has no cuSPARSELt, `expand` serves all sizes, and says so once

Stored, with units = ceil(in / 256), in blocks of 8 groups (32 columns), 8 blocks a unit; groups beyond the row are zero. A word of 32 bits has
P = 32 / bits values (places), so S = 8 / P words (sets) hold a value of each group of a block: place p of set s is for group s + S p, and

    positions  (out, units * 8) int32: a word for each block; bit 4 g + j says that column j of its group g is kept
    values     (out, units * S * 2 * 8) int32: for each unit by set, first or second kept value, block
    scale      (out,) float32, for bits 8

A mask over a whole word is then a shift, an AND and a multiplication, and four columns of 2 or 4 groups take six logical operations:
1.5 to 3 instructions a weight. Where a group has one bit or none, the missing values are zero.

Numbers. float16 values are rounded to bfloat16 where x is bfloat16; float32 x is rounded to TF32. Products are exact, sums float32: y is
within in 2^-23 S + half a unit of y's type of the float64 value with those operands, S = |x| |W|^T; a bfloat16 x with float16 values adds
2^-9 S, a float32 x 2^-11 S, `hardware` with float activations half a unit of the product's type. With int8 activations sums are int32 and exact.
"""

from __future__ import annotations

from typing import Any

import torch

from ..linear_sparse import GROUP, KEPT, TOP, place, unpack
from .core import Core
from .norm import WIDEST
from .op import EPILOGUE, GpuOp, Layer, Packed, Split, epilogue, linear_output, register
from .quantize_tokens import quantized
from .tf32 import rounded

BLOCK = 8
"""groups of a block, and blocks of a unit"""
UNIT = BLOCK * BLOCK * GROUP
"""columns of a unit"""


def pack_positions(positions: torch.Tensor) -> torch.Tensor:
    """(out, units * 8) int32 of positions (out, groups, 2)."""
    kept = place(torch.ones(len(positions), positions.shape[1] * KEPT, dtype=torch.int64), positions)  # (out, in)
    kept = torch.nn.functional.pad(kept, (0, -kept.shape[1] % UNIT)).unflatten(1, (-1, BLOCK * GROUP))
    words = (kept << torch.arange(BLOCK * GROUP)).sum(-1)  # (out, blocks), below 2^32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_values(values: torch.Tensor) -> torch.Tensor:
    """(out, units * S * 2 * 8) int32 of values (out, in / 2), float16 or int8."""
    places = 4 // values.element_size()
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % (UNIT * KEPT // GROUP)))
    parts = padded.unflatten(1, (-1, BLOCK, places, BLOCK // places, KEPT))  # (out, units, block, place, set, which)
    return parts.permute(0, 1, 4, 5, 2, 3).contiguous().view(torch.int32).flatten(1)


def dense(values: torch.Tensor, positions: torch.Tensor, bits: int) -> torch.Tensor:
    """(out, units * 256) float16 or int8: the weight, unscaled, of packed tensors."""
    out, places = len(values), 32 // bits
    parts = values.reshape(out, -1, BLOCK // places, KEPT, BLOCK, 1).view(torch.int8 if bits == 8 else torch.float16)
    first, second = parts.permute(0, 1, 4, 5, 2, 3).reshape(out, -1, KEPT).unbind(-1)  # (out, groups)
    bit = (positions[..., None] >> torch.arange(BLOCK * GROUP, device=positions.device)) & 1
    bit = bit.reshape(out, -1, GROUP).bool()
    columns = [torch.where(bit[..., j], torch.where(bit[..., :j].any(-1), second, first), 0) for j in range(GROUP)]
    return torch.stack(columns, -1).flatten(1)


def product(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor,
    dtype: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., out) in `dtype` of codes (..., units * 256) int8 and their scales (..., 1)."""
    sums = codes.double() @ dense(values, positions, 8).double().T  # whole numbers
    return epilogue(sums.float() * scale * token_scale, bias, factor, residual, activation, getattr(torch, dtype))


def reference(
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
    if activation_bits == 8:
        assert scale is not None
        codes, step, _ = quantized(x.float(), "int8", 0)
        codes = torch.nn.functional.pad(codes, (0, -x.shape[-1] % UNIT))
        kind = str(x.dtype).removeprefix("torch.")
        return product(codes, step, values, positions, scale, kind, bias, factor, residual, activation)
    weight = dense(values, positions, bits)[:, : x.shape[-1]].to(x.dtype).float()
    z = torch.nn.functional.linear(rounded(x) if x.dtype == torch.float32 else x.float(), weight)
    return epilogue(z if scale is None else z * scale, bias, factor, residual, activation, x.dtype)


def _product_output(codes: torch.Tensor, token_scale: torch.Tensor, values: torch.Tensor, *rest: Any) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], len(values)), dtype=getattr(torch, rest[2]))


register(
    f"gpu_linear_sparse(Tensor x, Tensor values, Tensor positions, Tensor? scale, int bits, int activation_bits, {EPILOGUE}) -> Tensor",
    reference,
    lambda x, values, *_: linear_output(x, values.shape[0]),
)
register(
    f"gpu_linear_sparse_int8(Tensor codes, Tensor token_scale, Tensor values, Tensor positions, Tensor scale, str dtype, {EPILOGUE})"
    " -> Tensor",
    product,
    _product_output,
)


class LinearSparse(GpuOp):
    """Words of kept values, words of positions."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """A row that is too wide to be quantized in one block."""
        inputs = 2 * layer.tensors["values"].shape[1]
        if layer.attributes["activation_bits"] == 8 and inputs > WIDEST:
            return f"rows of {inputs} columns; tokens of at most {WIDEST} are quantized"
        return None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """The same values and positions, word by word; beside int8 activations also as the second of two nodes."""
        values, scale = layer.tensors["values"], layer.tensors.get("scale")
        positions = unpack(layer.tensors["positions"], values.shape[1] // KEPT)
        tensors = {"values": pack_values(values), "positions": pack_positions(positions)}
        if scale is not None:
            assert int(values.abs().max()) <= TOP
            tensors["scale"] = scale.contiguous()
        bits, activation_bits = 8 * values.element_size(), int(layer.attributes["activation_bits"])
        split = None
        if activation_bits == 8:
            columns = tensors["positions"].shape[1] * BLOCK * GROUP
            split = Split({"format": "int8", "group": 0, "columns": columns}, "linear_sparse_int8", tensors, {})
        return Packed(tensors, {"bits": bits, "activation_bits": activation_bits}, split)
