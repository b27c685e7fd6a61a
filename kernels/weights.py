"""Constant weights and bias of the ops that multiply and accumulate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import integer
from .op import Array, Constant, FloatOp, Node, Tensor, Unsupported


def parse(node: FloatOp, x: Tensor, weight: Constant, values: Array, axis: int, outputs: int) -> dict[str, Array]:
    """Constants of a node: weight, weight_zero_point, bias, rescale.

    `values` are the weight's codes with the output channel first, int8 (outputs, ...); `axis` is the dimension of the
    original constant that holds the output channels. The bias is input 2: int32 codes, or floats that are quantized
    here with scale x_scale * w_scale, rounding half to even.
    """
    if weight.scale is None or weight.zero_point is None:
        raise Unsupported("its weight is float; int8 or uint8 codes with a scale are supported")
    if weight.values.dtype != np.int8:
        raise Unsupported(f"its weight has type {weight.values.dtype}; int8 and uint8 are supported")
    if weight.scale.size not in (1, outputs):
        raise Unsupported(f"its weight has {weight.scale.size} scales; 1 or {outputs} (one per output) are supported")
    if weight.scale.size > 1 and weight.axis % weight.values.ndim != axis:
        raise Unsupported(f"its weight is quantized along axis {weight.axis}; axis {axis} is supported")
    w_scale = np.broadcast_to(weight.scale.reshape(-1).astype(np.float32), (outputs,))
    zero_point = np.broadcast_to(weight.zero_point.reshape(-1).astype(np.int32), (outputs,))
    rescale = np.asarray(integer.rescale(x.scale, w_scale, node.output.scale), np.float32).reshape(outputs)
    if not ((rescale >= 0) & (rescale < 2**31)).all():
        raise Unsupported(f"its scales give a factor of {float(rescale.max())}; 0 to 2^31 is supported")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return {
        "weight": np.ascontiguousarray(values, dtype=np.int8),
        "weight_zero_point": zero_point.copy(),
        "bias": _bias(bias, x.scale * w_scale, outputs),
        "rescale": rescale,
    }


def centred(constants: Mapping[str, Array]) -> Array:
    """int16 (outputs, ...) weight codes minus their zero points."""
    weight = constants["weight"].astype(np.int16)
    return weight - constants["weight_zero_point"].astype(np.int16).reshape(-1, *[1] * (weight.ndim - 1))


def folded_bias(node: Node) -> Array:
    """int32 (outputs,) bias - x_zp * sum(w - w_zp): what is left to add to sum(x * (w - w_zp)) over all taps.

    Raises Unsupported where the sums could leave int32, whatever the input.
    """
    weight = centred(node.constants).astype(np.int64).reshape(len(node.constants["bias"]), -1)
    bias = node.constants["bias"].astype(np.int64)
    folded = bias - node.inputs[0].zero_point * weight.sum(axis=1)
    # the kernels add sum(x * w) and, for uint8 weights, w_zp * sum(x) one after the other
    zero = np.abs(node.constants["weight_zero_point"].astype(np.int64))
    reach = np.abs(folded) + 128 * (np.abs(weight).sum(axis=1) + 2 * zero * weight.shape[1])
    if (reach >= 2**31).any():
        raise Unsupported(f"its sums can reach {int(reach.max())}, which does not fit 32 bits")
    return folded.astype(np.int32)


def bits(weight: Array) -> int:
    """The least of 8, 4 and 2 that holds all codes: two's complement of so many bits."""
    low, high = int(weight.min()), int(weight.max())
    return next(b for b in (2, 4, 8) if low >= -(1 << b - 1) and high < 1 << b - 1)


def effective(node: Node, rows: Array) -> tuple[Array, Array, Array]:
    """Folded bias (out,), factors (out,) and whether an output depends on its input at all; `rows` are its weights int8 (out, k).

    Pruned and dead channels do not: they have a bias far beyond the range of codes, at a tiny scale. Bias and factor then give the
    one code that they have, and their weights may be 0.
    """
    w, bias = rows.astype(np.int64), folded_bias(node).astype(np.int64)
    factor = node.constants["rescale"].copy()
    zero, low, high = node.output.zero_point, node.attributes["low"], node.attributes["high"]
    ends = [bias + pick(-128 * w, 127 * w).sum(axis=1) for pick in (np.minimum, np.maximum)]
    first, last = (integer.requantize(a, factor, zero, low, high).astype(np.int64) for a in ends)
    varies = first != last
    return np.where(varies, bias, first - zero), np.where(varies, factor, 1).astype(np.float32), varies


def optional_zero_point(constants: Mapping[str, Array]) -> dict[str, Array]:
    """{'weight_zero_point': ...} for the C layer, left out (a null pointer) when all are 0."""
    zero = constants["weight_zero_point"]
    return {"weight_zero_point": zero} if zero.any() else {}


def _bias(bias: Tensor | Constant | None, scale: Array, outputs: int) -> Array:
    """int32 (outputs,) codes of the bias for accumulators of `scale` (outputs,)."""
    if bias is None:
        return np.zeros(outputs, np.int32)
    if not isinstance(bias, Constant):
        raise Unsupported("its bias is computed; a constant is supported")
    values = bias.values.reshape(-1)
    if values.size not in (1, outputs):
        raise Unsupported(f"its bias has {values.size} elements; {outputs} are expected")
    values = np.broadcast_to(values, (outputs,))
    if bias.scale is None:
        real = values.astype(np.float32)
    else:
        own = bias.scale.reshape(-1)
        zero = np.zeros(1, np.int32) if bias.zero_point is None else bias.zero_point.reshape(-1)
        # the usual case: the scale is x_scale * w_scale up to its own rounding, and the codes are taken as they are
        if not zero.any() and np.allclose(own, scale, rtol=1e-5, atol=0):
            return values.astype(np.int32)
        real = (values.astype(np.float64) - zero) * own
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(real / scale.astype(real.dtype))  # float bias: a float32 division, as QuantizeLinear does
    if not (np.abs(codes) < 2**31).all():
        raise Unsupported("its bias does not fit 32 bits at the scale of the products")
    return codes.astype(np.int32)
