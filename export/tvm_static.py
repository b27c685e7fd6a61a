"""What a graph of fixed shapes tells before it runs: the shape of every tensor, and the value of every one that no input reaches.

TVM's importer takes positions, masks and other arithmetic on shapes as computations on tensors of unknown size; after this pass
they are constants. Unlike fold.py it keeps the ONNX graph, and knows the shapes of fused ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from ml_dtypes import bfloat16
from onnx import TypeProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator
from torch._subclasses.fake_tensor import FakeTensorMode

from . import fold, fused

LARGEST_OPERAND = 4096
"""elements of a constant whose values shape inference may need (target shapes, axes)"""
KEPT = ("QuantizeLinear", "DequantizeLinear")
"""ops on constants that stay: what they compute is how the weight is stored"""


def static(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, whose inputs have fixed shapes, with constants evaluated, dead nodes dropped and every known shape in `value_info`.

    A tensor whose shape depends on data is left without one.
    """
    return _Static(model).run()


class _Static:
    """One pass over the nodes in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.stored = {t.name: t for t in model.graph.initializer}
        self.types: dict[str, TypeProto] = {v.name: v.type for v in model.graph.input}
        self.types |= {n: helper.make_tensor_type_proto(t.data_type, t.dims) for n, t in self.stored.items()}
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)

    def run(self) -> onnx.ModelProto:
        nodes = [node for node in self.model.graph.node if not self._evaluated(node)]
        outputs = {o.name for o in self.model.graph.output}
        needed = set(outputs)
        live: list[onnx.NodeProto] = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                live.insert(0, node)
                needed.update(node.input)
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        graph = made.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(live)
        graph.initializer.extend(
            self.stored.get(n) or numpy_helper.from_array(a, n) for n, a in self.constants.items() if n in needed
        )
        results = {o for node in live for o in node.output}
        graph.value_info.extend(
            helper.make_value_info(n, t) for n, t in self.types.items() if n in results and n not in outputs
        )
        for output in graph.output:
            if output.name in self.types:
                output.type.CopyFrom(self.types[output.name])
        return made

    def _evaluated(self, node: onnx.NodeProto) -> bool:
        """Whether the node's results are constants; else their shapes are noted."""
        shape = self._shape(node.input[0]) if node.op_type == "Shape" else None
        if shape is not None:
            extra = fold.attributes(node)
            self._constant(node.output[0], np.array(shape[extra.get("start", 0) : extra.get("end")], np.int64))
            return True
        plain = node.domain in ("", "ai.onnx") and node.op_type not in KEPT
        if plain and all(n in self.constants for n in node.input if n) and not _has_graph(node):
            for name, value in self._evaluate(node).items():
                self._constant(name, value)
            return True
        self.types |= self._fused(node) if node.domain == fused.DOMAIN else self._inferred(node)
        return False

    def _evaluate(self, node: onnx.NodeProto) -> dict[str, np.ndarray]:
        """Results of a node whose inputs are constant, by ONNX Runtime (ONNX's reference has faults, GatherElements among them)."""
        import onnxruntime as ort

        values = {n: self.constants[n] for n in node.input if n}
        if any(v.dtype == bfloat16 for v in values.values()):  # a type that ONNX Runtime takes from no array
            return self._evaluate_bfloat16(node, values)
        inputs = [helper.make_value_info(n, self.types[n]) for n in values]
        outputs = [helper.make_empty_tensor_value_info(n) for n in node.output if n]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        version = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[version], ir_version=self.model.ir_version)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [o.name for o in outputs]
        return dict(zip(names, map(np.asarray, session.run(names, values)), strict=True))

    def _evaluate_bfloat16(self, node: onnx.NodeProto, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same by ONNX's reference."""
        inputs = [helper.make_value_info(n, self.types[n]) for n in values]
        outputs = [helper.make_empty_tensor_value_info(n) for n in node.output if n]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        found = ReferenceEvaluator(model).run(None, values)
        return dict(zip([o.name for o in outputs], map(np.asarray, found), strict=True))

    def _constant(self, name: str, value: np.ndarray) -> None:
        self.constants[name] = value
        self.types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where it is not known."""
        kind = self.types[name].tensor_type if name in self.types else None
        if kind is None or not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
            return None
        return tuple(d.dim_value for d in kind.shape.dim)

    def _inferred(self, node: onnx.NodeProto) -> dict[str, TypeProto]:
        """Types of the results by ONNX's own rules, given what is known."""
        if not defs.has(node.op_type, node.domain) or not all(n in self.types for n in node.input if n):
            return {}
        names = [n for n in node.input if n]
        values = {
            n: self.constants[n] for n in names if n in self.constants and self.constants[n].size <= LARGEST_OPERAND
        }
        try:
            found = shape_inference.infer_node_outputs(
                defs.get_schema(node.op_type, self.opset, node.domain),
                node,
                {n: self.types[n] for n in names},
                {n: self.stored.get(n) or numpy_helper.from_array(a, n) for n, a in values.items()},
                opset_imports=list(self.model.opset_import),
                ir_version=self.model.ir_version,
            )
        except (shape_inference.InferenceError, defs.SchemaError):
            return {}  # TVM's importer has its own rules, and names the node that it cannot take
        return {n: t for n, t in found.items() if n}

    def _fused(self, node: onnx.NodeProto) -> dict[str, TypeProto]:
        """Types of a fused op's results, by its shape function in torch."""
        call = fused.call(node)
        if any(self._shape(n) is None for n in call.tensors.values()):
            return {}
        with FakeTensorMode():
            tensors = {k: self._fake(v) for k, v in call.tensors.items()}
            op = fused.overload(node.op_type)
            absent = {a.name: None for a in op._schema.arguments if a.name not in tensors}
            results: Any = op(**(absent | tensors | dict(call.attributes)))
        results = results if isinstance(results, tuple) else (results,)
        return {
            n: helper.make_tensor_type_proto(_element(r.dtype), tuple(r.shape))
            for n, r in zip(node.output, results, strict=False)
        }

    def _fake(self, name: str) -> torch.Tensor:
        kind = helper.tensor_dtype_to_np_dtype(self.types[name].tensor_type.elem_type)
        return torch.empty(self._shape(name) or (), dtype=torch.from_numpy(np.empty(0, kind)).dtype)


def _element(dtype: torch.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)


def _has_graph(node: onnx.NodeProto) -> bool:
    return any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)
