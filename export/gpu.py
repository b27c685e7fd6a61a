"""A compressed program as a GPU runs it: 16-bit activations, packed weights, fused nodes.

    tidy -> norms, attention as one node each -> layers that read one tensor merged -> 16 bits -> packed GPU forms -> epilogues -> roundings

Every step is a file of its own, gpu_<step>.py. The result is a program of ATen ops and `planish::gpu_*` nodes that also runs on the CPU,
by the references, which define its numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..compress import layers
from ..compress.model import Model
from ..kernels.gpu.core import Core
from . import gpu_attention, gpu_epilogue, gpu_layers, gpu_merge, gpu_norms, gpu_precision, gpu_tidy


@dataclass(frozen=True)
class Rewritten:
    """The program, and what became of the layers."""

    model: Model
    ops: Mapping[str, int]
    """GPU nodes by the name of their op, and products that PyTorch computes, by theirs"""
    merged: tuple[tuple[str, ...], ...]
    """layers that are one each"""
    tails: int
    """nodes behind linear layers that their kernels compute: activations, products, sums"""
    norms: int
    normed_roundings: int
    """of the norms, those that are part of the rounding to codes"""
    attentions: int
    left: tuple[tuple[str, str], ...]
    """(layer, why it stays in PyTorch's ops)"""


def rewrite(model: Model, core: Core, dtype: torch.dtype = torch.bfloat16) -> Rewritten:
    """The model for `core` with activations in `dtype` (bfloat16 or float16). The given model is not changed."""
    made = model.editable()
    gpu_tidy.tidy(made)
    norms = gpu_norms.fuse(made)
    attentions = gpu_attention.fuse(made)
    merged = gpu_merge.merge(made)
    found = gpu_layers.sort(made, core)
    gpu_precision.narrow(made, dtype, found.fused)
    gpu_layers.pack(made, found.fused, core, dtype)
    tails = gpu_epilogue.fuse(made)
    normed = gpu_norms.fuse_rounding(made)
    left = (*found.left, *gpu_layers.unfused(made))
    made.graph.graph.lint()
    made.graph.recompile()
    names = (layers.op(n) for n in made.graph.graph.nodes)
    ops = Counter(n.partition(".")[2] for n in names if n.startswith("planish.") or n in gpu_precision.PRODUCTS)
    return Rewritten(made, dict(sorted(ops.items())), tuple(merged), tails, norms, normed, attentions, left)
