"""Weights of a deployment graph in fewer bits: codes of int8 weights rounded again, to 4 or 2 bits.

    step      the multiple of the int8 scale, per output channel, with the least squared error of the codes
    code'     = clip(round(code / step), -2^(bits-1), 2^(bits-1) - 1)
    rescale'  = float32(rescale * step),  bias' = round(bias / step)

Rounding twice costs little beside the second rounding itself: an int8 code is exact to 1/254 of the channel's range. Training
or GPTQ at the low width gives better weights; this is what a budget can do to a model that is already quantized.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from ..kernels import weights
from ..kernels.op import Array, Node, Unsupported
from .graph import Graph

OPS = ("conv2d", "depthwise_conv2d", "fully_connected")
TRIALS = np.linspace(0.4, 1.0, 31, dtype=np.float32)
"""shares of the range that are tried as the largest code"""


def bits(node: Node) -> int:
    """Width of a node's weight codes: the least of 8, 4 and 2 that holds them all; 8 for weights with a zero point."""
    return 8 if node.constants["weight_zero_point"].any() else weights.bits(node.constants["weight"])


def narrow(graph: Graph, width: int, names: Collection[str] | None = None) -> Graph:
    """The graph with the weights of the nodes called `names` (None: of all that have weights) in `width` bits, 4 or 2.

    Nodes whose weights are narrow already, or have zero points, stay as they are.
    """
    return replace(
        graph,
        nodes=tuple(
            node_in(n, width) if n.op in OPS and (names is None or n.name in names) and bits(n) > width else n
            for n in graph.nodes
        ),
    )


def node_in(node: Node, width: int) -> Node:
    """A node with its weights in `width` bits. Raises Unsupported for weights with a zero point."""
    if node.constants["weight_zero_point"].any():
        raise Unsupported("its weights have zero points; symmetric ones are supported")
    codes, step = _fit(node.constants["weight"], width)
    made = replace(
        node,
        constants={
            **node.constants,
            "weight": codes,
            "bias": np.rint(node.constants["bias"] / step.astype(np.float64)).astype(np.int32),
            "rescale": (node.constants["rescale"] * step).astype(np.float32),
        },
    )
    weights.folded_bias(made)  # refuses sums that do not fit
    return made


def _fit(weight: Array, width: int) -> tuple[Array, Array]:
    """Codes, and the step per output (out,) with the least squared error, for int8 codes (out, ...)."""
    low, high = -(1 << width - 1), (1 << width - 1) - 1
    rows = weight.reshape(len(weight), -1).astype(np.float32)  # (out, k)
    reach = np.maximum(
        np.abs(rows).max(axis=1) / high, 1
    )  # (out,); a step below 1 would gain nothing and enlarge the bias
    best = np.full(len(rows), np.inf, np.float32)
    step = reach.astype(np.float32)
    for trial in TRIALS:
        found = np.maximum(reach * trial, 1).astype(np.float32)
        restored = np.clip(np.rint(rows / found[:, None]), low, high) * found[:, None]
        error = np.square(restored - rows).sum(axis=1)
        step, best = np.where(error < best, found, step), np.minimum(error, best)
    codes = np.clip(np.rint(rows / step[:, None]), low, high).astype(np.int8)
    return codes.reshape(weight.shape), step.astype(np.float32)
