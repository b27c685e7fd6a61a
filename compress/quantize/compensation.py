"""Rounding of convolution and linear weights to given scales, where later inputs make up for the error of earlier ones (GPTQ).

A convolution is the linear layer that reads its windows, one such layer a group. See quantize.gptq for the method; there the codes are
packed for linear layers in groups of columns, here they stay whole numbers with one positive scale per output channel, which is what
convolutions of every runtime take.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from .. import layers
from .gptq import upper_factor
from .observers import watch

aten = torch.ops.aten
ROWS = 65536
"""windows of a batch that are looked at, evenly spread"""
DAMPING = 0.01
"""share of the Hessian's mean that is added to its diagonal"""


def hessians(
    module: GraphModule, nodes: list[Node], batches: Iterable[tuple[torch.Tensor, ...]]
) -> dict[Node, torch.Tensor]:
    """Mean of 2 x x^T over the windows that each layer reads, (groups, k, k) float64 with k = inputs of a group * taps."""
    total: dict[Node, torch.Tensor] = {}
    count: dict[Node, int] = {}
    readers: dict[Node, list[Node]] = {}
    for node in nodes:
        readers.setdefault(node.args[0], []).append(node)  # pyright: ignore[reportArgumentType]

    def see(source: Node, value: torch.Tensor) -> None:
        for node in readers[source]:
            x = windows(node, value)  # (groups, rows, k)
            x = x[:, :: -(-x.shape[1] // ROWS)]
            product = (x.transpose(1, 2) @ x).double()
            total[node] = product if node not in total else total[node].add_(product)
            count[node] = count.get(node, 0) + x.shape[1]

    watch(module, readers, batches, see)
    return {n: total[n] * (2 / count[n]) for n in nodes}


def windows(node: Node, x: torch.Tensor) -> torch.Tensor:
    """(groups, rows, k): what a layer multiplies with its weight (out, k), for its input x."""
    if node.target is aten.linear.default:
        return x.reshape(1, -1, x.shape[-1])
    shape = layers.argument(node, "weight").meta["val"].shape  # (out, in / groups, [kh,] kw)
    stride, padding, dilation = (_pair(layers.argument(node, n), len(shape) - 2, d) for n, d in _GEOMETRY)
    if len(shape) == 3:
        x = x.unsqueeze(2)
    kernel = (1, shape[2]) if len(shape) == 3 else tuple(shape[2:])
    found = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)  # (n, in * taps, positions)
    groups = int(layers.argument(node, "groups"))
    return found.reshape(len(found), groups, -1, found.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)


_GEOMETRY = (("stride", 1), ("padding", 0), ("dilation", 1))
"""arguments of a convolution, and what they are along the axis that a one-dimensional one lacks"""


def _pair(values: list[int], rank: int, lacking: int) -> tuple[int, int]:
    """Of a convolution's argument, which may name one number for all axes, the numbers for height and width."""
    full = list(values) * (rank if len(values) == 1 else 1)
    return (full[0], full[1]) if rank == 2 else (lacking, full[0])


def rounded(
    weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, low: int, high: int, name: str
) -> torch.Tensor:
    """Codes (out, ...) float32, whole numbers from low to high, of a weight (out, ...) with scale (out,) and Hessian (groups, k, k)."""
    rows = weight.reshape(len(hessian), -1, hessian.shape[-1])  # (groups, outs of a group, k)
    steps = scale.reshape(len(hessian), -1)
    found = [_group(w, s, h, low, high, name) for w, s, h in zip(rows, steps, hessian, strict=True)]
    return torch.cat(found).reshape(weight.shape)


def _group(
    weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, low: int, high: int, name: str
) -> torch.Tensor:
    """Codes (out, k) of one group, columns of large inputs first."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = upper_factor(hessian.clone(), DAMPING, order, name)  # (k, k)
    ratio = factor / factor.diagonal()
    rows = weight.T[order]  # (k, out)
    target, codes = rows.clone(), torch.empty_like(rows)
    for k in range(len(rows)):
        codes[k] = (target[k] / scale).round_().clamp_(low, high)
        target[k + 1 :].addr_(ratio[k, k + 1 :], rows[k] - codes[k] * scale)
    return torch.empty_like(codes).index_copy_(0, order, codes).T
