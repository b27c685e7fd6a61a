"""8-bit floats on a GPU: weights alone, or activations too with a scale for each token (kernels/linear_fp8.py).

`planish::gpu_linear_fp8` takes x in floats; with activations it quantizes them first (quantize_tokens.py), which may be a node of its own before
`planish::gpu_linear_float8`. Stored:

    weight  (out, columns) uint8: the bits of the 8-bit floats, a row filled up with zeros to a multiple of 128
    scale   (out,) float32

A core multiplies 8-bit floats from sm_89 on; before, activations in 8 bits are refused and weights are decoded beside the product.

Numbers. Weights alone: products of decoded weights, which are exact in 16 bits, with x; sums in float32, in any order:

    within (in + 4) 2^-24 S + half a unit of y's type       S = |x| |W|

of the real product. With activations Hopper's tensor cores keep 13 bits of a sum behind the point at least, over 32 columns at a time:

    within (in / 32 + 4) 2^-13 S + half a unit of y's type  S = |codes| |W| token_scale
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..linear_fp8 import DTYPES as FLOATS
from .core import Core
from .linear_dynamic import DTYPES, FILL, NAMES
from .op import EPILOGUE, GpuOp, Layer, Packed, Split, epilogue, linear_output, register
from .quantize_tokens import WIDEST, gpu_quantize_tokens


def gpu_linear_float8(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    activations: str,
    dtype: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Output y (..., out) of `dtype` for codes (..., columns) uint8, 8-bit floats of format `activations`, and their scale (..., 1)."""
    values = codes.view(FLOATS[activations]).float()
    z = F.linear(values, weight.view(FLOATS[format]).float()) * scale * token_scale
    return epilogue(z, bias, factor, residual, activation, DTYPES[dtype])


def _fake_float8(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    activations: str,
    dtype: str,
    *_: object,
) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=DTYPES[dtype])


register(
    "gpu_linear_float8(Tensor codes, Tensor token_scale, Tensor weight, Tensor scale, str format, str activations, str dtype,"
    f" {EPILOGUE}) -> Tensor",
    gpu_linear_float8,
    _fake_float8,
)


def gpu_linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    activations: str,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Output y (..., out) of x's type for x (..., in) in floats."""
    if activations != "none":
        codes, token_scale, _, _, _ = gpu_quantize_tokens(
            x, None, None, None, None, None, "", 0.0, 0, False, activations, 0, weight.shape[1]
        )
        return gpu_linear_float8(
            codes, token_scale, weight, scale, format, activations, NAMES[x.dtype], bias, factor, residual, activation
        )
    values = weight.view(FLOATS[format])[:, : x.shape[-1]].float()
    return epilogue(F.linear(x.float(), values) * scale, bias, factor, residual, activation, x.dtype)


register(
    f"gpu_linear_fp8(Tensor x, Tensor weight, Tensor scale, str format, str activations, {EPILOGUE}) -> Tensor",
    gpu_linear_fp8,
    lambda x, weight, *_: linear_output(x, weight.shape[0]),
)


class LinearFp8(GpuOp):
    """The node of kernels/linear_fp8.py, and its two halves."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Activations in 8 bits on a core without products of them."""
        if layer.attributes["activations"] == "none":
            return None
        if not core.fp8:
            return f"its activations are 8-bit floats, which {core.name} does not multiply; sm_89 and newer do"
        channels = layer.tensors["codes"].shape[1]
        return f"it has {channels} input channels; at most {WIDEST} are quantized" if channels > WIDEST else None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """See the docstring of this file."""
        codes = layer.tensors["codes"]
        tensors = {
            "weight": F.pad(codes, (0, -codes.shape[1] % FILL)).contiguous(),
            "scale": layer.tensors["scale"].float().contiguous(),
        }
        attributes = {n: str(layer.attributes[n]) for n in ("format", "activations")}
        if attributes["activations"] == "none":
            return Packed(tensors, attributes)
        quantize = {"format": attributes["activations"], "group": 0, "columns": tensors["weight"].shape[1]}
        return Packed(tensors, attributes, Split(quantize, "linear_float8", tensors, attributes))
