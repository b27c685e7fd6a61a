"""Outliers inside Mamba blocks, put in without changing what the model computes. Those at the norms are made by outliers.py.

Like there, a channel of what one layer gives is multiplied by a factor between `low` and `high`, and the next layer's weights for
it are divided by it. Three tensors of a block allow that: what the convolution reads (rows of in_proj, taps), the step's
low-rank form (rows of x_proj, columns of dt_proj), and B against C (rows of x_proj; the state grows by the factor). The gate
and the scan's output allow none: SiLU stands in between.
"""

from __future__ import annotations

import torch
from outliers import factors
from planish.compress import layers, mamba_graph
from planish.compress.model import Model

SITES = ("convolution", "step", "state")


def inject(
    model: Model, sites: tuple[str, ...] = SITES, channels: int = 4, low: float = 20, high: float = 60, seed: int = 0
) -> Model:
    """The same function with outliers in `channels` channels, and in one of the few steps' and states' dimensions."""
    model = model.copy()
    module = model.graph
    generator = torch.Generator().manual_seed(seed)

    for block in mamba_graph.blocks(model):
        nodes = {"in_proj": block.in_proj, "conv1d": block.conv, "x_proj": block.x_proj, "dt_proj": block.dt_proj}
        weights = {name: layers.value(module, node.args[1]).clone() for name, node in nodes.items()}
        width, states = layers.value(module, block.scan.args[2]).shape
        rank = weights["dt_proj"].shape[1]
        if layers.argument(block.in_proj, "bias") is not None or layers.argument(block.x_proj, "bias") is not None:
            raise ValueError(f"{block.name}: biases in front of the outliers are not provided for")
        if "convolution" in sites:
            f = factors(width, channels, low, high, generator)
            weights["in_proj"][:width] *= f[:, None]
            weights["conv1d"] /= f[:, None, None]
        if "step" in sites:
            f = factors(rank, 1, low, high, generator)
            weights["x_proj"][:rank] *= f[:, None]
            weights["dt_proj"] /= f
        if "state" in sites:
            f = factors(states, 1, low, high, generator)
            weights["x_proj"][rank : rank + states] *= f[:, None]
            weights["x_proj"][rank + states :] /= f[:, None]
        for name, node in nodes.items():
            layers.store(module, node, 1, f"{block.name}.{name}.weight", weights[name])
    layers.drop_unused(module)
    return model
