"""What the ops' `parse` functions share: reading a FloatOp and refusing what no kernel takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import integer
from .op import Array, Constant, FloatOp, Tensor, Unsupported, activations


def data(node: FloatOp) -> Tensor:
    """The first input, which must be an activation."""
    x = node.inputs[0] if node.inputs else None
    if not isinstance(x, Tensor):
        raise Unsupported("its first input is a constant")
    return x


def only(node: FloatOp) -> Tensor:
    """The one activation of an op that takes no other."""
    x = data(node)
    if len(activations(node.inputs)) > 1:
        raise Unsupported(f"it has {len(activations(node.inputs))} activation inputs; one is supported")
    return x


def constant(node: FloatOp, index: int) -> Array | None:
    """Values of the plain (not quantized) constant input `index`, None when the input is absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if not isinstance(value, Constant):
        raise Unsupported(f"input {index} is computed; a constant is supported")
    if value.scale is None:
        return np.asarray(value.values)
    if value.scale.size != 1 or value.zero_point is None:
        raise Unsupported(f"input {index} is quantized per channel; one scale is supported")
    return (value.values.astype(np.float32) - np.float32(value.zero_point.flat[0])) * value.scale.flat[0]


def integers(node: FloatOp, name: str, index: int) -> list[int] | None:
    """A list of integers that older opsets keep in attribute `name` and newer ones in input `index`; None if absent."""
    found = constant(node, index)
    if found is None:
        found = node.attributes.get(name)
    return None if found is None else [int(v) for v in np.atleast_1d(np.asarray(found))]


def clamp(node: FloatOp, low: float = -np.inf, high: float = np.inf) -> dict[str, int]:
    """Attributes low, high: the output codes that the fused Relu or Clip of `node` (and low, high) leave."""
    first, last = integer.clamp_codes(node.output, max(node.low, low), min(node.high, high))
    return {"low": first, "high": last}


def tables(node: FloatOp, low: float = -np.inf, high: float = np.inf) -> Mapping[str, Array]:
    """Constants of an op that only moves codes: {'table': (256,)} when input and output differ in quantization."""
    bounds = clamp(node, low, high)
    entries = integer.rescale_table(data(node), node.output, bounds["low"], bounds["high"])
    return {} if entries is None else {"table": entries}


def four(tensor: Tensor, what: str) -> tuple[int, int, int, int]:
    """Shape (1, channels, height, width) of a two-dimensional image tensor."""
    if len(tensor.shape) != 4:
        raise Unsupported(
            f"{what} has {len(tensor.shape)} dimensions; 4 (batch, channels, height, width) are supported"
        )
    return tensor.shape[0], tensor.shape[1], tensor.shape[2], tensor.shape[3]


def axis(node: FloatOp, rank: int, default: int) -> int:
    """Attribute `axis` counted from the front."""
    value = int(node.attributes.get("axis", default))
    if not -rank <= value < rank:
        raise Unsupported(f"axis {value} of a tensor with {rank} dimensions")
    return value % rank


def flag(attributes: Mapping[str, Any], name: str, default: int = 0) -> bool:
    """An ONNX attribute that is 0 or 1."""
    return bool(attributes.get(name, default))
