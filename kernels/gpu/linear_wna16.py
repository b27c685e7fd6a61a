"""Weight-only quantization on a GPU: words in the order of tensor cores (shuffle.py), x in 16 bits, sums in float32.

    W[o, i] = (code[o, i] - zero[o, i // group]) * scale[o, i // group] * row[o]        y = epilogue(x W^T)

codes     (out / 16, in / KT, 32, 4) int32, KT = 256 / bits; bits is 8, 4 or 2. Codes of 3 bits are stored in 4. Columns are padded to a
          multiple of 128, rows to 16 (x is masked there)
scale     (out / 16, groups, 8) int32, two float16 a word: the layer's scale / row
zero      likewise the zero points, absent where each is 2^(bits - 1); `fraction` says whether any lies between codes
row       (out,) float32, a power of two for each output, so that float16 has the range for the scales of a row: the largest of them is
          stored as 32 to 64
group     a multiple of 128, or 64, 32 or 16. Another multiple of 16 is stored as its greatest common divisor with 128, scales repeated

Numbers. The reference takes W in float32 from what is stored. Against the float64 value of the layer, with S = |x| |W|^T and Z = |x| (|scale| |zero|)^T,
u = 2^-11 for float16 and 2^-8 for bfloat16, and v = 2^-24 the rounding of float32:

    |y - y64| <= (2^-11 + 3 u + in 2^-22) S + (2^-11 + in 2^-22) Z + u |y|

2^-11: the rounding of scales and zero points to float16. 3 u: of zero points between codes, of scales and of scaled weights to the
type of x; it falls away where zero points are whole and scales apply to the sums of groups. in 2^-22: float32 sums of tensor cores, which
cut rather than round. For x in float32 W is dequantized to float32 and the product is torch's.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from .. import packing
from . import shuffle
from .core import Core
from .op import EPILOGUE, GpuOp, Layer, Packed, epilogue, linear_output, register

ZERO_LIMIT = 112
"""largest magnitude of a zero point: offset + zero point stays exact in bfloat16 (codes of 8 bits: any)"""


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, row: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """W (out, in padded) float32 of what is stored."""
    values = shuffle.unshuffle(codes, bits).float()  # (out padded, in padded)
    at = torch.arange(values.shape[1]) // group
    middle = float(1 << (bits - 1)) if zero is None else shuffle.unhalve(zero)[:, at]
    return ((values - middle) * shuffle.unhalve(scale)[:, at])[: len(row)] * row[:, None]


def reference(
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
    """(..., in) -> (..., out) in the type of x."""
    weight = dequantize(codes, scale, zero, row, bits, group)[:, : x.shape[-1]]
    return epilogue(F.linear(x.float(), weight), bias, factor, residual, activation, x.dtype)


register(
    f"gpu_linear_wna16(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor row, int bits, int group, bool fraction, {EPILOGUE})"
    " -> Tensor",
    reference,
    lambda x, codes, scale, zero, row, *_: linear_output(x, row.shape[0]),
)


def stored_group(group: int, inputs: int) -> int:
    """The group that is stored for groups of `group` columns: 16 or more where the layer is taken."""
    if group == inputs:
        return inputs + -inputs % shuffle.STEP  # what pads the columns may share the scale
    return group if group % shuffle.STEP == 0 else math.gcd(group, shuffle.STEP)


def spread(values: torch.Tensor, group: int, inputs: int) -> torch.Tensor:
    """Values (out, groups) for the stored groups: (out, stored groups), the last ones repeated over what pads the columns."""
    stored = stored_group(group, inputs)
    count = -(-(inputs + -inputs % shuffle.STEP) // stored)
    at = (torch.arange(count) * stored // group).clamp_max(values.shape[1] - 1)
    return values[:, at]


def row_factor(scale: torch.Tensor, power: int = 6) -> torch.Tensor:
    """(out,) float32 powers of two: scale / factor (out, groups) is below 2^power, and at least half of it where it is largest."""
    _, exponent = torch.frexp(scale.float().abs().amax(1))  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones(len(scale)), (exponent - power).clamp_min(-126))


class LinearWna16(GpuOp):
    """Any group that is a multiple of 16, any number of outputs."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Groups that are no multiple of 16, zero points far outside the codes."""
        bits, group = int(layer.attributes["bits"]), int(layer.attributes["group"])
        inputs = layer.tensors["codes"].shape[1] * group
        if bits not in packing.BITS:
            return f"weights of {bits} bits; {', '.join(map(str, packing.BITS))} are taken"
        if stored_group(group, inputs) < 16:
            return f"groups of {group} columns; multiples of 16 are taken, or one group a row"
        zero = layer.tensors.get("zero_point")
        if zero is not None and zero.numel() and bits < 8 and float(zero.float().abs().max()) > ZERO_LIMIT:
            return f"a zero point of {float(zero.float().abs().max()):g}; up to {ZERO_LIMIT} is taken"
        return None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """The layout above."""
        t, bits, group = layer.tensors, int(layer.attributes["bits"]), int(layer.attributes["group"])
        codes = packing.unpack(t["codes"], bits, group)  # (out, in)
        inputs, zero = codes.shape[1], t.get("zero_point")
        if bits == 3:
            codes = codes + (0 if zero is not None else 4)  # the middle of the stored width
        width = 4 if bits == 3 else bits
        row = row_factor(t["scale"])
        tensors = {
            "codes": shuffle.shuffle(codes, width),
            "scale": shuffle.halves(spread(t["scale"].float() / row[:, None], group, inputs)),
            "row": row,
        }
        fraction = False
        if zero is not None:
            tensors["zero"] = shuffle.halves(spread(zero.float(), group, inputs))
            fraction = bool((zero.float() != zero.float().round()).any())
        return Packed(tensors, {"bits": width, "group": stored_group(group, inputs), "fraction": fraction})
