"""Outlier-victim pairs on a GPU (OliVe; kernels/outlier_victim.py has the formats): codes stay packed in memory and are decoded in registers.

    1  x to two planes, the even columns and the odd ones, the left and right elements of pairs: rounded to pairs in units of x_scale, or as
       they are where x_scale is absent
    2  y = product of the planes with the left and the right values of the weight's pairs, scaled, then the epilogue

Stored, with `half` = in / 2 filled up with zeros to a multiple of 64:

    codes    4 bits: (out, half) uint8, the left code in the low half of each byte; 8 bits: (out, 2, half) uint8, left codes, then right ones
    scale    (out,) float32, times x_scale where there is one
    x_scale  () float32 or None

int4 in weights and activations: values fit int8 (up to 96), the product runs on int8 tensor cores and is exact. Every other mixture runs on
16-bit ones: flint4 (up to 192) and int8 pairs (7 bits up to 127, beyond it 4 significant bits up to 2^15) are exact in float16 and in
bfloat16; both sides are float16 where x is rounded to pairs, else the type of x (float32 rounded to TF32).

Numbers. Pairs of x are those of the definition, x / x_scale being divided exactly. y is within half a unit of its type and

    2^-22 |y|                          int4 both
    (in + 8) 2^-23 S                   else, S = sum of |products|; a further 2^-11 S for float32 x that stays in float

of the float64 value.

Cost: a pair of int4 takes about 33 instructions for four bytes, 4 for a weight, beside one for the conversion of a weight to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ...common.errors import PlanishError
from ..outlier_victim import codec
from .core import Core
from .op import EPILOGUE, GpuOp, Layer, Packed, epilogue, linear_output, register
from .tf32 import rounded

STEP = 64
"""pairs that rows are filled up to a multiple of: the kernel's step"""


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    bits: int,
    grid: str,
    x_bits: int,
    x_grid: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x."""
    form, k = codec(bits, grid), x.shape[-1]
    stored = codes if bits == 4 else codes.transpose(1, 2).flatten(1)
    values = form.decode(form.read(stored))[:, :k]  # (out, in)
    if x_scale is None:
        left = rounded(x) if x.dtype == torch.float32 else x.float()
    else:
        left = codec(x_bits, x_grid).round_trip(x.float() / x_scale)
    y = F.linear(left.double(), values.double()).float() * scale
    return epilogue(y, bias, factor, residual, activation, x.dtype)


register(
    "gpu_linear_ovp(Tensor x, Tensor codes, Tensor scale, Tensor? x_scale, int bits, str grid, int x_bits, str x_grid,"
    f" {EPILOGUE}) -> Tensor",
    reference,
    lambda x, codes, *_: linear_output(x, codes.shape[0]),
)


class LinearOvp(GpuOp):
    """Codes as they are, rows filled up; 8-bit codes with the elements of pairs apart."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Formats that are not known."""
        a: Any = layer.attributes
        try:
            codec(a["bits"], a["grid"])
            if "x_scale" in layer.tensors:
                codec(a["x_bits"], a["x_grid"])
        except PlanishError as error:
            return str(error)
        return None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """The layout above."""
        t, a = layer.tensors, layer.attributes
        codes = t["codes"]
        if a["bits"] == 8:
            codes = codes.unflatten(1, (-1, 2)).transpose(1, 2)  # (out, 2, in / 2)
        scale = t["scale"].float()
        tensors = {"codes": F.pad(codes, (0, -codes.shape[-1] % STEP)).contiguous()}
        if "x_scale" in t:
            tensors["x_scale"] = t["x_scale"].float().reshape(())
            scale = tensors["x_scale"] * scale
        tensors["scale"] = scale.contiguous()
        return Packed(tensors, {n: a[n] for n in ("bits", "grid", "x_bits", "x_grid")})
