"""Any function of one real value, by a table of 256 codes made at export:

    table[code] = saturate(round_half_even(f(x_scale * (code - x_zp)) / y_scale) + y_zp)

f is computed in float64 and rounded to float32. ONNX Runtime's QLinearLeakyRelu, and the float nodes that it runs for
functions made of products and comparisons (HardSigmoid, HardSwish, ...), equal this bit for bit. Its Sigmoid, Tanh, Erf and Exp are
float32 approximations, so an entry may differ by at most 1 code where the exact value lies next to a rounding boundary.

Several ops in a row that read one activation and constants, such as a GELU written out, are one such function too (export/curves.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import integer
from .op import Array, Call, FloatOp, Node, Op, Tensor, Unsupported
from .parsing import clamp, only

Attributes = Mapping[str, Any]


def _hard_sigmoid(x: Array, a: Attributes) -> Array:
    alpha, beta = np.float32(a.get("alpha", 0.2)), np.float32(a.get("beta", 0.5))
    return np.clip(alpha * x + beta, np.float32(0), np.float32(1))


def _gelu(x: Array, a: Attributes) -> Array:
    kind = a.get("approximate", "none")
    if kind in ("tanh", b"tanh"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2), a))


def _erf(x: Array, a: Attributes) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _elu(x: Array, a: Attributes) -> Array:
    return np.where(x > 0, x, a.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)))


def _selu(x: Array, a: Attributes) -> Array:
    return a.get("gamma", 1.0507009873554805) * _elu(x, {"alpha": a.get("alpha", 1.6732632423543772)})


FLOAT32: Mapping[str, Callable[[Array, Attributes], Array]] = {
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda x, a: x * _hard_sigmoid(x, {"alpha": 1 / 6}),
    "LeakyRelu": lambda x, a: np.where(x >= 0, x, np.float32(a.get("alpha", 0.01)) * x),
    "Abs": lambda x, a: np.abs(x),
    "Neg": lambda x, a: -x,
}
"""functions whose every operation is rounded to float32, as runtimes compute them"""

FLOAT64: Mapping[str, Callable[[Array, Attributes], Array]] = {
    "Sigmoid": lambda x, a: 0.5 * (1 + np.tanh(0.5 * x)),
    "Tanh": lambda x, a: np.tanh(x),
    "Elu": _elu,
    "Selu": _selu,
    "Softplus": lambda x, a: np.logaddexp(0, x),
    "Softsign": lambda x, a: x / (1 + np.abs(x)),
    "Mish": lambda x, a: x * np.tanh(np.logaddexp(0, x)),
    "Swish": lambda x, a: x * 0.5 * (1 + np.tanh(0.5 * a.get("alpha", 1.0) * x)),
    "Gelu": _gelu,
    "Erf": _erf,
    "Exp": lambda x, a: np.exp(np.minimum(x, 88)),
}


class Lookup(Op):
    """Elementwise functions of one activation."""

    onnx_types = (*FLOAT32, *FLOAT64)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        if node.output.shape != x.shape:
            raise Unsupported(f"its output has shape {node.output.shape}; its input {x.shape}")
        real = integer.dequantize(integer.codes(), x)
        return of(node, x, values(node.type, real, node.attributes))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        return integer.look_up(inputs[0], node.constants["table"])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        return call(node)


def values(kind: str, x: integer.Float32, attributes: Attributes) -> integer.Float32:
    """float32 results of the ONNX function `kind` for float32 arguments."""
    if kind in FLOAT32:
        return FLOAT32[kind](x, attributes)
    return FLOAT64[kind](x.astype(np.float64), attributes).astype(np.float32)


def of(node: FloatOp, x: Tensor, y: integer.Float32) -> Node:
    """The node for any function of `x` alone, by its float32 results (256,) for all codes in ascending order."""
    return Node("lookup", node.name, (x,), node.output, {}, {"table": integer.table(y, node.output, **clamp(node))})


def call(node: Node) -> Call:
    """The C call of any node that is a table applied to every code in place."""
    return Call(
        kernel="lookup",
        sources=("lookup.c",),
        fields={"size": math.prod(node.output.shape)},
        arrays={"table": node.constants["table"]},
        comments={"table": "new code for every code from -128 on"},
        overlap=0,
        in_place=(0,),
    )
