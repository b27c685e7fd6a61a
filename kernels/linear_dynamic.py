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

In ONNX there are three forms:

- 8-bit weights with one scale a row: MatMulInteger of uint8 activations and int8 weights. Per tensor it stands behind
  DynamicQuantizeLinear, which ONNX Runtime fuses to one kernel; per token the activations are rounded by standard ops and moved by 128,
  since uint8 x int8 is the fast product on x86. Without VNNI instructions (before 2019) that product saturates where two products of
  neighbours exceed 16 bits: there, keep weights within -64 .. 63.
- activations of 8 bits in groups that are blocks of MatMulNBits and divide the weight's groups: MatMulNBits at accuracy level 4, which
  rounds its input just so.
- all else: activations rounded by standard ops, then MatMulNBits on the rounded values. ONNX Runtime has no product of 4-bit
  activations; what is saved is the weight's memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto

from . import matmul_nbits, packing
from .fused import Builder, Call, Fused, linear_output, register
from .linear_wna16 import dequantize
from .matmul_nbits import Weight

PER_TENSOR = -1
PER_TOKEN = 0
ROUNDING = "rounding its activations in ops of their own costs more time than its small product saves"
SMALL, SMALL_IN_FLOAT = 150_000, 600_000
"""weights of a layer below which that holds (measured on x86): before MatMulInteger, and before MatMulNBits"""


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


class LinearDynamic(Fused):
    """MatMulInteger or MatMulNBits; the docstring of this file says which."""

    domains = ("", matmul_nbits.DOMAIN)

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Equal to the reference within float32 rounding, and one activation code where x / s falls on a tie."""
        bits, group = call.attributes["bits"], call.attributes["group"]
        activation_bits, activation_group = call.attributes["activation_bits"], call.attributes["activation_group"]
        name, x, bias = call.name, call.tensors["x"], call.tensors.get("bias")
        codes = packing.unpack(torch.from_numpy(graph.value(call.tensors["codes"]).copy()), bits, group).numpy()
        scale = graph.value(call.tensors["scale"])  # (out, groups)
        if activation_group == codes.shape[1]:
            activation_group = PER_TOKEN
        if bits == 8 and scale.shape[1] == 1 and activation_group <= PER_TOKEN:
            moved = (codes.astype(np.int16) - 128).astype(np.int8)
            return [_integer(graph, name, x, moved, scale[:, 0], bias, activation_bits, activation_group)]
        weight = Weight(bits, codes, scale)
        if activation_bits == 8 and _in_blocks(bits, group, activation_group):
            return [matmul_nbits.write(graph, name, x, weight, bias, matmul_nbits.INT8, activation_group)]
        x = rounded(graph, name, x, activation_bits, activation_group, codes.shape[1])
        if codes.size < SMALL_IN_FLOAT:
            graph.note(name, ROUNDING)
        return [matmul_nbits.write(graph, name, x, weight, bias)]


def _in_blocks(bits: int, group: int, activation_group: int) -> bool:
    """Whether MatMulNBits at level 4 rounds activations as asked."""
    return activation_group in matmul_nbits.BLOCKS.get(bits, ()) and group % activation_group == 0


def _integer(
    graph: Builder,
    name: str,
    x: str,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: str | None,
    activation_bits: int,
    activation_group: int,
) -> str:
    """MatMulInteger with int8 `codes` (out, in) and a scale for each row, (out,)."""
    weight = graph.constant(f"{name}.weight_int8", np.ascontiguousarray(codes.T))  # (in, out)
    weight_scale = graph.constant(f"{name}.weight_scales", scale)
    if activation_group == PER_TENSOR:
        rounded, step, zero = graph.add("DynamicQuantizeLinear", [x], f"{name}.input", outputs=3)
    else:
        if codes.size < SMALL:
            graph.note(name, ROUNDING)
        codes_of_x, step = signed(graph, name, x, activation_bits)  # (..., in), (..., 1)
        shift = graph.constant(f"{name}.input_shift", np.array(128, np.float32))
        moved = graph.one("Add", [codes_of_x, shift], f"{name}.input_moved")
        rounded = graph.one("Cast", [moved], f"{name}.input", to=TensorProto.UINT8)
        zero = graph.constant(f"{name}.input_zero_point", np.array(128, np.uint8))
    sums = graph.one("MatMulInteger", [rounded, weight, zero], name)
    sums = graph.one("Cast", [sums], f"{name}.sums", to=TensorProto.FLOAT)
    if activation_group == PER_TENSOR:  # in this order ONNX Runtime fuses all of it
        y = graph.one("Mul", [sums, graph.one("Mul", [step, weight_scale], f"{name}.scales")], f"{name}.scaled")
    else:  # in that order it would fuse too, and take the first token's scale for all of them
        y = graph.one("Mul", [graph.one("Mul", [sums, step], f"{name}.in_units"), weight_scale], f"{name}.scaled")
    return y if bias is None else graph.one("Add", [y, bias], f"{name}.biased")


def signed(graph: Builder, name: str, x: str, bits: int) -> tuple[str, str]:
    """Codes (..., n) of x (..., n), symmetric over the last axis, as float, and their scale (..., 1)."""
    axis = graph.constant(f"{name}.last", np.array([-1], np.int64))
    top = graph.constant(f"{name}.top", np.array((1 << (bits - 1)) - 1, np.float32))
    zero, one = (graph.constant(f"{name}.{n}", np.array(v, np.float32)) for n, v in (("zero", 0), ("one", 1)))
    largest = graph.one("ReduceMax", [graph.one("Abs", [x], f"{name}.abs"), axis], f"{name}.largest", keepdims=1)
    step = graph.one("Div", [largest, top], f"{name}.step")
    step = graph.one("Where", [graph.one("Greater", [step, zero], f"{name}.any"), step, one], f"{name}.input_scale")
    return graph.one("Round", [graph.one("Div", [x, step], f"{name}.ratio")], f"{name}.input_codes"), step


def rounded(graph: Builder, name: str, x: str, bits: int, group: int, channels: int) -> str:
    """The real values X (..., in) that x (..., in) has after quantization."""
    if group == PER_TENSOR:
        parts = graph.add("DynamicQuantizeLinear", [x], f"{name}.input", outputs=3)
        return graph.one("DequantizeLinear", parts, f"{name}.rounded")
    split = matmul_nbits.split_groups(graph, name, x, channels // group) if group > 0 else x
    values = graph.one("Mul", list(signed(graph, name, split, bits)), f"{name}.rounded")
    if group == PER_TOKEN:
        return values
    return graph.one("Reshape", [values, graph.one("Shape", [x], f"{name}.shape")], f"{name}.whole")
