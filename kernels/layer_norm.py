"""Layer normalization over the last axis, of n codes c with scale x_scale (the zero point cancels out):

    d_i = n c_i - sum(c)                                    int32: n times the distance from the mean
    v   = n sum(c^2) - sum(c)^2                             exact: n^2 times the variance
    r   = 1 / sqrt(float32(v) + e)                          float32; e = float32(epsilon n^2 / x_scale^2)
    y   = saturate(round_half_even(float32(float32(d_i * r) * gain_i) + shift_i) + y_zp)
    gain = float32(weight / y_scale), shift = float32(bias / y_scale);  float32(v) = float32(v >> 32) 2^32 + float32(v mod 2^32)

Mean and variance are exact; the few float32 operations are rounded once each, the square root too, so every core gives the same codes, with a
floating-point unit or without. They err by a few units in the last place of float32: the code is the one of real arithmetic unless that
lies next to a rounding boundary, where it may be 1 off. ONNX Runtime computes LayerNormalization in float32 between dequantize and
quantize, and is within 1 code for the same reason.
"""

from __future__ import annotations

import math

import numpy as np

from .op import Array, Call, Constant, FloatOp, Node, Op, Tensor, Unsupported
from .parsing import axis, clamp, only

MOST = 1 << 16
"""elements of a row whose sum of squares fits 32 bits"""


class LayerNorm(Op):
    """LayerNormalization with constant scale and bias, along the last axis."""

    onnx_types = ("LayerNormalization",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. Constants gain, shift (n,) float32; attribute epsilon is e."""
        x = only(node)
        rank = len(x.shape)
        if axis(node, rank, -1) != rank - 1:
            raise Unsupported("it normalizes more than the last axis")
        if rank in (1, 4):
            raise Unsupported(f"its input has {rank} dimensions; 2 and 3 are supported")
        size = x.shape[-1]
        if size >= MOST:
            raise Unsupported(f"it normalizes {size} elements; fewer than {MOST} are supported")
        weight, bias = (_vector(node, i, size) for i in (1, 2))
        epsilon = np.float32(float(node.attributes.get("epsilon", 1e-5)) * size**2 / float(x.scale) ** 2)
        if not np.finfo(np.float32).tiny <= epsilon < np.inf:
            raise Unsupported(
                f"its epsilon {node.attributes.get('epsilon')} is {epsilon} in codes; a normal number is supported"
            )
        y_scale = float(node.output.scale)
        if weight is None:
            raise Unsupported("its scale is missing")
        shift = np.zeros(size) if bias is None else bias / y_scale
        constants = {"gain": (weight / y_scale).astype(np.float32), "shift": shift.astype(np.float32)}
        return Node("layer_norm", node.name, (x,), node.output, {"epsilon": epsilon, **clamp(node)}, constants)

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        (x,) = inputs  # (n, ..., size)
        codes = x.astype(np.int64)
        size, total = x.shape[-1], codes.sum(-1, keepdims=True)
        variance = size * (codes * codes).sum(-1, keepdims=True) - total * total
        real = (variance >> 32).astype(np.float32) * np.float32(2**32) + (variance & 0xFFFFFFFF).astype(np.float32)
        inverse = np.float32(1) / np.sqrt(real + node.attributes["epsilon"])  # float32
        y = (size * codes - total).astype(np.float32) * inverse
        y = y * node.constants["gain"] + node.constants["shift"]
        low, high = (node.attributes[k] - node.output.zero_point for k in ("low", "high"))
        return (np.rint(np.clip(y, low, high)) + node.output.zero_point).astype(np.int8)

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        size = node.inputs[0].shape[-1]
        return Call(
            kernel="layer_norm",
            sources=("layer_norm.c",),
            fields={
                "rows": math.prod(node.inputs[0].shape[:-1]),
                "size": size,
                "y_zero_point": node.output.zero_point,
                "low": node.attributes["low"],
                "high": node.attributes["high"],
                "epsilon": float(node.attributes["epsilon"]),
            },
            arrays=dict(node.constants),
            comments={"gain": f"{size}; weight / y_scale", "shift": f"{size}; bias / y_scale"},
            overlap=0,
            in_place=(0,),
        )


def _vector(node: FloatOp, index: int, size: int) -> Array | None:
    """Real values (size,) float64 of a constant operand, None when it is absent."""
    value: Tensor | Constant | None = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if not isinstance(value, Constant):
        raise Unsupported(f"input {index} is computed; a constant is supported")
    real = value.values.astype(np.float64).reshape(-1)
    if value.scale is not None and value.zero_point is not None:
        real = (real - value.zero_point.reshape(-1)) * value.scale.reshape(-1).astype(np.float64)
    if real.size != size:
        raise Unsupported(f"input {index} has {real.size} elements; {size} are expected")
    return real
