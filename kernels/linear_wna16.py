"""Weight-only quantization: `planish::linear_wna16`, codes of 8, 4, 3 or 2 bits with a scale and a zero point for every group.

    W[o, i] = (code[o, i] - zero_point[o, i // group]) * scale[o, i // group]
    y       = x W^T + bias

x (..., in) stays in float. `codes` (out, groups, bytes) is packed as in packing.py. `zero_point` (out, groups) is uint8 codes, or
float32 where the method places it between codes (HQQ); when it is absent it is 2^(bits - 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import matmul_nbits, packing
from .fused import Builder, Call, Fused, linear_output, register
from .matmul_nbits import Weight


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, group: int
) -> torch.Tensor:
    """W (out, in) float32 of packed codes (out, groups, bytes), scale (out, groups), zero point (out, groups) or None."""
    split = packing.unpack(codes, bits, group).unflatten(1, (-1, group)).float()  # (out, groups, group)
    zero = float(1 << (bits - 1)) if zero_point is None else zero_point.float()[..., None]
    return ((split - zero) * scale[..., None]).flatten(1)


def linear_wna16(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
) -> torch.Tensor:
    """Output y (..., out) float32: the definition."""
    return torch.nn.functional.linear(x, dequantize(codes, scale, zero_point, bits, group), bias)


register(
    "linear_wna16(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, int group) -> Tensor",
    linear_wna16,
    lambda x, codes, scale, zero_point, bias, bits, group: linear_output(x, codes.shape[0]),
)


class LinearWna16(Fused):
    """One MatMulNBits; matmul_nbits.py says how each width and group is written. Its accuracy level is chosen by export/accuracy.py."""

    domains = ("", matmul_nbits.DOMAIN)

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Equal to the reference within float32 rounding at accuracy level 0."""
        bits, group = call.attributes["bits"], call.attributes["group"]
        codes = packing.unpack(torch.from_numpy(graph.value(call.tensors["codes"]).copy()), bits, group).numpy()
        zero, rest = None, None
        if "zero_point" in call.tensors:
            zero = graph.value(call.tensors["zero_point"])
            if zero.dtype != np.uint8:
                whole = np.clip(np.rint(zero), 0, (1 << bits) - 1).astype(np.uint8)
                zero, rest = whole, zero - whole.astype(np.float32)
        weight = Weight(bits, codes, graph.value(call.tensors["scale"]), zero)
        return [
            matmul_nbits.write(graph, call.name, call.tensors["x"], weight, call.tensors.get("bias"), zero_rest=rest)
        ]
