"""W8A8, W4A8 and W4A4 on a GPU: the product of int8 codes, with (`planish::gpu_linear_dynamic`) and without (`planish::gpu_linear_int8`)
the quantization of x before it, which is quantize_tokens.py.

Stored, with `columns` = in, for one scale a row filled up with zeros to a multiple of 128:

    weight  8 bits: (out, columns) int8, the value of a code: code - 128
            4 bits: (out, columns / 2) uint8: byte j of each 32, the b-th 32, holds the values of columns 64 b + j (low half) and
            64 b + 32 + j (high half) in two's complement, so that `byte << 4` and `byte & 0xF0`, four bytes at a time, are 16 times the values
    scale   (groups, out) float32, groups = 1 or in / group
    total   (out,) float32: the sum of a row of the real weight, only for activations quantized per tensor, which have a zero point

Codes are (..., columns) int8, for 4-bit activations too: Hopper multiplies nothing smaller.

Numbers. Integer sums are exact, over the whole row or over a group; z = (sum scale - zero total) token_scale is rounded to float32 in each
of its operations, and sums of groups add one rounding each. So y is within

    (groups + 4) 2^-24 S + half a unit of y's type        S = sum over groups of |codes| |W| token_scale

of the real product of the codes and the stored weight. Codes differ from the definition's as quantize_tokens.py says: not at all without
a norm or a rotation before them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .. import packing
from ..linear_dynamic import PER_TENSOR, PER_TOKEN
from .core import Core
from .op import EPILOGUE, GpuOp, Layer, Packed, Split, epilogue, linear_output, register
from .quantize_tokens import gpu_quantize_tokens

FILL = 128
"""columns of a row are a multiple of it, where the row has one scale"""
LEAST_GROUP = {8: 32, 4: 64}
"""by bits of the weight: groups are multiples of it, the depth of the least product and of the interleaving of halves"""
DEEPEST = 1 << 16
"""columns whose sum of products of codes surely fits int32, times 16 for 4-bit weights"""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def interleave(values: torch.Tensor) -> torch.Tensor:
    """Stored bytes (out, columns / 2) uint8 of 4-bit values (out, columns) int8, columns a multiple of 64."""
    low, high = values.view(torch.uint8).unflatten(1, (-1, 2, 32)).unbind(2)  # (out, columns / 64, 32) each
    return (low & 15 | high << 4).flatten(1)


def stored_values(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The values (out, columns) int8 of a stored weight."""
    if bits == 8:
        return weight
    split = weight.unflatten(1, (-1, 32))
    halves = torch.stack([split << 4, split & 0xF0], 2).view(
        torch.int8
    )  # (out, columns / 64, 2, 32), 16 times the values
    return (halves >> 4).flatten(1)


def gpu_linear_int8(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    token_zero: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    total: torch.Tensor | None,
    bits: int,
    group: int,
    dtype: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Output y (..., out) of `dtype` for codes (..., columns) int8 with their scale (..., 1) or (..., groups) and zero (..., 1) or None."""
    values = stored_values(weight, bits).double()  # exact: sums of products stay far below 2^53
    if group:
        parts = torch.einsum(
            "...gk,ogk->...og", codes.double().unflatten(-1, (-1, group)), values.unflatten(1, (-1, group))
        ).float()  # (..., out, groups)
        z = (parts * scale.T * (token_scale[..., None, :] if token_scale.shape[-1] > 1 else 1.0)).sum(-1)
    else:
        z = (codes.double() @ values.T).float() * scale[0]
    if token_zero is not None and total is not None:
        z = z - token_zero * total
    z = z if token_scale.shape[-1] > 1 else z * token_scale
    return epilogue(z, bias, factor, residual, activation, DTYPES[dtype])


def _fake_int8(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    token_zero: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    total: torch.Tensor | None,
    bits: int,
    group: int,
    dtype: str,
    *_: object,
) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=DTYPES[dtype])


register(
    "gpu_linear_int8(Tensor codes, Tensor token_scale, Tensor? token_zero, Tensor weight, Tensor scale, Tensor? total, int bits,"
    f" int group, str dtype, {EPILOGUE}) -> Tensor",
    gpu_linear_int8,
    _fake_int8,
)


def columns_of(weight: torch.Tensor, bits: int) -> int:
    """Columns of a stored weight."""
    return weight.shape[1] * (8 // bits)


def gpu_linear_dynamic(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    total: torch.Tensor | None,
    bits: int,
    group: int,
    format: str,
    activation_group: int,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Output y (..., out) of x's type for x (..., in) in floats."""
    codes, token_scale, zero, _, _ = gpu_quantize_tokens(
        x, None, None, None, None, None, "", 0.0, 0, False, format, activation_group, columns_of(weight, bits)
    )
    token_zero = zero if activation_group == PER_TENSOR else None
    return gpu_linear_int8(
        codes, token_scale, token_zero, weight, scale, total, bits, group, NAMES[x.dtype], bias, factor, residual, activation
    )  # fmt: skip


register(
    "gpu_linear_dynamic(Tensor x, Tensor weight, Tensor scale, Tensor? total, int bits, int group, str format, int activation_group,"
    f" {EPILOGUE}) -> Tensor",
    gpu_linear_dynamic,
    lambda x, weight, *_: linear_output(x, weight.shape[0]),
)


class LinearDynamic(GpuOp):
    """Both nodes of kernels/linear_dynamic.py."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Groups that are no multiple of a product's depth, or of activations alone."""
        bits, group, _, activation_group, channels = self._facts(layer)
        if channels > DEEPEST:
            return f"it has {channels} input channels; at most {DEEPEST} are taken"
        if group and group % LEAST_GROUP[bits]:
            return f"its weights have groups of {group} columns; multiples of {LEAST_GROUP[bits]} are taken, or the whole row"
        if activation_group > 0 and activation_group != group:
            return f"its activations have groups of {activation_group} columns and its weights of {group or channels}; equal ones are taken"  # fmt: skip
        return None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """See the docstring of this file."""
        bits, group, activation_bits, activation_group, channels = self._facts(layer)
        raw = packing.unpack(layer.tensors["codes"], bits, group or channels)  # (out, in) uint8
        values = (raw.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        if not group:
            values = F.pad(values, (0, -channels % FILL))
        scale = layer.tensors["scale"].float().T.contiguous()  # (groups, out)
        tensors = {"weight": values.contiguous() if bits == 8 else interleave(values), "scale": scale}
        if activation_group == PER_TENSOR:
            wide = values.double().unflatten(1, (scale.shape[0], -1)).sum(2)  # (out, groups)
            tensors["total"] = (wide * scale.T.double()).sum(1).float()
        attributes = {"bits": bits, "group": group}
        format = "int8" if activation_bits == 8 else "int4"
        quantize = {"format": format, "group": activation_group, "columns": values.shape[1]}
        split = Split(quantize, "linear_int8", tensors, attributes)
        return Packed(tensors, attributes | {"format": format, "activation_group": activation_group}, split)

    @staticmethod
    def _facts(layer: Layer) -> tuple[int, int, int, int, int]:
        """(bits, group, activation_bits, activation_group, in); a group of the whole row is 0."""
        bits, group = int(layer.attributes["bits"]), int(layer.attributes["group"])
        activation_bits, activation_group = (int(layer.attributes[n]) for n in ("activation_bits", "activation_group"))
        channels = group * layer.tensors["scale"].shape[1]
        activation_group = PER_TOKEN if activation_group == channels else activation_group
        return bits, 0 if group == channels else group, activation_bits, activation_group, channels
