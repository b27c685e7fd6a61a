"""Which layer of the ONNX graph each kernel call of a Relax module computes: known by the weights that it reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from . import _tvm_compat

PRODUCTS = ("Conv", "Gemm", "MatMul")
"""ops with a weight tensor as their second input"""


def called(
    module: Any, model: onnx.ModelProto, packed: Sequence[tuple[str, np.ndarray]] = ()
) -> list[tuple[str, str | None]]:
    """[(kernel, name of the layer)] of `main` in the order of the calls; None for a kernel that reads no layer's weights.

    `model` is the ONNX graph that became `module`, whose weights must still be constants; `packed` names the constants of fused
    ops. Layers with equal weights are told apart by their order.
    """
    initializers = {t.name: t for t in model.graph.initializer}
    layers: dict[tuple[int, int], list[str]] = defaultdict(list)
    for node in model.graph.node:
        if node.op_type in PRODUCTS and node.input[1] in initializers:
            layers[_fingerprint(numpy_helper.to_array(initializers[node.input[1]]))].append(node.name or node.output[0])
    for layer, values in packed:
        layers[_fingerprint(values)].append(layer)
    found: list[tuple[str, str | None]] = []
    for kernel, operands in kernel_calls(module["main"]):
        named = [layers[key] for a in operands if is_constant(a) and (key := _fingerprint(a.value.numpy())) in layers]
        found.append((kernel, next((names.pop(0) for names in named if names), None)))
    return found


def kernel_calls(function: Any) -> list[tuple[str, list[Any]]]:
    """[(kernel, operands)] of a Relax function in the order of the calls."""
    values = [binding.value for block in function.body.blocks for binding in block.bindings]
    return [(v.args[0].name_hint, list(v.args[1].fields)) for v in values if is_kernel_call(v)]


def is_kernel_call(node: Any) -> bool:
    """Whether a Relax expression calls a kernel."""
    return getattr(getattr(node, "op", None), "name", "") == "relax.call_tir"


def is_constant(node: Any) -> bool:
    """Whether a Relax expression is a constant tensor."""
    relax = _tvm_compat.load().relax
    return isinstance(node, type(relax.const(0.0)))


def _fingerprint(values: np.ndarray) -> tuple[int, int]:
    """Equal for tensors with the same values in any order of axes: their number, and the sum of their bit patterns."""
    words = np.ascontiguousarray(values).reshape(-1).view(np.uint8 if values.itemsize < 4 else np.uint32)
    return values.size, int(words.sum(dtype=np.uint64))
