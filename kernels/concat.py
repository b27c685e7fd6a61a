"""Join tensors along one axis. An input whose quantization is not the output's goes through a table of 256 codes:

    table[code] = saturate(round_half_even(x_scale * (code - x_zp) / y_scale) + y_zp)

Equal to ONNX Runtime's QLinearConcat bit for bit.
"""

from __future__ import annotations

import math

import numpy as np

from . import integer, layout
from .op import Array, Call, FloatOp, Node, Op, Unsupported, activations
from .parsing import axis, clamp


class Concat(Op):
    """Concat of activations."""

    onnx_types = ("Concat",)

    def parse(self, node: FloatOp) -> Node | None:
        """See Op. Constants `table_<i>` for the inputs that need one."""
        inputs = activations(node.inputs)
        if len(inputs) != len(node.inputs) or not inputs:
            raise Unsupported("an input is constant; activations are supported")
        at = axis(node, len(node.output.shape), 1)
        if at == 0:
            raise Unsupported("it joins along the batch")
        for x in inputs:
            if [d for i, d in enumerate(x.shape) if i != at] != [d for i, d in enumerate(node.output.shape) if i != at]:
                raise Unsupported(f"input shape {x.shape} does not fit output shape {node.output.shape}")
        bounds = clamp(node)
        found = [integer.rescale_table(x, node.output, bounds["low"], bounds["high"]) for x in inputs]
        constants = {f"table_{i}": t for i, t in enumerate(found) if t is not None}
        return Node("concat", node.name, inputs, node.output, {"axis": at}, constants)

    def reference(self, node: Node, *inputs: Array) -> Array:
        """See Op."""
        moved = [integer.look_up(x, node.constants.get(f"table_{i}")) for i, x in enumerate(inputs)]
        return np.concatenate(moved, axis=node.attributes["axis"])

    def macs(self, node: Node) -> int:
        """See Op."""
        return 0

    def call(self, node: Node) -> Call:
        """See Op. Inputs of the same quantization share one table."""
        at = layout.order(len(node.output.shape)).index(node.attributes["axis"])
        shapes = [layout.memory_shape(x.shape) for x in node.inputs]
        outer = math.prod(shapes[0][:at])
        tables: list[Array] = []
        mapped: list[int] = []
        for i in range(len(node.inputs)):
            table = node.constants.get(f"table_{i}")
            same = [k for k, t in enumerate(tables) if table is not None and np.array_equal(t, table)]
            if table is not None and not same:
                tables.append(table)
            mapped.append(-1 if table is None else same[0] if same else len(tables) - 1)
        return Call(
            kernel="concat",
            sources=("concat.c",),
            fields={"inputs": len(node.inputs), "outer": outer},
            arrays={
                "widths": np.array([math.prod(s[at:]) for s in shapes], np.int32),
                "mapped": np.array(mapped, np.int32),
                **({"tables": np.stack(tables)} if tables else {}),
            },
            comments={
                "widths": "codes of each input at a time",
                "mapped": "table of each input, -1 for none",
                "tables": "new code for every code from -128 on",
            },
            input_array=True,
            overlap=(outer - 1) * (node.output.size - node.inputs[0].size) // outer,
        )
