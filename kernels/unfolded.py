"""Constants that ONNX Runtime must not compute ahead.

When a model is loaded, ONNX Runtime evaluates every node whose inputs are constant. A decode of packed weights would so turn back to
a float matrix in memory. Here the codes are made to depend on the input of the layer, by adding a zero that only the run
knows to be zero, so that they stay packed and are decoded in every call.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from .fused import Builder


def at_run_time(graph: Builder, codes: str, x: str, name: str, kind: int = TensorProto.UINT8) -> str:
    """The integers `codes` of an ONNX type as a value that depends on the floats `x`; names of new values start with `name`."""
    total = graph.one("ReduceSum", [x], f"{name}.total", keepdims=0)  # scalar; 0 for an empty x
    limit = shared(graph, "planish.infinity", np.array(np.inf, np.float32))
    never = graph.one("Greater", [total, limit], f"{name}.never")  # false for every float, NaN too
    zero = graph.one("Cast", [never], f"{name}.zero", to=kind)
    return graph.one("Add", [codes, zero], f"{name}.codes")


def look_up(graph: Builder, table: str, codes: str, name: str) -> str:
    """table[codes]: `table` has 256 rows, `codes` any shape uint8."""
    index = graph.one("Cast", [codes], f"{name}.index", to=TensorProto.INT32)
    return graph.one("Gather", [table, index], name, axis=0)


def shared(graph: Builder, name: str, value: np.ndarray) -> str:
    """A constant that all layers read under the same name."""
    return name if name in graph.constants else graph.constant(name, value)
