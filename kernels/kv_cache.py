"""Keys and values as a cache of 8 bits gives them back: `planish::kv_cache`, the way into the cache and out again.

x and y (batch, heads, tokens, size). Each token of each head has a scale of its own, float32:

    int8   s = max |x| / 127;     y = round(x / s) s, half to even
    e4m3   s = max |x| / 448;     y = q(x / s) s, q to the nearest E4M3FN float, ties to even

s is at least 2^-126, so that zeros divide by something.

So what is stored for a token is known when the token is, and never changes: a graph that rounds new keys and values before they join
the past gives exactly the numbers of a cache that holds codes and scales, `encode` and `decode`. Such a cache takes (size + 4) / (2 size)
of one of 16 bits. The grid is that of KIVI's values (Liu et al. 2024), a head being a group; at 8 bits keys need no grid by channel.

A runtime that keeps its cache in codes (kernels/gpu/kv_write.py, attention_decode.py) takes the op's place together with the concatenation; the
others compute it as it stands, and hold their cache in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from onnx import TensorProto

from . import linear_fp8
from .fused import Builder, Call, Fused, register
from .unfolded import shared

Name = Literal["int8", "e4m3"]
FORMATS: tuple[str, ...] = get_args(Name)
TOP = {"int8": 127.0, "e4m3": linear_fp8.MAX["e4m3"]}
"""the largest code"""
SCALE = 4
"""bytes of a scale"""


def encode(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache stores of x (..., size): codes (..., size), int8 or the bits of E4M3 as uint8, and scale (...) float32."""
    x = x.float()
    scale = (x.abs().amax(-1) / TOP[format]).clamp_min(linear_fp8.LEAST)
    ratio = x / scale[..., None]
    if format == "e4m3":
        return linear_fp8.to_float8(ratio, format).view(torch.uint8), scale
    return torch.round(ratio).clamp(-127, 127).to(torch.int8), scale


def decode(codes: torch.Tensor, scale: torch.Tensor, format: str) -> torch.Tensor:
    """The values (..., size) float32 of stored codes (..., size) and scale (...)."""
    values = codes if format == "int8" else codes.view(linear_fp8.DTYPES[format])
    return values.float() * scale[..., None]


def kv_cache(x: torch.Tensor, format: str) -> torch.Tensor:
    """The definition: x (batch, heads, tokens, size) -> the same shape and type."""
    if x.shape[2] == 0:
        return x.clone()
    return decode(*encode(x, format), format).to(x.dtype)


register("kv_cache(Tensor x, str format) -> Tensor", kv_cache, lambda x, format: torch.empty_like(x))


class KvCache(Fused):
    """ONNX: rounded by standard ops; the cache between calls stays float, ONNX Runtime's attention takes no other."""

    def low_bit(self, call: Call) -> bool:
        """Not here: the product with keys and values is one of floats."""
        return False

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Equal to the reference to the bit."""
        x, name, form = call.tensors["x"], call.name, str(call.attributes["format"])
        last = shared(graph, "planish.last_axis", np.array([-1]))
        top = shared(graph, f"planish.largest_{form}", np.array(TOP[form], np.float32))
        least = shared(graph, "planish.least_scale", np.array(linear_fp8.LEAST, np.float32))
        largest = graph.one("ReduceMax", [graph.one("Abs", [x], f"{name}.abs"), last], f"{name}.largest")
        step = graph.one("Max", [graph.one("Div", [largest, top], f"{name}.range"), least], f"{name}.step")
        ratio = graph.one("Div", [x, step], f"{name}.ratio")
        if form == "e4m3":
            small = graph.one("Cast", [ratio], f"{name}.float8", to=TensorProto.FLOAT8E4M3FN, saturate=1)
            codes = graph.one("Cast", [small], f"{name}.codes", to=TensorProto.FLOAT)
        else:
            codes = graph.one("Round", [ratio], f"{name}.codes")
        return [graph.one("Mul", [codes, step], name)]
