"""A model's inputs, outputs and states as an ONNX file without nodes: for formats that write the program itself, whatever its size.

An ONNX file ends at 2 GiB, and making one takes the weights' memory again.
"""

from __future__ import annotations

import re

import onnx
import torch
from onnx import helper
from torch.utils._pytree import tree_leaves

from ..compress.model import Model, output_names
from . import metadata

BATCH = "batch"


def interface(model: Model) -> onnx.ModelProto:
    """Names, types and shapes as `lowering.to_onnx` gives them; a dynamic dimension that is a sum is spelled as one, `past + length`."""
    graph = model.program().graph
    named: dict[str, str] = {}
    inputs = []
    given = [n for n in graph.nodes if n.op == "placeholder"][-len(model.inputs) :]  # behind the parameters
    for item, node in zip(model.inputs, given, strict=True):
        sizes = node.meta["val"].shape
        if model.batched:
            named[str(sizes[0])] = BATCH
        named |= {str(s): name for s, name in zip(sizes, item.dims, strict=False) if name}
        inputs.append((item.name, node.meta["val"]))
    outputs = [
        (n, v.meta["val"]) for n, v in zip(output_names(model), tree_leaves(graph.output_node().args), strict=True)
    ]
    taken, given_back = ([_value(name, value, named) for name, value in side] for side in (inputs, outputs))
    made = helper.make_model(helper.make_graph([], "interface", taken, given_back))
    metadata.put(made, metadata.STATES, [i.name for i in model.inputs if i.state])
    return made


def _value(name: str, value: torch.Tensor, named: dict[str, str]) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=value.dtype).numpy().dtype)
    return helper.make_tensor_value_info(
        name, kind, [d if isinstance(d, int) else _spelled(str(d), named) for d in value.shape]
    )


def _spelled(size: str, named: dict[str, str]) -> str:
    """An expression of torch's symbols in the names of the inputs' dimensions."""
    return re.sub(r"\w+", lambda word: named.get(word[0], word[0]), size)
