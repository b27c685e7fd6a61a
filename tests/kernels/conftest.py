"""Example nodes for every op, as the importer would hand them over; used against C and against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from planish.export.graph import Graph, Port
from planish.kernels import layout
from planish.kernels.op import Call, Constant, FloatOp, Node, Op, Tensor, ops
from planish.targets import target as targets

INF = float("inf")
Rng = np.random.Generator
Example = FloatOp | Node


def tensor(rng: Rng, name: str, *shape: int, like: Tensor | None = None, scale: float | None = None) -> Tensor:
    """An activation with a random quantization, or with that of `like`."""
    if like is not None:
        return Tensor(name, shape, like.scale, like.zero_point)
    value = np.float32(scale if scale is not None else np.exp(rng.uniform(np.log(0.004), np.log(0.1))))
    return Tensor(name, shape, value, int(rng.integers(-128, 128)))


def weight(rng: Rng, *shape: int, scales: int = 1, axis: int = 0, unsigned: bool = False) -> Constant:
    """Random weight codes: symmetric int8, or uint8 (moved to int8) with a zero point of its own."""
    values = rng.integers(-128 if unsigned else -127, 128, shape).astype(np.int8)
    zero = rng.integers(-60, 60, 1) if unsigned else np.zeros(1)
    return Constant(
        "w",
        values,
        rng.uniform(0.001, 0.02, scales).astype(np.float32),
        np.broadcast_to(zero, (scales,)).astype(np.int32),
        axis,
    )


def bias(rng: Rng, x: Tensor, w: Constant, outputs: int) -> Constant:
    """Random int32 codes with scale x_scale * w_scale."""
    scale = (x.scale * w.scale).astype(np.float32)
    return Constant("b", rng.integers(-8000, 8000, outputs).astype(np.int32), scale, np.zeros(len(scale), np.int32))


def plain(name: str, *values: int) -> Constant:
    """An int64 list such as pads or starts."""
    return Constant(name, np.array(values, np.int64))


def made(
    kind: str,
    inputs: tuple[Any, ...],
    output: Tensor,
    attributes: dict[str, Any] | None = None,
    low: float = -INF,
    high: float = INF,
) -> FloatOp:
    return FloatOp(kind, kind.lower(), attributes or {}, inputs, output, low, high)


def convolution(
    rng: Rng, c: int, o: int, size: tuple[int, int], kernel: tuple[int, int] = (3, 3), stride: int = 1, dilation: int = 1,
    pads: tuple[int, int, int, int] = (1, 1, 1, 1), group: int = 1, per_channel: bool = True, unsigned: bool = False,
    with_bias: str = "codes", low: float = -INF, high: float = INF,
) -> FloatOp:  # fmt: skip
    x = tensor(rng, "x", 1, c, *size)
    w = weight(rng, o, c // group, *kernel, scales=o if per_channel else 1, unsigned=unsigned)
    spans = [(k - 1) * dilation + 1 for k in kernel]
    rows, columns = ((size[i] + pads[i] + pads[i + 2] - spans[i]) // stride + 1 for i in range(2))
    # an output scale near the spread of the sums, so that few outputs saturate
    spread = float(x.scale) * 0.01 * 75 * 75 * np.sqrt(c // group * kernel[0] * kernel[1]) / 60
    y = tensor(rng, "y", 1, o, rows, columns, scale=spread * rng.uniform(0.5, 2))
    b = {"codes": bias(rng, x, w, o), "none": None}.get(with_bias)
    if with_bias == "float":
        b = Constant("b", rng.normal(0, 1, o).astype(np.float32))
    attributes = {"pads": list(pads), "strides": [stride] * 2, "dilations": [dilation] * 2, "group": group}
    return made("Conv", (x, w) if b is None else (x, w, b), y, attributes, low, high)


def conv2d(rng: Rng) -> Iterator[Example]:
    yield convolution(rng, 3, 16, (9, 7))
    yield convolution(rng, 16, 8, (8, 8), low=0.0)
    yield convolution(rng, 8, 5, (8, 8), stride=2)
    yield convolution(rng, 8, 8, (8, 8), stride=2, pads=(0, 0, 1, 1))  # SAME on an even size
    yield convolution(rng, 4, 6, (11, 5), kernel=(4, 1), pads=(2, 0, 1, 0), high=6.0, low=0.0)
    yield convolution(rng, 5, 3, (9, 9), dilation=2, pads=(2, 2, 2, 2), with_bias="none")
    yield convolution(rng, 1, 1, (5, 6), pads=(0, 0, 0, 0), per_channel=False)
    yield convolution(rng, 32, 17, (5, 5), kernel=(1, 1), pads=(0, 0, 0, 0))
    yield convolution(rng, 7, 4, (6, 5), kernel=(1, 1), pads=(0, 0, 0, 0), stride=2)
    yield convolution(rng, 7, 4, (6, 5), kernel=(1, 1), pads=(1, 0, 0, 1))
    yield convolution(rng, 8, 12, (6, 6), group=4)
    yield convolution(rng, 8, 8, (6, 5), kernel=(1, 1), pads=(0, 0, 0, 0), group=2)
    yield convolution(rng, 64, 9, (6, 6), unsigned=True, per_channel=False)
    yield convolution(rng, 6, 9, (7, 6), kernel=(1, 1), pads=(0, 0, 0, 0), unsigned=True, per_channel=False)
    yield convolution(rng, 3, 4, (5, 5), kernel=(5, 5), pads=(2, 2, 2, 2), with_bias="float")


def depthwise(rng: Rng) -> Iterator[Example]:
    yield convolution(rng, 16, 16, (9, 7), group=16)
    yield convolution(rng, 7, 7, (8, 8), group=7, stride=2, pads=(0, 0, 1, 1))
    yield convolution(rng, 4, 12, (6, 7), group=4)
    yield convolution(rng, 9, 9, (10, 10), group=9, dilation=2, pads=(2, 2, 2, 2), low=0.0, high=6.0)
    yield convolution(rng, 8, 8, (6, 6), group=8, unsigned=True, per_channel=False)
    yield convolution(rng, 8, 8, (12, 3), kernel=(10, 4), group=8, pads=(4, 1, 5, 2), with_bias="none")


def linear(
    rng: Rng, k: int, n: int, rows: tuple[int, ...] = (), kind: str = "Gemm", trans: int = 1, unsigned: bool = False
) -> FloatOp:
    x = tensor(rng, "x", 1, *rows, k)
    shape, axis = ((n, k), 0) if trans else ((k, n), 1)
    w = weight(rng, *shape, scales=1 if unsigned else n, axis=axis, unsigned=unsigned)
    y = tensor(rng, "y", 1, *rows, n, scale=float(x.scale) * 0.01 * 75 * 75 * np.sqrt(k) / 60)
    if kind == "MatMul":
        return made("MatMul", (x, w), y)
    return made("Gemm", (x, w, bias(rng, x, w, n)), y, {"transB": trans})


def fully_connected(rng: Rng) -> Iterator[Example]:
    yield linear(rng, 64, 10)
    yield linear(rng, 33, 7, trans=0)
    yield linear(rng, 1, 1)
    yield linear(rng, 300, 12, unsigned=True)
    yield linear(rng, 16, 6, rows=(5,), kind="MatMul", trans=0)
    yield linear(rng, 20, 8, kind="MatMul", trans=0)


def binary(kind: str) -> Callable[[Rng], Iterator[Example]]:
    def build(rng: Rng) -> Iterator[Example]:
        shape = (1, 5, 9, 7)
        for low, high in ((-INF, INF), (0.0, INF), (0.0, 1.0)):
            a, b = tensor(rng, "a", *shape), tensor(rng, "b", *shape)
            yield made(kind, (a, b), tensor(rng, "y", *shape), {}, low, high)
        for small in ((1, 5, 1, 1), (1, 1, 1, 1)):
            a, b = tensor(rng, "a", *shape), tensor(rng, "b", *small)
            yield made(kind, (a, b), tensor(rng, "y", *shape))
            yield made(kind, (b, a), tensor(rng, "y", *shape))
        a, w = tensor(rng, "a", *shape), weight(rng, 5, 1, 1)
        yield made(kind, (a, w), tensor(rng, "y", *shape))
        yield made(kind, (weight(rng, *shape), a), tensor(rng, "y", *shape))
        a, b = tensor(rng, "a", 1, 40), tensor(rng, "b", 1, 40)
        yield made(kind, (a, b), tensor(rng, "y", 1, 40))
        yield made(kind, (a, weight(rng, 40)), tensor(rng, "y", 1, 40))

    return build


def pool(kind: str) -> Callable[[Rng], Iterator[Example]]:
    def build(rng: Rng) -> Iterator[Example]:
        grid: list[tuple[int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int, int, int]]] = [
            (4, (8, 8), (2, 2), (2, 2), (0, 0, 0, 0)),
            (3, (9, 7), (3, 3), (2, 2), (1, 1, 1, 1)),
            (1, (8, 6), (3, 2), (1, 2), (0, 0, 1, 1)),
            (5, (25, 5), (25, 5), (1, 1), (0, 0, 0, 0)),
        ]
        for c, size, kernel, stride, pads in grid:
            x = tensor(rng, "x", 1, c, *size)
            rows, columns = ((size[i] + pads[i] + pads[i + 2] - kernel[i]) // stride[i] + 1 for i in range(2))
            attributes: dict[str, Any] = {"kernel_shape": list(kernel), "strides": list(stride), "pads": list(pads)}
            if kind == "AveragePool":
                y = tensor(rng, "y", 1, c, rows, columns, scale=float(x.scale) * rng.uniform(0.3, 1.1))
                yield made(kind, (x,), y, attributes)
                yield made(kind, (x,), y, attributes | {"count_include_pad": 1}, 0.0, 2.0)
            else:
                yield made(kind, (x,), tensor(rng, "y", 1, c, rows, columns, like=x), attributes)
        x = tensor(rng, "x", 1, 3, 6, 6)
        if kind == "MaxPool":
            yield made(kind, (x,), tensor(rng, "y", 1, 3, 3, 3), {"kernel_shape": [2, 2], "strides": [2, 2]}, 0.0)
            y = tensor(rng, "y", 1, 3, 4, 4, like=x)
            yield made(kind, (x,), y, {"kernel_shape": [2, 2], "dilations": [2, 2]})

    return build


def global_average_pool(rng: Rng) -> Iterator[Example]:
    for c, h, w in ((64, 8, 8), (3, 5, 7), (1, 1, 1), (10, 12, 12)):
        x = tensor(rng, "x", 1, c, h, w)
        y = tensor(rng, "y", 1, c, 1, 1, scale=float(x.scale) * rng.uniform(0.1, 0.7))
        yield made("GlobalAveragePool", (x,), y)
    x = tensor(rng, "x", 1, 6, 5, 4)
    y = tensor(rng, "y", 1, 6, scale=float(x.scale) * 0.4)
    yield made("ReduceMean", (x, plain("axes", 2, 3)), y, {"keepdims": 0}, 0.0)


def pad(rng: Rng) -> Iterator[Example]:
    x = tensor(rng, "x", 1, 4, 5, 6)
    value = Constant("value", np.array(0, np.float32))
    yield made("Pad", (x, plain("pads", 0, 2, 0, 0, 0, 2, 0, 0), value), tensor(rng, "y", 1, 8, 5, 6, like=x))
    yield made("Pad", (x, plain("pads", 0, 0, 1, 2, 0, 0, 3, 0)), tensor(rng, "y", 1, 4, 9, 8, like=x))
    yield made("Pad", (x, plain("pads", 0, 0, -1, 2, 0, 1, 0, -1)), tensor(rng, "y", 1, 5, 4, 7))
    x = tensor(rng, "x", 1, 7)
    one = Constant("value", np.array(1.0, np.float32))
    yield made("Pad", (x, plain("pads", 2, 3), one, plain("axes", 1)), tensor(rng, "y", 1, 12, like=x))


def concat(rng: Rng) -> Iterator[Example]:
    for axis, shapes in (
        (1, ((1, 3, 5, 4), (1, 8, 5, 4))),
        (2, ((1, 3, 5, 4), (1, 3, 1, 4), (1, 3, 2, 4))),
        (-1, ((1, 2, 3, 4), (1, 2, 3, 5))),
        (1, ((1, 6), (1, 7), (1, 1))),
        (2, ((1, 4, 6), (1, 4, 2))),
    ):
        xs = [tensor(rng, f"x{i}", *s) for i, s in enumerate(shapes)]
        shape = list(shapes[0])
        shape[axis] = sum(s[axis] for s in shapes)
        yield made("Concat", tuple(xs), tensor(rng, "y", *shape), {"axis": axis})
        y = tensor(rng, "y", *shape, like=xs[0])
        yield made("Concat", tuple(xs), y, {"axis": axis})
    x = tensor(rng, "x", 1, 4, 3, 3)
    y = tensor(rng, "y", 1, 8, 3, 3)
    yield made("Concat", (x, replace(x, name="x2")), y, {"axis": 1}, 0.0)


def clamp(rng: Rng) -> Iterator[Example]:
    x = tensor(rng, "x", 1, 3, 5, 4)
    yield made("Relu", (x,), tensor(rng, "y", 1, 3, 5, 4))
    yield made("Relu", (x,), tensor(rng, "y", 1, 3, 5, 4, like=x))
    bounds = tuple(Constant(n, np.array(v, np.float32)) for n, v in (("min", 0), ("max", 6)))
    yield made("Clip", (x, *bounds), tensor(rng, "y", 1, 3, 5, 4, scale=6 / 255))
    yield made("Clip", (x, None, bounds[1]), tensor(rng, "y", 1, 3, 5, 4))


def lookup(rng: Rng) -> Iterator[Example]:
    from planish.kernels.lookup import Lookup

    for kind in Lookup.onnx_types:
        x = replace(
            tensor(rng, "x", 1, 256), scale=np.float32(rng.uniform(0.02, 0.06)), zero_point=int(rng.integers(-40, 40))
        )
        scale = {"Sigmoid": 1 / 256, "HardSigmoid": 1 / 256, "Tanh": 1 / 128, "Erf": 1 / 128, "Exp": 0.3}.get(
            kind, 0.04
        )
        yield made(kind, (x,), tensor(rng, "y", 1, 256, scale=scale))


def softmax(rng: Rng) -> Iterator[Example]:
    for shape, axis in (
        ((1, 10), -1),
        ((1, 3, 7), -1),
        ((1, 5, 4, 3), 1),
        ((1, 5, 4, 3), 3),
        ((1, 2), 1),
        ((1, 300), 1),
        ((1, 6, 5), 1),
    ):
        x = tensor(rng, "x", *shape)
        y = replace(tensor(rng, "y", *shape, scale=1 / 256), zero_point=-128)
        yield made("Softmax", (x,), y, {"axis": axis})
    x = tensor(rng, "x", 1, 12)
    yield made("Softmax", (x,), Tensor("y", (1, 12), np.float32(0.0021), -120), {"axis": -1}, 0.0, 0.3)


def layer_norm(rng: Rng) -> Iterator[Example]:
    for shape in ((1, 64), (1, 5, 7), (1, 3, 1), (1, 2, 300), (1, 4, 20)):
        x, size = tensor(rng, "x", *shape), shape[-1]
        gain = Constant("gain", rng.uniform(0.3, 1.8, size).astype(np.float32))
        shift = Constant("shift", rng.normal(0, 0.5, size).astype(np.float32))
        y = tensor(rng, "y", *shape, scale=rng.uniform(0.01, 0.05))
        yield made("LayerNormalization", (x, gain, shift), y, {"axis": -1, "epsilon": 1e-5})
    yield made("LayerNormalization", (x, gain), y, {"axis": len(x.shape) - 1, "epsilon": 0.5}, 0.0, 3.0)


def matmul(rng: Rng) -> Iterator[Example]:
    for a, b in (
        ((1, 5, 7), (1, 7, 6)),
        ((1, 4, 6, 16), (1, 4, 16, 6)),
        ((1, 2, 3, 33), (1, 2, 33, 9)),
        ((1, 3, 4, 5), (1, 1, 5, 4)),
        ((1, 2, 3, 4, 5), (1, 2, 3, 5, 2)),
        ((1, 1, 1), (1, 1, 1)),
    ):
        left, right = tensor(rng, "a", *a), tensor(rng, "b", *b)
        spread = float(left.scale * right.scale) * 75 * 75 * np.sqrt(a[-1]) / 60
        y = tensor(rng, "y", *a[:-1], b[-1], scale=spread * rng.uniform(0.5, 2))
        yield made("MatMul", (left, right), y)
    yield made("MatMul", (left, right), y, {}, 0.0)


def reshape(rng: Rng) -> Iterator[Example]:
    for a, b in (
        ((1, 3, 4, 5), (1, 60)),
        ((1, 8, 1, 1), (1, 8)),
        ((1, 1, 6, 4), (1, 24)),
        ((1, 60), (1, 3, 4, 5)),
        ((1, 6, 4, 5), (1, 2, 3, 20)),
        ((1, 6, 4, 5), (1, 2, 12, 5)),
        ((1, 6, 20), (1, 6, 4, 5)),
        ((1, 6, 4, 5), (1, 6, 2, 10)),
    ):
        x = tensor(rng, "x", *a)
        yield made("Reshape", (x, plain("shape", 0, *b[1:])), tensor(rng, "y", *b, like=x))
    x = tensor(rng, "x", 1, 3, 4, 5)
    yield made("Flatten", (x,), tensor(rng, "y", 1, 60), {"axis": 1})
    x = tensor(rng, "x", 1, 7, 1, 1)
    yield made("Squeeze", (x, plain("axes", 2, 3)), tensor(rng, "y", 1, 7))
    yield made("Unsqueeze", (tensor(rng, "x", 1, 7), plain("axes", 1)), tensor(rng, "y", 1, 1, 7), {}, 0.0)


def transpose(rng: Rng) -> Iterator[Example]:
    for shape, perm in (
        ((1, 3, 4, 5), (0, 2, 3, 1)),
        ((1, 3, 4, 5), (0, 3, 1, 2)),
        ((1, 3, 4, 5), (0, 1, 3, 2)),
        ((1, 3, 1, 5), (0, 1, 3, 2)),
        ((1, 3, 4), (0, 2, 1)),
        ((1, 2, 3, 2, 2), (0, 2, 1, 3, 4)),
    ):
        x = tensor(rng, "x", *shape)
        y = tensor(rng, "y", *(shape[a] for a in perm), like=x)
        yield made("Transpose", (x,), y, {"perm": list(perm)})
    x = tensor(rng, "x", 1, 3, 1, 5)
    yield made("Transpose", (x,), tensor(rng, "y", 1, 3, 5, 1), {"perm": [0, 1, 3, 2]})


def slicing(rng: Rng) -> Iterator[Example]:
    x = tensor(rng, "x", 1, 6, 9, 8)
    bounds = (plain("starts", 0, 0), plain("ends", 2**63 - 1, 2**63 - 1), plain("axes", 2, 3), plain("steps", 2, 2))
    yield made("Slice", (x, *bounds), tensor(rng, "y", 1, 6, 5, 4, like=x))
    bounds = (plain("starts", -1, 2), plain("ends", -(2**63), -1), plain("axes", 1, -1), plain("steps", -1, 1))
    yield made("Slice", (x, *bounds), tensor(rng, "y", 1, 6, 9, 5, like=x))
    x = tensor(rng, "x", 1, 20)
    yield made("Slice", (x, plain("starts", 3), plain("ends", 17), plain("axes", 1)), tensor(rng, "y", 1, 14))


def rescale(rng: Rng) -> Iterator[Example]:
    x = tensor(rng, "x", 1, 3, 5, 4)
    yield made("Identity", (x,), tensor(rng, "y", 1, 3, 5, 4))
    yield made("Identity", (x,), tensor(rng, "y", 1, 3, 5, 4, like=x))


def paste(rng: Rng) -> Iterator[Example]:
    for channels, block, first in (
        (3, (2, 5), (3, 2)),
        (8, (4, 4), (0, 8)),
        (4, (2, 12), (6, 0)),
        (1, (8, 1), (0, 11)),
    ):
        y = tensor(rng, "y", 1, channels, 8, 12)
        x, before = tensor(rng, "x", 1, channels, *block, like=y), tensor(rng, "before", *y.shape, like=y)
        yield Node("paste", "paste", (x, before), y, {"first": first})


def flatten(rng: Rng) -> Iterator[Example]:
    x = tensor(rng, "x", 1, 3, 4, 5)
    yield Node("flatten", "flatten", (x,), tensor(rng, "y", 1, 60, like=x))


EXAMPLES: dict[str, Callable[[Rng], Iterator[Example]]] = {
    "add": binary("Add"),
    "average_pool": pool("AveragePool"),
    "clamp": clamp,
    "concat": concat,
    "conv2d": conv2d,
    "depthwise_conv2d": depthwise,
    "flatten": flatten,
    "fully_connected": fully_connected,
    "global_average_pool": global_average_pool,
    "layer_norm": layer_norm,
    "lookup": lookup,
    "matmul": matmul,
    "max_pool": pool("MaxPool"),
    "mul": binary("Mul"),
    "pad": pad,
    "paste": paste,
    "rescale": rescale,
    "reshape": reshape,
    "slice": slicing,
    "softmax": softmax,
    "transpose": transpose,
}


def examples(op: str, seed: int = 0) -> list[Example]:
    """Nodes that `op` takes; fails for an op of kernels/ that has none here."""
    if op not in EXAMPLES:
        pytest.fail(f"op '{op}' has no examples: add them to EXAMPLES in tests/kernels/conftest.py")
    return list(EXAMPLES[op](np.random.default_rng([seed, *op.encode()])))


def node_of(op: str, example: Example) -> Node:
    """The deployment node; it must be the op itself that takes the example."""
    if isinstance(example, Node):
        return example
    found = ops()[op].parse(example)
    assert found is not None and found.op == op
    return found


def random_inputs(rng: Rng, node: Node, batch: int) -> list[np.ndarray]:
    """int8 codes for every input, the extremes among them."""
    return [rng.integers(-128, 128, (batch, *t.shape[1:])).astype(np.int8) for t in node.inputs]


def qdq(op: FloatOp, batch: int) -> Any:
    """The ONNX model of one op between dequantize and quantize, activations as uint8: what ONNX Runtime fuses on x86."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}
    graph_inputs: list[Any] = []

    def parameters(name: str, scale: Any, zero: Any) -> list[str]:
        constants[f"{name}_scale"], constants[f"{name}_zero"] = scale, zero
        return [f"{name}_scale", f"{name}_zero"]

    names: list[str] = []
    seen: dict[str, str] = {}
    for i, value in enumerate(op.inputs):
        name = f"in{i}"
        if value is None:
            names.append("")
        elif isinstance(value, Tensor):
            if value.name not in seen:
                seen[value.name] = f"{name}_real"
                graph_inputs.append(helper.make_tensor_value_info(name, TensorProto.UINT8, [batch, *value.shape[1:]]))
                pair = parameters(name, np.float32(value.scale), np.uint8(value.zero_point + 128))
                nodes.append(helper.make_node("DequantizeLinear", [name, *pair], [f"{name}_real"]))
            names.append(seen[value.name])
        elif value.scale is None or value.zero_point is None:
            constants[name] = value.values
            names.append(name)
        else:
            activation = op.type in ("Add", "Mul")  # a constant operand must have the activations' type
            unsigned = activation or bool(value.zero_point.any())
            move = 128 if unsigned else 0
            kind = np.uint8 if unsigned else value.values.dtype
            constants[name] = (value.values.astype(np.int32) + move).astype(kind)
            scale, zero = value.scale, (value.zero_point + move).astype(kind)
            if scale.size == 1 and op.type != "Gemm":
                scale, zero = scale.reshape(()), zero.reshape(())
            pair = parameters(name, scale, zero)
            nodes.append(helper.make_node("DequantizeLinear", [name, *pair], [f"{name}_real"], axis=value.axis))
            names.append(f"{name}_real")
    attributes = dict(op.attributes)
    nodes.append(helper.make_node(op.type, names, ["real"], **attributes))
    last = "real"
    if op.low > -INF or op.high < INF:
        bounds = []
        for name, value in (("low", op.low), ("high", op.high)):
            if np.isfinite(value):
                constants[name] = np.float32(value)
            bounds.append(name if np.isfinite(value) else "")
        relu = op.low == 0 and op.high == INF
        nodes.append(helper.make_node("Relu" if relu else "Clip", [last] if relu else [last, *bounds], ["kept"]))
        last = "kept"
    pair = parameters("y", np.float32(op.output.scale), np.uint8(op.output.zero_point + 128))
    nodes.append(helper.make_node("QuantizeLinear", [last, *pair], ["y"]))
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "one", graph_inputs, [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def onnxruntime_codes(op: FloatOp, inputs: list[np.ndarray], folder: Any) -> tuple[np.ndarray, list[str]]:
    """int8 codes that ONNX Runtime gives for int8 codes of the distinct inputs, and the op types it really ran."""
    import onnx
    import onnxruntime

    path = str(folder / "optimized.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = path
    model = qdq(op, len(inputs[0])).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {
        i.name: (x.astype(np.int16) + 128).astype(np.uint8) for i, x in zip(session.get_inputs(), inputs, strict=True)
    }
    y = session.run(None, feed)[0]
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    return (np.asarray(y).astype(np.int16) - 128).astype(np.int8), kinds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op_name" in metafunc.fixturenames:
        metafunc.parametrize("op_name", sorted(ops()))


TYPES = {"float32": "float", "int32": "int32_t", "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t"}


def literal(value: float | str) -> str:
    return float(value).hex() + "f" if isinstance(value, (float, np.floating)) else str(value)


def layer(name: str, call: Call) -> str:
    """The constant arrays and the layer struct of one call, as the code generator writes them."""
    lines: list[str] = []
    members = [f".{k} = {literal(v)}" for k, v in call.fields.items()]
    for key, array in call.arrays.items():
        values = ", ".join(literal(v) for v in array.reshape(-1).tolist())
        lines.append(f"static const {TYPES[str(array.dtype)]} {name}_{key}[] = {{{values}}};")
        members.append(f".{key} = {name}_{key}")
    lines.append(f"static const planish_{call.kernel}_layer {name} = {{{', '.join(members)}}};")
    return "\n".join(lines)


def entry(name: str, call: Call, inputs: int) -> str:
    """`void run_<name>(const int8_t *const *x, int8_t *y, int8_t *scratch)`."""
    given = ["x"] if call.input_array else [f"x[{i}]" for i in range(inputs) if i != call.updates]
    arguments = ", ".join([f"&{name}", *given, "y", *(["scratch"] if call.scratch else [])])
    unused = "" if call.scratch else "(void)scratch; "
    head = f"void run_{name}(const int8_t *const *x, int8_t *y, int8_t *scratch)"
    return f"{head};\n{head}\n{{\n    {unused}planish_{call.kernel}({arguments});\n}}"


def harness() -> tuple[str, dict[str, list[tuple[Node, Call | None]]]]:
    """One C file with every example of every op, and the nodes by op."""
    text = ['#include "planish.h"']
    nodes: dict[str, list[tuple[Node, Call | None]]] = {}
    for name, op in ops().items():
        nodes[name] = []
        for i, example in enumerate(examples(name)):
            node = node_of(name, example)
            call = None if op.alias(node) else op.call(node)
            if call is not None:
                text += [layer(f"{name}_{i}", call), entry(f"{name}_{i}", call, len(node.inputs))]
            nodes[name].append((node, call))
    return "\n".join(text) + "\n", nodes


@dataclass(frozen=True)
class OnDevice:
    """One node compiled and run on an emulated microcontroller."""

    codes: list[np.ndarray]
    """the output (1, ...) for every sample, int8"""
    instructions: int
    """of the first sample"""
    flash_bytes: int
    arena_bytes: int
    kernel: str


def graph_of(*nodes: Node) -> Graph:
    """A deployment graph whose inputs are the tensors that no node makes, and whose output is the last node's."""
    made = {n.output.name for n in nodes}
    inputs = {t.name: t for n in nodes for t in n.inputs if t.name not in made}

    def port(tensor: Tensor) -> Port:
        return Port(tensor.name, tensor.shape, "int8", tensor, tuple(range(len(tensor.shape))))

    return Graph(tuple(nodes), tuple(port(t) for t in inputs.values()), (port(nodes[-1].output),))


def on_device(nodes: Node | tuple[Node, ...], samples: list[list[np.ndarray]], target: str, folder: Any) -> OnDevice:
    """Compile nodes for a microcontroller and run `samples`, each a list of int8 inputs (1, ...) in the graph's order."""
    from planish.export import c as c_format
    from planish.export.artifact import Artifact
    from planish.runtimes import emulator

    graph = graph_of(*(nodes if isinstance(nodes, tuple) else (nodes,)))
    names = [p.name for p in graph.inputs]
    golden = dict(zip(names, samples[0], strict=True))
    device = targets.load(target)
    facts, flash, _ = c_format.write_project(graph, "one", device, golden, folder, [])
    with emulator.Emulator().open(Artifact(folder, {"format": "c", "target": target}), 1) as session:
        codes = [next(iter(session.run(dict(zip(names, s, strict=True))).values())) for s in samples]
        instructions = session.profile(golden, 1, 0).instructions
    assert instructions is not None
    assert flash is not None
    return OnDevice(codes, instructions, flash, facts["memory"]["arena"], facts["layers"][0]["kernel"])


def side_by_side(nodes: list[Node]) -> tuple[Graph, list[Node]]:
    """A graph of nodes that share nothing, all of whose outputs are its own, and the nodes under the names they have in it."""
    own = [
        replace(
            n,
            name=f"n{i}",
            inputs=tuple(replace(t, name=f"{t.name}_{i}") for t in n.inputs),
            output=replace(n.output, name=f"y_{i}"),
        )
        for i, n in enumerate(nodes)
    ]
    graphs = [graph_of(n) for n in own]
    inputs = tuple(p for g in graphs for p in g.inputs)
    return Graph(tuple(own), inputs, tuple(p for g in graphs for p in g.outputs)), own


def equal_reference(
    nodes: list[Node], target: str, folder: Any, runtimes: tuple[str, ...] = ("emulator", "c"), seed: int = 5
) -> None:
    """Nodes in one project for `target`: random codes and the extremes give the reference's codes, in the emulator and as
    plain C on this machine."""
    from planish.export import c as c_format
    from planish.export.artifact import Artifact
    from planish.runtimes.c import C
    from planish.runtimes.emulator import Emulator

    graph, own = side_by_side(nodes)
    rng = np.random.default_rng(seed)
    x: dict[str, np.ndarray] = {}
    for t in (t for n in own for t in n.inputs):
        least, most = -(1 << t.bits - 1), (1 << t.bits - 1) - 1
        edges = [np.full(t.shape, v, np.int8) for v in (least, most)]
        x[t.name] = np.concatenate([rng.integers(least, most + 1, (2, *t.shape[1:])).astype(np.int8), *edges])
    c_format.write_project(graph, "grid", targets.load(target), {k: v[:1] for k, v in x.items()}, folder, [])
    artifact = Artifact(folder, {"format": "c", "target": target})
    for runtime in runtimes:
        with {"emulator": Emulator, "c": C}[runtime]().open(artifact, 1) as session:
            got = session.run(x)
        for n in own:
            expected = ops()[n.op].reference(n, *(x[t.name] for t in n.inputs))
            np.testing.assert_array_equal(got[n.output.name], expected, err_msg=f"{runtime}: {n.inputs} {n.attributes}")


class Bench:
    """What the tests of this folder share."""

    graph_of = staticmethod(graph_of)
    on_device = staticmethod(on_device)
    equal_reference = staticmethod(equal_reference)

    examples = staticmethod(examples)
    harness = staticmethod(harness)
    node_of = staticmethod(node_of)
    random_inputs = staticmethod(random_inputs)
    onnxruntime_codes = staticmethod(onnxruntime_codes)
    made = staticmethod(made)
    convolution = staticmethod(convolution)
    linear = staticmethod(linear)
    layout = layout

    @staticmethod
    def op(name: str) -> Op:
        return ops()[name]


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="session")
def lowered() -> Callable[..., Any]:
    """lowered(op, tensors, attributes) -> the ONNX model of one fused op on x (..., in), without tracing a module for it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from planish.export.lowering import OPSET
    from planish.kernels import fused

    def build(name: str, tensors: dict[str, Any], attributes: dict[str, Any], rank: int = 3) -> onnx.ModelProto:
        op = fused.ops()[name]
        arrays = {f"fc.weight_{k}": np.asarray(v) for k, v in tensors.items() if v is not None}
        shape = [f"d{i}" for i in range(rank)]
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
        graph = helper.make_graph(
            [], name, values[:1], values[1:], [numpy_helper.from_array(v, n) for n, v in arrays.items()]
        )
        builder = fused.Builder(graph, dict(arrays), taken={"x", "y", *arrays})
        given = {"x": "x"} | {k: f"fc.weight_{k}" for k, v in tensors.items() if v is not None}
        (y,) = op.lower(fused.Call("fc", given, attributes), builder)
        graph.node.extend(builder.nodes)
        graph.node.append(helper.make_node("Identity", [y], ["y"]))
        used = {i for n in graph.node for i in n.input}
        for unused in [i for i in graph.initializer if i.name not in used]:
            graph.initializer.remove(unused)
        opsets = [helper.make_opsetid(d, 1 if d else OPSET) for d in op.domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        return model

    return build
