"""Feature maps of a deployment graph in fewer bits: other scales and zero points for some tensors, and the layers around them fitted.

    code' = clip(round(real / scale') + zero_point', -2^(bits-1), 2^(bits-1) - 1)

A layer that writes such a map has its rescale multiplied by scale / scale'; one that reads it by scale' / scale, with its bias
in units of the new scale. Scale and zero point are those with the least squared error over a histogram of int8 codes; 0 stays exact,
since padding needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..kernels.op import Array, Node, Tensor, Unsupported
from ..kernels.weights import folded_bias
from .graph import Graph

WEIGHTED = ("conv2d", "depthwise_conv2d", "fully_connected")
MOVES = ("slice", "paste")
"""their output has their input's quantization"""
OPS = (*WEIGHTED, "add", *MOVES)
"""ops whose portable kernels take packed codes"""
SHARES = np.linspace(1.0, 0.15, 18)
"""parts of the observed range, at each end, that are tried"""


def takes(node: Node) -> bool:
    """Whether a node's tensors can have fewer than 8 bits: its portable kernel takes packed codes, and all fits their form."""
    return node.op in OPS and (
        node.op != "add" or (all(t.shape == node.output.shape for t in node.inputs) and len(node.inputs) == 2)
    )


def fit(tensor: Tensor, counts: Array, bits: int) -> Tensor:
    """The tensor in `bits` bits, for how often each int8 code from -128 on occurs, (256,)."""
    least, levels = -(1 << bits - 1), (1 << bits) - 1
    value = np.arange(-128, 128, dtype=np.float64) - tensor.zero_point  # in units of the scale
    seen = np.flatnonzero(counts)
    low, high = (min(0.0, value[seen[0]]), max(0.0, value[seen[-1]])) if seen.size else (0.0, 0.0)
    best = np.inf, 1.0, 0
    for below in SHARES if low < 0 else SHARES[:1]:
        for above in SHARES if high > 0 else SHARES[:1]:
            step = max(high * above - low * below, 1.0) / levels
            zero = int(np.clip(np.rint(least - low * below / step), least, least + levels))
            codes = np.clip(np.rint(value / step) + zero, least, least + levels)
            error = float((counts * ((codes - zero) * step - value) ** 2).sum())
            if error < best[0]:
                best = error, step, zero
    return replace(tensor, scale=np.float32(tensor.scale * best[1]), zero_point=best[2], bits=bits)


def codes(tensor: Tensor, narrow: Tensor) -> Array:
    """int8 (256,): the narrow code of every code of an int8 tensor, from -128 on."""
    least = -(1 << narrow.bits - 1)
    real = tensor.scale * (np.arange(-128, 128, dtype=np.float64) - tensor.zero_point)
    return np.clip(np.rint(real / narrow.scale) + narrow.zero_point, least, -least - 1).astype(np.int8)


def apply(graph: Graph, chosen: Mapping[str, Tensor]) -> Graph:
    """The graph with some tensors replaced by those of `chosen`, by name. Raises Unsupported where a layer cannot follow."""
    borders = {p.tensor.name for p in (*graph.inputs, *graph.outputs)}
    for name in chosen:
        if name in borders:
            raise Unsupported(f"'{name}' is an input or output of the model, whose codes have 8 bits")
    return replace(graph, nodes=tuple(_node(n, chosen) for n in graph.nodes))


def _node(node: Node, chosen: Mapping[str, Tensor]) -> Node:
    inputs = tuple(replace(chosen[t.name], shape=t.shape) if t.name in chosen else t for t in node.inputs)
    output = replace(chosen[node.output.name], shape=node.output.shape) if node.output.name in chosen else node.output
    made = replace(node, inputs=inputs, output=output)
    if inputs == node.inputs and output == node.output:
        return node
    if not takes(node):
        raise Unsupported(f"'{node.name}' ({node.op}) takes codes of 8 bits")
    if node.op in MOVES:
        kinds = {(float(t.scale), t.zero_point, t.bits) for t in (*inputs, output)}
        if len(kinds) > 1:
            raise Unsupported(f"'{node.name}' ({node.op}) moves codes; all its tensors need one quantization")
        return made
    attributes = {**node.attributes, **_bounds(node, output)}
    if node.op == "add":
        attributes |= {"scales": tuple(t.scale for t in inputs), "zero_points": tuple(t.zero_point for t in inputs)}
        return replace(made, attributes=attributes)
    into = float(inputs[0].scale) / float(node.inputs[0].scale)
    out = float(node.output.scale) / float(output.scale)
    made = replace(
        made,
        attributes=attributes,
        constants={
            **node.constants,
            "rescale": (node.constants["rescale"].astype(np.float64) * into * out).astype(np.float32),
            "bias": np.rint(node.constants["bias"] / into).astype(np.int32),
        },
    )
    folded_bias(made)  # refuses sums that do not fit
    return made


def _bounds(node: Node, output: Tensor) -> dict[str, int]:
    """The clamp of a node, in codes of its new output: the same real values, as far as there are codes for them."""
    least = -(1 << output.bits - 1)
    found: dict[str, int] = {}
    for bound in ("low", "high"):
        real = float(node.output.scale) * (node.attributes[bound] - node.output.zero_point)
        found[bound] = int(np.clip(np.rint(real / float(output.scale)) + output.zero_point, least, -least - 1))
    return found
