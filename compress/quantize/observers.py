"""Ranges of activations from calibration data: min-max, percentile, and least mean squared error.

All three work from the same two statistics of a tensor: its extremes (first pass over the data) and a histogram of
`BINS` equal bins between them (second pass).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import GraphModule, Interpreter, Node

from ...common.errors import PlanishError
from .. import layers

BINS = 2048

Observer = Literal["minmax", "percentile", "mse"]
Batches = Callable[[], Iterable[tuple[torch.Tensor, ...]]]


@dataclass
class Statistics:
    """What is kept of one activation tensor."""

    low: float
    high: float
    counts: torch.Tensor
    """(BINS,) float64, samples per bin between low and high"""


class _Watch(Interpreter):
    """Runs the graph and shows the value of chosen nodes to a function."""

    def __init__(self, module: GraphModule, nodes: set[Node], see: Callable[[Node, torch.Tensor], None]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # an error of ours stays one line
        self.nodes, self.see = nodes, see

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n in self.nodes:
            self.see(n, value)
        return value


def place(node: Node) -> str:
    """Dotted name of the module that holds a quantized activation's scale and zero point; never one of a module's own attributes."""
    taken = hasattr(torch.nn.Module, node.name)  # a conversion's node is called `to`
    return f"activations.{node.name}{'_' if taken else ''}"


def watch(module: GraphModule, nodes: Iterable[Node], batches: Iterable[tuple[torch.Tensor, ...]], see: Callable[[Node, torch.Tensor], None]) -> None:  # fmt: skip
    """Call `see(node, value)` for every chosen node and batch."""
    interpreter = _Watch(module, set(nodes), see)
    with torch.inference_mode():
        for batch in batches:
            interpreter.run(*batch)


def collect(module: GraphModule, nodes: list[Node], batches: Batches, histograms: bool) -> dict[Node, Statistics]:
    """Statistics of the chosen nodes; histograms cost a second run over the data."""
    low: dict[Node, float] = {}
    high: dict[Node, float] = {}

    def extremes(node: Node, value: torch.Tensor) -> None:
        small, large = torch.aminmax(value)
        if not (torch.isfinite(small) and torch.isfinite(large)):
            raise PlanishError(f"calibration: layer '{layers.layer(node)}' gives NaN or Inf values for finite inputs")
        low[node] = min(low.get(node, float("inf")), float(small))
        high[node] = max(high.get(node, float("-inf")), float(large))

    watch(module, nodes, batches(), extremes)
    counts = {n: torch.zeros(BINS, dtype=torch.float64) for n in nodes}
    if histograms:

        def histogram(node: Node, value: torch.Tensor) -> None:
            counts[node] += torch.histc(value.float(), BINS, low[node], high[node]).double()

        watch(module, [n for n in nodes if high[n] > low[n]], batches(), histogram)
    return {n: Statistics(low[n], high[n], counts[n]) for n in nodes}


def choose(stats: Statistics, observer: Observer, percentile: float, levels: int) -> tuple[float, float]:
    """The real range (low, high) to quantize, 0 included because padding and ReLU need an exact zero."""
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if observer == "minmax" or stats.high <= stats.low:
        return low, high
    width = (stats.high - stats.low) / BINS
    centres = stats.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)  # (BINS,)
    if observer == "percentile":
        tail = (1 - percentile / 100) * float(stats.counts.sum())
        above = torch.cumsum(stats.counts, 0)
        first = int((above > tail).nonzero()[0])
        last = int((above.flip(0)[0] - above <= tail).nonzero()[0])
        return min(stats.low + first * width, 0.0), max(stats.low + (last + 1) * width, 0.0)
    return _least_error(stats, centres, low, high, levels)


def _least_error(stats: Statistics, centres: torch.Tensor, low: float, high: float, levels: int) -> tuple[float, float]:
    """Of the ranges that shrink both ends by one factor, the one whose quantization of the histogram errs least."""
    factors = torch.linspace(0.3, 1.0, 141, dtype=torch.float64)[:, None]  # (141, 1)
    scale = factors * (high - low) / (levels - 1)  # (141, 1)
    zero = torch.round(-factors * low / scale)
    codes = torch.clamp(torch.round(centres[None] / scale) + zero, 0, levels - 1)  # (141, BINS)
    error = (((codes - zero) * scale - centres[None]) ** 2 * stats.counts[None]).sum(1)  # (141,)
    best = float(factors[int(error.argmin()), 0])
    return low * best, high * best
