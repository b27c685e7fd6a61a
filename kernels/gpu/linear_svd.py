"""SVDQuant on a GPU, fused as Nunchaku does it (Li et al. 2024, section 4.2): two kernels, and the branch rides on both.

    1  h = x smooth;  codes and step of Q(h + shift smooth) by token and group;  thin = h down^T       one pass over x
    2  y = sum over groups of (codes R^T) step scale, begun with thin up^T, then the epilogue           one low-bit product

Stored, with groups = ceil(in / group) and r the rank, filled up with zeros to a power of two of 16 or more (0 stays 0):

    codes   (groups, out, group) int8 for 8 bits, the value of a code: code - 128. For 4 bits (groups, out, group / 2) int8: byte j of a
            group holds the values of columns j (low half) and j + group / 2 (high half) in two's complement, so that `byte << 4` and
            `byte & 0xF0` are 16 times the values, and the two halves of the product need no shuffle
    scale   (groups, out) float32, for 4 bits a sixteenth of it, rounded to 22 significant bits: its product with 1.5 * 2^23 is exact, which
            spares the kernel a subtraction for every sum
    offset  (groups, out) int32, only for unsigned activations of 8 bits, whose codes 0..255 are stored as code - 128: 128 times the sum of
            a group's stored values, where the sums begin
    smooth  (in,) float32;  down (r, in) float16;  up (out, r) float16

Numbers. Codes are round(h (top / max)), half to even, in float32: one code beside the definition's where its quotient lies within 2^-20 top
of a tie. Products of codes are int32 and exact; their sum over groups is float32. In the branch h and thin are rounded to TF32, down and up
are exact in it, sums are float32. So y is within

    (groups + 12) 2^-24 S + (2^-10 + in 2^-24) B + (one step of each code near a tie) + half a unit of y's type

of the float64 value, S = sum over groups of |Q(h)| |R|^T, B = |h| |down|^T |up|^T. With activation_bits 16 Q(h) is h in the type of x (TF32
for float32): a further half unit of that type times S.

Cost of rank 32 beside K columns and N rows at T tokens: kernel 1 does 2 T K 32 operations more, kernel 2 2 T N 32 (TF32), against
2 T K N int8 ones. At K = N = 4096 each is 0.78 % of them, 3.1 % of int8's time, as TF32 runs at a quarter of its rate; kernel 1 waits for
memory, though, so its share hides there. Bytes: the float16 factors add 64 (K + N), 0.5 MB to 8.4 MB of codes and 1.0 MB of scales (5.6 %).
Thin takes 128 P bytes a token in P parts, written once and read once (more than 2 parts at many tokens: added up by a third, short launch),
beside 2 K + 1.06 K of x and its codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from .. import packing
from ..linear_svd import FLOAT_BITS
from .core import Core
from .op import EPILOGUE, GpuOp, Layer, Packed, epilogue, linear_output, register
from .tf32 import rounded

GROUPS = (32, 64, 128, 256)
"""columns that share a scale; up to 256 the int32 sum of a group stays below 2^22, which the kernel's way to float32 needs"""
RANK = 256
"""largest rank: the accumulators of kernel 1 stay in registers"""
LEAST_RANK = 16
"""smallest depth of a tensor-core product"""


def quantize(
    x: torch.Tensor, smooth: torch.Tensor, group: int, bits: int, shift: float, unsigned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers (rows, groups, group) float32 and steps (rows, groups) of x (rows, in) float32: kernel 1's numbers."""
    h = (x + shift) * smooth if shift else x * smooth
    h = F.pad(h, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    h = h.clamp_min(0) if unsigned else h
    top = float((1 << bits) - 1 if unsigned else (1 << (bits - 1)) - 1)
    peak = h.abs().amax(2)
    inverse = torch.where(peak > 2.0**-100, top / peak, 0.0)
    return torch.round(h * inverse[..., None]), peak * (1 / top)


def values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored integers (groups, out, group) float32: values for 8 bits, 16 times the values for 4."""
    if bits == 8:
        return codes.float()
    return torch.cat([codes << 4, codes & -16], 2).float()


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    smooth: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bits: int,
    group: int,
    activation_bits: int,
    shift: float,
    unsigned: bool,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x."""
    rows = x.reshape(-1, x.shape[-1]).float()
    h = rounded(rows * smooth)
    y = rounded(h @ down.float().T) @ up.float().T
    if activation_bits == FLOAT_BITS:
        moved = (rows + shift) * smooth if shift else rows * smooth
        moved = rounded(moved) if x.dtype == torch.float32 else moved.to(x.dtype).float()
        left = F.pad(moved, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))  # (rows, groups, group)
        step = torch.ones(left.shape[:2])
    else:
        left, step = quantize(rows, smooth, group, activation_bits, shift, unsigned)
    for g, right in enumerate(values(codes, bits)):
        y = y + (left[:, g] @ right.T) * (step[:, g, None] * scale[g])
    return epilogue(y.reshape(*x.shape[:-1], -1), bias, factor, residual, activation, x.dtype)


register(
    "gpu_linear_svd(Tensor x, Tensor codes, Tensor scale, Tensor? offset, Tensor smooth, Tensor down, Tensor up, int bits, int group,"
    f" int activation_bits, float shift, bool unsigned, {EPILOGUE}) -> Tensor",
    reference,
    lambda x, codes, *_: linear_output(x, codes.shape[1]),
)


def _short(scale: torch.Tensor) -> torch.Tensor:
    """Scales rounded to 22 significant bits."""
    return ((scale.contiguous().view(torch.int32) + 2) & -4).view(torch.float32)


def _shifted(attributes: Mapping[str, Any]) -> bool:
    """Whether activation codes are stored less 128."""
    return bool(attributes["unsigned"]) and attributes["activation_bits"] == 8


class LinearSvd(GpuOp):
    """Weights by groups of columns, so that what a block reads in a step is one run of bytes."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Groups and ranks beyond the tiles, sums beyond 2^22."""
        a: Any = layer.attributes
        if a["bits"] not in (4, 8):
            return f"weights of {a['bits']} bits; 4 and 8 are multiplied"
        if a["group"] not in GROUPS:
            return f"groups of {a['group']} columns; {', '.join(map(str, GROUPS))} are multiplied"
        if _shifted(a) and a["group"] > 128:
            return f"unsigned activations of 8 bits in groups of {a['group']} columns; up to 128 are multiplied"
        if not 2 <= a["activation_bits"] <= 8 and a["activation_bits"] != FLOAT_BITS:
            return f"activations of {a['activation_bits']} bits; 2 to 8 and 16 are taken"
        if layer.tensors["down"].shape[0] > RANK:
            return f"a branch of rank {layer.tensors['down'].shape[0]}; up to {RANK} is taken"
        return None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """The layout above."""
        a: Any = layer.attributes
        t, bits, group = layer.tensors, int(a["bits"]), int(a["group"])
        split = packing.unpack(t["codes"], bits, group).unflatten(1, (-1, group))  # (out, groups, group)
        signed = (split.to(torch.int16) - (1 << (bits - 1))).to(torch.int8).transpose(0, 1)  # (groups, out, group)
        if bits == 4:
            low, high = signed.chunk(2, 2)
            signed = (low & 15) | (high << 4)
        rank = t["down"].shape[0]
        more = max(LEAST_RANK, 1 << (rank - 1).bit_length()) - rank if rank else 0
        tensors = {
            "codes": signed.contiguous(),
            "scale": _short(t["scale"].float().T / (16 if bits == 4 else 1)),
        }
        if _shifted(a):
            tensors["offset"] = (128 * values(tensors["codes"], bits).sum(2)).to(torch.int32)
        tensors |= {
            "smooth": t["smooth"].float().contiguous(),
            "down": F.pad(t["down"].half(), (0, 0, 0, more)),
            "up": F.pad(t["up"].half(), (0, more)),
        }
        return Packed(tensors, {n: a[n] for n in ("bits", "group", "activation_bits", "shift", "unsigned")})
