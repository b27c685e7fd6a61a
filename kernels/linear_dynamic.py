"""Integer matrix products with activations quantized while the model runs: `planish::linear_dynamic` (W8A8, W4A8, W4A4).

Weights are symmetric, of 8 or 4 bits, with one scale for every group of `group` columns of a row (`group` = in: one for each row):

    W[o, i] = (code[o, i] - 2^(bits - 1)) * scale[o, i // group]

Activations are quantized as `activation_group` says, all in float32, rounding half to even:

    -1   per tensor, 8 bits, as ONNX's DynamicQuantizeLinear: with low = min(0, min x), high = max(0, max x)
         s = (high - low) / 255,  z = round(clamp(-low / s, 0, 255)),  X = (clamp(round(x / s) + z, 0, 255) - z) * s
    0    per token, symmetric in `activation_bits` = a: s = max |x| / (2^(a-1) - 1) over a row,  X = round(x / s) * s
    > 0  the same over each `activation_group` columns of a row

Where all of x is zero, s is 1. The result is y = X W^T + bias; the sums of products of codes are integers and exact, so a runtime may
differ from the reference by float32 rounding only, and by one code where x / s falls on a tie and the runtime multiplies by 1 / s.
`codes` (out, groups, bytes) is packed as in packing.py.
"""

from __future__ import annotations

import torch

from .fused import linear_output, register
from .linear_wna16 import dequantize

PER_TENSOR = -1
PER_TOKEN = 0


def quantized(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """X: the real values that activations x (..., in) float32 have after quantization to `bits`; same shape."""
    if group == PER_TENSOR:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = torch.where(high > low, (high - low) / 255, 1.0)
        zero = torch.round((-low / scale).clamp(0, 255))
        return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale
    split = x.unflatten(-1, (-1, group)) if group > 0 else x  # (..., in // group, group)
    top = float((1 << (bits - 1)) - 1)
    scale = split.abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, 1.0)
    restored = torch.round(split / scale).clamp(-top, top) * scale
    return restored.reshape(x.shape)


def linear_dynamic(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    activation_bits: int,
    activation_group: int,
) -> torch.Tensor:
    """Output y (..., out) float32: the definition."""
    weight = dequantize(codes, scale, None, bits, group)
    return torch.nn.functional.linear(quantized(x, activation_bits, activation_group), weight, bias)


register(
    "linear_dynamic(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int bits, int group, int activation_bits,"
    " int activation_group) -> Tensor",
    linear_dynamic,
    lambda x, codes, scale, bias, bits, group, activation_bits, activation_group: linear_output(x, codes.shape[0]),
)
