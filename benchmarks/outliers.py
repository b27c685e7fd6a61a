"""Outliers put into a model without changing what it computes, for the comparison of methods that handle them.

A few channels of each norm's gain are multiplied by a factor, and the columns of the linears that read the norm are divided by
it (the construction of Wei et al. 2022, "Outlier Suppression", run backwards). The activations between get the channel-wise
outliers that large language models have; in exact arithmetic the function is the same.
"""

from __future__ import annotations

import torch
from planish.compress import blocks, layers
from planish.compress.blocks import Linear
from planish.compress.model import Model
from torch.fx import GraphModule

aten = torch.ops.aten
GAINS = (aten.mul.Tensor, aten.rms_norm.default, aten.layer_norm.default)


def gains(node):
    """(index of the argument, node of the parameter) of each vector that scales the channels of what a norm gives."""
    if node.target is aten.mul.Tensor:
        return [(i, a) for i, a in enumerate(node.args[:2]) if layers.is_parameter(a)]
    if node.target is aten.rms_norm.default:
        return [(2, node.args[2])]
    if node.target is aten.layer_norm.default:
        return [(i, node.args[i]) for i in (2, 3)]
    return []


def behind_norms(module: GraphModule) -> list[list[Linear]]:
    """The groups of linears that alone read a norm with a gain; an `lm_head` is in none."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    found = []
    for group in blocks.groups(module, nodes, lambda name: not name.endswith("lm_head")):
        source = group[0].source
        if source.target in GAINS and gains(source) and set(source.users) == {item.node for item in group}:
            found.append(group)
    return found


def factors(width: int, channels: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """(width,) ones, and in `channels` places drawn by the generator numbers between `low` and `high`."""
    found = torch.ones(width)
    picked = torch.randperm(width, generator=generator)[:channels]
    found[picked] = low + (high - low) * torch.rand(channels, generator=generator)
    return found


def inject(
    model: Model, channels: int = 4, low: float = 20, high: float = 60, seed: int = 0
) -> tuple[Model, dict[str, list[int]]]:
    """The same function with outliers, and the chosen channels by the name of the gain."""
    model = model.editable()
    generator = torch.Generator().manual_seed(seed)
    module = model.graph
    chosen: dict[str, list[int]] = {}
    for group in behind_norms(module):
        source = group[0].source
        factor = factors(group[0].weight.shape[1], channels, low, high, generator)
        for index, parameter in gains(source):
            name = str(layers.parameter(parameter))
            layers.store(module, source, index, name, layers.value(module, parameter) * factor)
            chosen[name] = (factor != 1).nonzero().flatten().tolist()
        for item in group:
            layers.store(module, item.node, 1, f"{item.name}.weight", item.weight / factor)
    layers.drop_unused(module)
    return model, chosen
