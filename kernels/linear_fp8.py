"""`planish::linear_fp8`: a linear layer whose weights are 8-bit floats, and whose activations may be.

    y = x W^T + bias                          activations "none"
    y = (q(x / s) W^T) s + bias               else; s of each token = its largest magnitude / MAX, q to the nearest 8-bit float

codes        (out, in) uint8: the bits of the 8-bit floats;  W = value of the code * scale of its row
scale        (out,) float32
format       e4m3: E4M3FN, largest 448, no infinity; e5m2: largest 57344 (Micikevicius et al. 2022, table 1)
activations  none, e4m3 or e5m2

Rounding is to nearest, ties to even, and saturates at the largest finite value. ONNX Runtime's CPU has no 8-bit float product: it
dequantizes the weight in every call; the stored weight keeps 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from onnx import TensorProto

from .fused import Builder, Call, Fused, linear_output, register
from .unfolded import shared

Name = Literal["e4m3", "e5m2"]
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ONNX = {"e4m3": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2}
MAX = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()}
LEAST = float(torch.finfo(torch.float32).tiny)
"""of a scale, so that a token of zeros divides by something"""


def encode(weight: torch.Tensor, name: Name) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (out, in) uint8, scale (out,) float32): each row's largest magnitude becomes the largest value of the format."""
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, (largest / MAX[name]).clamp_min(LEAST), 1.0)
    return to_float8(weight / scale[:, None], name).view(torch.uint8), scale


def decode(codes: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
    """The weight (out, in) float32."""
    return codes.view(DTYPES[name]).float() * scale[:, None]


def to_float8(x: torch.Tensor, name: str) -> torch.Tensor:
    """The nearest 8-bit floats, ties to even, saturating."""
    return x.clamp(-MAX[name], MAX[name]).to(DTYPES[name])


def linear_fp8(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, format: str, activations: str
) -> torch.Tensor:
    """The reference: (..., in) -> (..., out) float32."""
    weight = decode(codes, scale, format)
    if activations == "none":
        return torch.nn.functional.linear(x, weight, bias)
    step = (x.abs().amax(-1, keepdim=True) / MAX[activations]).clamp_min(LEAST)  # (..., 1)
    y = torch.nn.functional.linear(to_float8(x / step, activations).float(), weight) * step
    return y if bias is None else y + bias


register(
    "linear_fp8(Tensor x, Tensor codes, Tensor scale, Tensor? bias, str format, str activations) -> Tensor",
    linear_fp8,
    lambda x, codes, *_: linear_output(x, codes.shape[0]),
)


class LinearFp8(Fused):
    """DequantizeLinear of an 8-bit float constant, which ONNX Runtime does not fold, and a float product."""

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """The name of y."""
        t, name = call.tensors, call.name
        form, activations = str(call.attributes["format"]), str(call.attributes["activations"])
        turned = np.ascontiguousarray(graph.value(t["codes"]).T)  # (in, out)
        constant = TensorProto(data_type=ONNX[form], dims=turned.shape, raw_data=turned.tobytes())
        stored = graph.constant(f"{name}.weight_{form}", constant)
        weight = graph.one("DequantizeLinear", [stored, t["scale"]], f"{name}.weight", axis=1)
        if activations == "none":
            y = graph.one("MatMul", [t["x"], weight], name)
        else:
            step = self._step(call, graph, activations)
            scaled = graph.one("Div", [t["x"], step], f"{name}.scaled")
            small = graph.one("Cast", [scaled], f"{name}.float8", to=ONNX[activations], saturate=1)
            rounded = graph.one("Cast", [small], f"{name}.rounded", to=TensorProto.FLOAT)
            y = graph.one("Mul", [graph.one("MatMul", [rounded, weight], name), step], f"{name}.y")
        if "bias" in t:
            y = graph.one("Add", [y, t["bias"]], f"{name}.biased")
        return [y]

    @staticmethod
    def _step(call: Call, graph: Builder, activations: str) -> str:
        """(..., 1): the scale of each token."""
        last = shared(graph, "planish.last_axis", np.array([-1]))
        limit = shared(graph, f"planish.largest_{activations}", np.array(MAX[activations], np.float32))
        least = shared(graph, "planish.least_scale", np.array(LEAST, np.float32))
        largest = graph.one(
            "ReduceMax", [graph.one("Abs", [call.tensors["x"]], f"{call.name}.abs"), last], f"{call.name}.largest"
        )
        return graph.one("Max", [graph.one("Div", [largest, limit], f"{call.name}.range"), least], f"{call.name}.step")

    def slow(self, call: Call) -> str | None:
        """Every call decodes the weight."""
        return (
            "8-bit floats: ONNX Runtime dequantizes the whole weight in every call (it stays 8-bit in memory); "
            "int8 (w8-dynamic) is as small and fast"
        )
