"""How important a group of channels is: weight norms, batch-norm gains, or the loss that its removal would cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from .. import layers
from ..data import Data
from ..model import Model
from .dependency import Dependencies

Criterion = Literal["l1", "l2", "bn_gain", "taylor"]


def norms(model: Model, found: Dependencies, power: int) -> dict[int, float]:
    """Sum over a group's weight slices of their L1 or L2 norm, each relative to the mean slice of its weight.

    The slices are the filters that make a channel and the columns that read it (group norm of Fang et al. 2023);
    dividing by each weight's mean makes layers of different scale comparable (L1: Li et al. 2017, "Pruning Filters").
    A sum, since a channel that many layers share is needed by all of them.
    """
    per_group: dict[int, float] = {}
    for (name, axis), units in found.axes.items():
        weight = layers.tensor(model.graph, name).detach()
        if weight.ndim < 2:
            continue
        slices = weight.movedim(axis, 0).flatten(1).double()  # (positions, elements)
        size = torch.linalg.vector_norm(slices, ord=power, dim=1)  # (positions,)
        _collect(per_group, found, units, size / size.mean().clamp_min(1e-30))
    return per_group


def gains(model: Model, found: Dependencies) -> dict[int, float]:
    """Sum of |gain| over a group's batch norms, each relative to its layer's mean (Liu et al. 2017, "Network Slimming")."""
    per_group: dict[int, float] = {}
    for node in model.graph.graph.nodes:
        if layers.op(node) != "aten.batch_norm":
            continue
        gain = layers.argument(node, "weight")
        units = found.axes.get((str(gain.target), 0)) if isinstance(gain, torch.fx.Node) else None
        if units is not None:
            size = layers.tensor(model.graph, str(gain.target)).detach().double().abs()  # (channels,)
            _collect(per_group, found, units, size / size.mean().clamp_min(1e-30))
    return per_group


def taylor(model: Model, found: Dependencies, data: Data, batch: int, generator: torch.Generator) -> dict[int, float]:
    """Expected square of the loss change, to first order, when a group is removed.

    Removing a channel is the same as zeroing the weight columns that read it, so the change is the sum of
    weight * gradient over those columns; it is squared per batch and averaged (Molchanov et al. 2019, "Importance
    Estimation for Neural Network Pruning", eq. 8, with the columns as the gate). With labels the loss is the cross
    entropy; without, a random projection of the outputs, so that the score is the expected squared change of the outputs.
    """
    names = sorted({name for name, _ in found.consumers})
    weights = [layers.tensor(model.graph, name).requires_grad_(True) for name in names]
    index = {name: i for i, name in enumerate(names)}
    total: dict[int, float] = {}
    labels = data.labels
    count, start = 0, 0
    for inputs in data.batches(model, batch):
        wanted = None
        if labels is not None:
            wanted = torch.from_numpy(labels[start : start + len(inputs[0])]).long()
            start += len(inputs[0])
        loss = _loss(model(*inputs), wanted, generator)
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        change: dict[int, float] = {}
        for name, axis in sorted(found.consumers):
            weight, grad = weights[index[name]], grads[index[name]]
            if grad is None:
                continue
            slices = (weight * grad).detach().movedim(axis, 0).flatten(1).double().sum(1)  # (positions,)
            units = found.axes[name, axis]
            for unit, value in zip(units, slices.tolist(), strict=True):
                group = found.group(unit)
                change[group] = change.get(group, 0.0) + value
        for group, value in change.items():
            total[group] = total.get(group, 0.0) + value * value
        count += 1
    return {group: value / max(count, 1) for group, value in total.items()}


def _loss(
    outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    found = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    if labels is not None:
        return torch.nn.functional.cross_entropy(found[0], labels)
    projected = [(o * torch.randn(o.shape, generator=generator)).sum() for o in found if o.is_floating_point()]
    return torch.stack(projected).sum()


def _collect(into: dict[int, float], found: Dependencies, units: Iterable[int], size: torch.Tensor) -> None:
    for unit, value in zip(units, size.tolist(), strict=True):
        group = found.group(unit)
        into[group] = into.get(group, 0.0) + value
