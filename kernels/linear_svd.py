"""SVDQuant, Li et al. 2024: `planish::linear_svd`, few-bit weights and activations with a low-rank branch in 16 bits beside them.

    h = x smooth                                             (..., in) float32: channels with outliers made smaller
    y = Q(h + shift smooth) R^T + (h down^T) up^T + bias

`smooth` (in,) float32 is 1 / lambda of the paper; down (r, in) and up (out, r) are float16 and multiplied in float32; r may be 0.
R (out, in) has symmetric codes of `bits` (4 or 8), `group` columns of a row sharing a scale: R = (code - 2^(bits - 1)) * scale with codes
(out, groups, bytes) packed as in packing.py and scale (out, groups) float32. The last group of a row may be short; it is filled up with zeros,
and h with it, so every number of columns goes with every group.

Q rounds activations per token and group, symmetric, to `activation_bits` (16: not at all). `unsigned` is for inputs that are bounded below, such as
what follows a GELU: with h + shift smooth >= 0 all 2^bits codes 0..2^bits - 1 serve, scale max / (2^bits - 1); what is below 0 becomes 0. The
caller subtracts the product of R and the shift from the bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto
from torch.nn import functional as F

from . import linear_dynamic, matmul_nbits, packing
from .fused import Builder, Call, Fused, linear_output, register
from .linear_wna16 import dequantize
from .matmul_nbits import Weight

FLOAT_BITS = 16
"""activation_bits of activations that stay as they are"""


def quantize_residual(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (out, groups, bytes) and scale (out, groups) of R (out, in), rounded to nearest: -7..7 for 4 bits, absmax / 7."""
    split = padded(weight, group).unflatten(1, (-1, group))  # (out, groups, group)
    top = (1 << (bits - 1)) - 1
    scale = split.abs().amax(2) / top
    scale = torch.where(scale > 0, scale, 1.0)
    codes = torch.round(split / scale[..., None]).clamp_(-top, top) + (top + 1)
    return packing.pack(codes.flatten(1).to(torch.uint8), bits, group), scale


def padded(x: torch.Tensor, group: int) -> torch.Tensor:
    """The input x (..., n) with zeros up to a multiple of `group`."""
    return F.pad(x, (0, -x.shape[-1] % group))


def quantized(h: torch.Tensor, bits: int, group: int, unsigned: bool) -> torch.Tensor:
    """Q(h) of h (..., in), filled up to whole groups: (..., groups * group) float32."""
    wide = padded(h, group)
    if bits == FLOAT_BITS:
        return wide
    if unsigned:  # non-negative values of a symmetric grid with one bit more
        return linear_dynamic.quantized(wide.clamp_min(0), bits + 1, group)
    return linear_dynamic.quantized(wide, bits, group)


def linear_svd(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    smooth: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    activation_bits: int,
    shift: float,
    unsigned: bool,
) -> torch.Tensor:
    """Output y (..., out) float32: the definition."""
    h = x * smooth
    activations = quantized((x + shift) * smooth if shift else h, activation_bits, group, unsigned)
    y = F.linear(activations, dequantize(codes, scale, None, bits, group), bias)
    return y + (h @ down.float().T) @ up.float().T


register(
    "linear_svd(Tensor x, Tensor codes, Tensor scale, Tensor smooth, Tensor down, Tensor up, Tensor? bias, int bits, int group,"
    " int activation_bits, float shift, bool unsigned) -> Tensor",
    linear_svd,
    lambda x, codes, scale, smooth, down, up, bias, bits, group, activation_bits, shift, unsigned: linear_output(
        x, codes.shape[0]
    ),
)


class LinearSvd(Fused):
    """ONNX: activations rounded by standard ops, MatMulNBits for the residual, two thin products beside it.

    8-bit signed activations in groups that MatMulNBits takes are rounded by it (accuracy level 4). ONNX Runtime widens the
    float16 matrices of the branch once; the residual stays packed. Layers that read one tensor share `smooth` and `down`, and ONNX Runtime
    merges their equal nodes.
    """

    domains = ("", matmul_nbits.DOMAIN)

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Equal to the reference within float32 rounding, and one activation code where a quotient falls on a tie."""
        name, tensors, attributes = call.name, call.tensors, call.attributes
        bits, group, activation_bits = (int(attributes[n]) for n in ("bits", "group", "activation_bits"))
        shift, unsigned = float(attributes["shift"]), bool(attributes["unsigned"])
        codes = packing.unpack(torch.from_numpy(graph.value(tensors["codes"]).copy()), bits, group).numpy()
        weight = Weight(bits, codes, graph.value(tensors["scale"]))
        channels = graph.value(tensors["smooth"]).shape[0]

        smoothed = graph.one("Mul", [tensors["x"], tensors["smooth"]], f"{name}.smoothed")
        h = smoothed
        if shift:
            moved = graph.one("Add", [tensors["x"], graph.constant(f"{name}.shift", np.array(shift, np.float32))], f"{name}.moved")  # fmt: skip
            h = graph.one("Mul", [moved, tensors["smooth"]], f"{name}.positive")
        if codes.shape[1] > channels:
            amount = graph.constant(f"{name}.filling", np.array([0, codes.shape[1] - channels], np.int64))
            last = graph.constant(f"{name}.last_axis", np.array([-1], np.int64))
            h = graph.one("Pad", [h, amount, "", last], f"{name}.whole_groups")
        level = matmul_nbits.FLOAT
        if activation_bits == 8 and not unsigned and group in matmul_nbits.BLOCKS[bits]:
            level = matmul_nbits.INT8
        elif activation_bits < FLOAT_BITS:
            h = graph.one("Relu", [h], f"{name}.clamped") if unsigned else h
            h = linear_dynamic.rounded(graph, name, h, activation_bits + unsigned, group, codes.shape[1])
        y = matmul_nbits.write(graph, name, h, weight, tensors.get("bias"), level, group if level else None)
        rank = graph.value(tensors["down"]).shape[0]
        if not rank:
            return [y]
        down, up = (self._wide(graph, tensors[n], f"{name}.{n}") for n in ("down", "up"))
        thin = graph.one("MatMul", [smoothed, down], f"{name}.thin")  # (..., r)
        return [graph.one("Add", [y, graph.one("MatMul", [thin, up], f"{name}.branch")], f"{name}.sum")]

    def _wide(self, graph: Builder, stored: str, name: str) -> str:
        """The transpose of a stored float16 matrix, as float32 when it is used."""
        matrix = graph.constant(name, np.ascontiguousarray(graph.value(stored).T))
        if graph.value(matrix).dtype != np.float16:
            return matrix
        return graph.one("Cast", [matrix], f"{name}.wide", to=TensorProto.FLOAT)
