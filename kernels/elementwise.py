"""Shared by add and mul: two operands, one of which may be constant or hold one value, or one per channel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .op import Array, Call, Constant, FloatOp, Node, Tensor, Unsupported
from .parsing import clamp


def parse(node: FloatOp, op: str) -> Node:
    """The node of Add or Mul. Operands in the order of the ONNX node; attribute `swapped` tells that the small one is first."""
    if len(node.inputs) != 2:
        raise Unsupported(f"it has {len(node.inputs)} operands; 2 are supported")
    first, second = node.inputs
    operands = [_quantization(v) for v in (first, second)]
    shapes = [s for _, _, s in operands]
    if isinstance(first, Constant) and isinstance(second, Constant):
        raise Unsupported("both operands are constant")
    swapped = shapes[0] != node.output.shape
    if swapped or isinstance(first, Constant):
        swapped = True
        operands.reverse()
        shapes.reverse()
    if shapes[0] != node.output.shape or (swapped and isinstance(second, Constant)):
        raise Unsupported(f"operands {shapes[0]} and {shapes[1]}; one must be an activation with the output's shape")
    repeat = _repeat(shapes[0], shapes[1])
    made = {
        "swapped": swapped,
        "repeat": repeat,
        "scales": tuple(s for s, _, _ in operands),
        "zero_points": tuple(z for _, z, _ in operands),
        **clamp(node),
    }
    big, small = (second, first) if swapped else (first, second)
    assert isinstance(big, Tensor)
    if isinstance(small, Tensor):
        return Node(op, node.name, (big, small), node.output, made)
    assert isinstance(small, Constant)
    return Node(op, node.name, (big,), node.output, made, {"operand": small.values.astype(np.int8)})


def operands(node: Node, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """Codes of the operand with the output's shape, and of the other one shaped to broadcast against it."""
    small = node.constants["operand"] if "operand" in node.constants else inputs[1]
    return inputs[0], small


def call(node: Node, kernel: str, fields: Mapping[str, float]) -> Call:
    """The C call. `operand_size` elements of the second operand repeat over the first one's."""
    constant = "operand" in node.constants
    size = math.prod(node.output.shape)
    if constant:
        operand = node.constants["operand"]
        small = operand.size
        if operand.ndim == 4:
            operand = operand.transpose(0, 2, 3, 1)
        elif small == math.prod(node.output.shape[1:]) and len(node.output.shape) == 4:
            operand = operand.reshape(node.output.shape[1:]).transpose(1, 2, 0)
    else:
        operand = np.zeros(0, np.int8)
        small = node.inputs[1].size
    return Call(
        kernel=f"{kernel}_constant" if constant else kernel,
        sources=(f"{kernel}.c",),
        fields={
            "size": size,
            "operand_size": small,
            **fields,
            "low": node.attributes["low"],
            "high": node.attributes["high"],
        },
        arrays={"operand": np.ascontiguousarray(operand).reshape(-1)} if constant else {},
        comments={"operand": f"{small} codes, channels last"},
        overlap=0,
        in_place=(0, 1) if not constant and small == size else (0,),
    )


def _quantization(value: Tensor | Constant | None) -> tuple[np.float32, int, tuple[int, ...]]:
    if value is None:
        raise Unsupported("an operand is missing")
    if isinstance(value, Tensor):
        return value.scale, value.zero_point, value.shape
    if value.scale is None or value.zero_point is None or value.values.dtype != np.int8:
        raise Unsupported("its constant operand is not quantized to 8 bits")
    if value.scale.size != 1:
        raise Unsupported("its constant operand is quantized per channel; one scale is supported")
    return np.float32(value.scale.flat[0]), int(value.zero_point.flat[0]), value.values.shape


def _repeat(big: tuple[int, ...], small: tuple[int, ...]) -> str:
    """How the small operand covers the big one: 'same', 'one' value, or one value per 'channel' (last in memory)."""
    if math.prod(small) == 1 and len(small) <= len(big):
        return "one"
    padded = (1,) * (len(big) - len(small)) + small
    if padded == big:
        return "same"
    channel = 1 if len(big) == 4 else len(big) - 1
    if all(d == (big[i] if i == channel else 1) for i, d in enumerate(padded)):
        return "channel"
    raise Unsupported(f"operands {big} and {small}; equal shapes, one value, or one value per channel are supported")
