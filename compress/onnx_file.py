"""Reading an `.onnx` file: what is damaged is refused here, before other code trusts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.checker
from onnx import helper

from ..common.errors import PlanishError


def read(path: Path) -> onnx.ModelProto:
    """The checked model. Raises PlanishError, one line, for a file that is missing, damaged or no ONNX model."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        missing = f"model '{path}' does not exist" if not path.exists() else f"model '{path}' cannot be read: {error}"
        raise PlanishError(missing) from None
    except Exception as error:  # protobuf and the checker raise unrelated types for a damaged file
        raise _damaged(path, str(error).strip() or type(error).__name__) from None
    for text in _texts(model.graph):
        if not isinstance(text, str):  # protobuf hands out what is no UTF-8 as bytes
            raise _damaged(path, f"the name {text!r} is no text")
    for tensor in model.graph.initializer:
        try:
            helper.tensor_dtype_to_np_dtype(tensor.data_type)
        except (KeyError, ValueError):
            raise _damaged(path, f"constant '{tensor.name}' has the unknown type {tensor.data_type}") from None
    return model


def _damaged(path: Path, text: str) -> PlanishError:
    first = "".join(c if c.isprintable() else "?" for c in text.splitlines()[0][:200])
    return PlanishError(f"'{path}' is damaged or no ONNX model: {first}")


def _texts(graph: onnx.GraphProto) -> Iterator[object]:
    """Every name in the main graph."""
    yield graph.name
    for value in [*graph.input, *graph.output, *graph.value_info]:
        yield value.name
        yield from (d.dim_param for d in value.type.tensor_type.shape.dim)
    yield from (t.name for t in graph.initializer)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
