"""Pad with a constant: the padding is the code of that value, which for 0 is the zero point. Negative pads crop."""

from __future__ import annotations

import numpy as np

from . import integer, layout
from .op import Array, Call, FloatOp, Node, Op, Unsupported
from .parsing import clamp, constant, integers, only, tables


class Pad(Op):
    """Pad of mode constant; the batch stays as it is."""

    onnx_types = ("Pad",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op."""
        x = only(node)
        rank = len(x.shape)
        mode = node.attributes.get("mode", "constant")
        mode = mode.decode() if isinstance(mode, bytes) else mode
        if mode != "constant":
            raise Unsupported(f"mode '{mode}'; constant is supported")
        given = integers(node, "pads", 1)
        axes = integers(node, "axes", 3) or list(range(rank))
        if given is None or len(given) != 2 * len(axes):
            raise Unsupported(f"it has {0 if given is None else len(given)} pads; {2 * len(axes)} are expected")
        if rank > layout.MOST_DIMENSIONS + 1:
            raise Unsupported(f"it has {rank} dimensions; up to {layout.MOST_DIMENSIONS + 1} are supported")
        before, after = [0] * rank, [0] * rank
        for i, a in enumerate(axes):
            before[a % rank], after[a % rank] = given[i], given[len(axes) + i]
        shape = tuple(b + d + e for b, d, e in zip(before, x.shape, after, strict=True))
        if shape != node.output.shape or before[0] or after[0]:
            raise Unsupported(f"shape {x.shape} padded by {given} is not {node.output.shape} with the same batch")
        if any(max(-b, 0) + max(-e, 0) >= d for b, d, e in zip(before, x.shape, after, strict=True)):
            raise Unsupported("it crops all of its input")
        found = constant(node, 2)
        real = np.float32(node.attributes.get("value", 0.0) if found is None else np.asarray(found).item())
        bounds = clamp(node)
        code = int(np.clip(integer.quantize(np.asarray(real), node.output), bounds["low"], bounds["high"]))
        attributes = {"before": tuple(before), "after": tuple(after), "value": code}
        return Node("pad", node.name, (x,), node.output, attributes, tables(node))

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        a = node.attributes
        (x,) = inputs
        y = np.full((len(x), *node.output.shape[1:]), a["value"], np.int8)
        source, target = [slice(None)], [slice(None)]
        for before, after, size in zip(a["before"][1:], a["after"][1:], x.shape[1:], strict=True):
            source.append(slice(max(-before, 0), size - max(-after, 0)))
            target.append(slice(max(before, 0), max(before, 0) + size - max(-before, 0) - max(-after, 0)))
        y[tuple(target)] = integer.look_up(x[tuple(source)], node.constants.get("table"))
        return y

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op."""
        a = node.attributes
        shape = node.inputs[0].shape
        x_strides, y_strides = layout.strides(shape), layout.strides(node.output.shape)
        sizes = [d - max(-b, 0) - max(-e, 0) for d, b, e in zip(shape, a["before"], a["after"], strict=True)]
        axes = layout.order(len(shape))[1:]
        return Call(
            kernel="pad",
            sources=("pad.c",),
            fields={
                "dimensions": len(axes),
                "size": node.output.size,
                "x_offset": sum(max(-b, 0) * s for b, s in zip(a["before"], x_strides, strict=True)),
                "y_offset": sum(max(b, 0) * s for b, s in zip(a["before"], y_strides, strict=True)),
                "value": a["value"],
            },
            arrays={
                "sizes": np.array([sizes[i] for i in axes], np.int32),
                "x_strides": np.array([x_strides[i] for i in axes], np.int32),
                "y_strides": np.array([y_strides[i] for i in axes], np.int32),
                **node.constants,
            },
            comments={"sizes": "of the input's box, outermost first", "table": "new code for every code from -128 on"},
        )
