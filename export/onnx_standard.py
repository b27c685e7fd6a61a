"""Format `onnx_standard`: as `onnx`, with nothing but ops of the ONNX standard, for runtimes that lack ONNX Runtime's own.

A product with packed weights (MatMulNBits) becomes a block-wise DequantizeLinear of 4- or 8-bit codes and a MatMul (opset 21). ONNX
Runtime fuses the pair again when it loads the file, at the accuracy level of its session option
`session.qdq_matmulnbits_accuracy_level`: planish's runtime `ort` sets 0 (exact), ONNX Runtime's default is 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ..common.errors import PlanishError, listed
from ..kernels import matmul_nbits, packing
from ..targets.target import Target
from .format import Source, Written
from .onnx import Onnx, onnx_opset

OPSET = 21
"""the first whose DequantizeLinear takes blocks and 4-bit codes"""
TYPES = {4: TensorProto.UINT4, 8: TensorProto.UINT8}
"""element type of the codes, by bits"""


class OnnxStandard(Onnx):
    """ONNX opset 21 without contributed ops; low-bit weights in block-wise DequantizeLinear."""

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Write model.onnx. Raises PlanishError, as `onnx` does, and for a contributed op that has no standard form."""
        return super().write(replace(source, onnx=standard(source.onnx)), target, folder)


def standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in standard ops. Raises PlanishError for an op that has no such form."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    nodes: list[onnx.NodeProto] = []
    constants = {i.name: i for i in graph.initializer}
    unknown = []
    for node in graph.node:
        if node.domain in ("", "ai.onnx"):
            nodes.append(node)
        elif node.op_type == matmul_nbits.OP and _int(node, "bits") in TYPES:
            nodes += _product(node, constants, graph)
        else:
            unknown.append(f"{node.name} ({node.op_type})")
    if unknown:
        raise PlanishError(
            f"format 'onnx_standard' has no form for {listed(unknown)}; format 'onnx' runs them in ONNX Runtime"
        )
    if onnx_opset(made) < OPSET:
        raise PlanishError(f"format 'onnx_standard' needs opset {OPSET}; the graph has {onnx_opset(made)}")
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for n in nodes for name in n.input}
    kept = [i for i in graph.initializer if i.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    versions = [o for o in made.opset_import if o.domain in ("", "ai.onnx")]
    del made.opset_import[:]
    made.opset_import.extend(versions)
    return made


def _int(node: onnx.NodeProto, name: str) -> int:
    """An integer attribute."""
    return next(a.i for a in node.attribute if a.name == name)


def _product(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], graph: onnx.GraphProto
) -> Sequence[onnx.NodeProto]:
    """MatMulNBits as DequantizeLinear and MatMul (and Sum)."""
    bits, block, channels, outputs = (_int(node, n) for n in ("bits", "block_size", "K", "N"))
    places: tuple[str, ...] = ("x", "codes", "scale", "zero", "order", "bias")
    given: dict[str, str] = dict(zip(places, node.input, strict=False))
    if given.get("order"):
        raise PlanishError(f"format 'onnx_standard': '{node.name}' has columns in an order of their own")

    def array(name: str) -> np.ndarray[Any, Any]:
        return numpy_helper.to_array(constants[given[name]])

    codes = packing.unpack(torch.from_numpy(array("codes").copy()), bits, block).numpy()[:, :channels]  # (out, in)
    scale = array("scale").reshape(outputs, -1)  # (out, blocks)
    zero = np.full(scale.shape, 1 << (bits - 1), np.uint8)
    if given.get("zero"):
        packed = torch.from_numpy(array("zero").reshape(outputs, 1, -1).copy())
        zero = packing.unpack(packed, bits, scale.shape[1]).numpy()
    name = node.output[0]
    parts = [f"{name}.codes", f"{name}.scale", f"{name}.zero_point"]
    graph.initializer.extend(
        [
            _codes(parts[0], codes.T, bits),
            numpy_helper.from_array(np.ascontiguousarray(scale.T), parts[1]),
            _codes(parts[2], zero.T, bits),
        ]
    )
    weight, plain = f"{name}.weight", f"{name}.product" if given.get("bias") else name
    made = [
        helper.make_node("DequantizeLinear", parts, [weight], f"{node.name}.dequantize", axis=0, block_size=block),
        helper.make_node("MatMul", [given["x"], weight], [plain], node.name),
    ]
    if given.get(
        "bias"
    ):  # Sum, because ONNX Runtime makes a Gemm of MatMul and Add first, which it does not fuse with the codes
        made.append(helper.make_node("Sum", [plain, given["bias"]], [name], f"{node.name}.bias"))
    return made


def _codes(name: str, codes: np.ndarray[Any, Any], bits: int) -> onnx.TensorProto:
    """Codes as a tensor of 4 or 8 bits; of 4 bits two to a byte, the first in the low half."""
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    if bits == 4:
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        flat = flat[0::2] | flat[1::2] << 4
    return helper.make_tensor(name, TYPES[bits], codes.shape, flat.tobytes(), raw=True)
