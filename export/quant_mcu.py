"""QuantMCU (Tan et al. 2024): patches without outliers, and the maps after them, in 8, 4 or 2 bits, chosen by entropy and work.

Value-driven patch classification: with the values of the stage's input taken as Gaussian over the calibration data, a value is an
outlier when P(|Z| <= |x - mean| / deviation) > phi. A patch that holds one in any sample keeps 8 bits throughout; the others are searched.

Value-driven quantization search: for map i in b bits,

    S(i, b)     = -weight * loss(i, b) + (1 - weight) * saving(i, b)
    loss(i, b)  = max(0, 1 - H(i, b) / H(i, 8))           H: Shannon entropy of the codes over the calibration data
    saving(i, b) = 1 - BitOPs(i, b) / BitOPs(i, 8)         BitOPs: MACs * bits of weights * bits of activations, of the layers that read i

Every map takes the width of the highest score (the wider of equals), in dataflow order; then, as long as a step in which the map lives needs more
than the memory, its next lower width, until nothing changes. Weights keep their bits; nothing is trained. What a patch finds beyond its
range at run time saturates; `saturated` counts that on given data.

The paper leaves open: the outlier test (read as above), the visiting order, ties, and which maps count: here every map between
layers that take packed codes. Borders of the model stay 8 bits, and the map that patches are stitched into has one quantization.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from ..common.errors import PlanishError
from ..kernels.op import Array, Tensor
from . import memory, narrow, narrow_maps, patches
from .graph import Graph

WIDTHS = (8, 4, 2)
"""of maps, from which the search chooses"""
PHI = 0.96
WEIGHT = 0.6
"""the paper's trade-off between entropy (1) and work (0)"""


@dataclass(frozen=True)
class Map:
    """A feature map that the search may narrow: the same tensor of all searched patches, or a tensor outside the stage."""

    name: str
    """of the tensor in the graph without patches"""
    tensors: tuple[str, ...]
    """that stand for it in the patched graph"""
    choices: Mapping[int, Tensor]
    """its quantization by width; 8 is the original"""
    loss: Mapping[int, float]
    saving: Mapping[int, float]

    def best(self, weight: float) -> int:
        """The width of the highest score; the wider of equals."""
        return max(self.choices, key=lambda b: (-weight * self.loss[b] + (1 - weight) * self.saving[b], b))


@dataclass(frozen=True)
class Searched:
    """A graph with maps of several widths, and how it came about."""

    graph: Graph
    outliers: tuple[bool, ...]
    """by patch, row by row: whether it keeps 8 bits; empty without patches"""
    widths: Mapping[str, int]
    """bits by map; maps that are not named have 8"""
    weight: float
    bitops: int
    bitops_int8: int
    """of the same graph, patches included, with maps of 8 bits"""
    alive: int
    """bytes of tensors that live at once in the fullest step"""

    @property
    def mean_bits(self) -> float:
        """Over the maps that could be narrowed."""
        return sum(self.widths.values()) / max(1, len(self.widths))

    def summary(self) -> str:
        """One line for people."""
        count = {b: sum(w == b for w in self.widths.values()) for b in WIDTHS}
        return (
            f"{sum(self.outliers)} of {len(self.outliers)} patches hold outliers and keep 8 bits; maps of 8, 4, 2 bits: "
            f"{count[8]}, {count[4]}, {count[2]}; BitOPs {self.bitops / max(1, self.bitops_int8):.2f} of 8 bits; "
            f"{self.alive} bytes alive at once"
        )


@dataclass(frozen=True)
class Space:
    """What is searched: the patched graph, the classes of its patches, and the maps that can be narrowed."""

    graph: Graph
    outliers: tuple[bool, ...]
    maps: tuple[Map, ...]

    def weights(self) -> list[float]:
        """Every weight at which some map changes its width, ascending, with 0 and 1: between two neighbours nothing changes."""
        found = {0.0, 1.0}
        for m in self.maps:
            for one, other in itertools.combinations(m.choices, 2):
                work, loss = m.saving[other] - m.saving[one], m.loss[other] - m.loss[one]
                if work + loss > 0:
                    found.add(work / (work + loss))
        return sorted(found)

    def at(self, weight: float, ram: int) -> Searched:
        """The graph with the widths that `weight` gives in `ram` bytes."""
        widths = _assign(self.graph, self.maps, ram, weight)
        chosen = {name: m.choices[widths[m.name]] for m in self.maps if widths[m.name] < 8 for name in m.tensors}
        made = narrow_maps.apply(self.graph, {n: replace(t, name=n) for n, t in chosen.items()})
        return Searched(made, self.outliers, widths, weight, bitops(made), bitops(self.graph), memory.bound(made))


def space(
    graph: Graph,
    inputs: Mapping[str, Array],
    stage: patches.Stage | None = None,
    grid: tuple[int, int] = (1, 1),
    phi: float = PHI,
    widths: Sequence[int] = WIDTHS,
) -> Space:
    """The maps of an int8 graph, with `stage` in patches where one is given. `inputs` (n, ...) by name are the calibration data."""
    if not 0 <= phi <= 1:
        raise PlanishError(f"phi {phi}; numbers from 0 to 1 are accepted")
    if not set(widths) <= set(WIDTHS) or 8 not in widths:
        raise PlanishError(f"widths {list(widths)}; 8 and any of 4 and 2 are accepted")
    values = graph.codes(inputs)
    split, origins = (graph, {}) if stage is None else patches.split_with_origins(stage, grid)
    outliers = () if stage is None else classify(stage, grid, values, phi)
    parts = _parts(split, origins, outliers)
    maps = tuple(_maps(graph, split, values, parts, _regions(stage, grid, outliers), widths))
    return Space(split, outliers, maps)


def search(
    graph: Graph,
    inputs: Mapping[str, Array],
    ram: int,
    stage: patches.Stage | None = None,
    grid: tuple[int, int] = (1, 1),
    phi: float = PHI,
    weight: float = WEIGHT,
    widths: Sequence[int] = WIDTHS,
) -> Searched:
    """Choose the widths of the maps of an int8 graph. `ram` bytes are for tensors that live at once, without overlaps and scratch.

    Raises PlanishError where even the fewest bits need more.
    """
    if not 0 <= weight <= 1:
        raise PlanishError(f"weight {weight}; numbers from 0 to 1 are accepted")
    return space(graph, inputs, stage, grid, phi, widths).at(weight, ram)


def search_for_work(
    graph: Graph,
    inputs: Mapping[str, Array],
    ram: int,
    share: float,
    stage: patches.Stage | None = None,
    grid: tuple[int, int] = (1, 1),
    phi: float = PHI,
    widths: Sequence[int] = WIDTHS,
) -> Searched:
    """The same with the highest weight whose BitOPs are at most `share` of those with maps of 8 bits.

    Raises PlanishError where even weight 0 does more.
    """
    found = space(graph, inputs, stage, grid, phi, widths)
    steps = found.weights()
    tried = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(steps)), 1.0]
    low, high = 0, len(tried)  # BitOPs never fall with the weight: bisection
    best: Searched | None = None
    while low < high:
        middle = (low + high) // 2
        made = found.at(tried[middle], ram)
        if made.bitops <= share * made.bitops_int8:
            best, low = made, middle + 1
        else:
            high = middle
    if best is None:
        least = found.at(0.0, ram)
        raise PlanishError(
            f"BitOPs of at most {share} of 8 bits; with every map in the fewest bits they are "
            f"{least.bitops / least.bitops_int8:.3f} (the model's inputs and some layers keep 8 bits)"
        )
    return best


def bitops(graph: Graph) -> int:
    """MACs times bits of weights times bits of activations, of all layers."""
    return sum(
        graph.ops[n.op].macs(n) * (narrow.bits(n) if "weight" in n.constants else 8) * n.inputs[0].bits
        for n in graph.nodes
    )


def classify(stage: patches.Stage, grid: tuple[int, int], values: Mapping[str, Array], phi: float) -> tuple[bool, ...]:
    """For every patch, row by row, whether the part of the inputs that it reads holds an outlier in any sample.

    `values` are codes (n, c, h, w) by tensor name. phi 1: no value is one; phi 0: every value but the mean.
    """
    limit = math.inf if phi >= 1 else NormalDist().inv_cdf((1 + phi) / 2)
    far: dict[str, Array] = {}
    for name in stage.inputs:
        x = values[name].astype(np.float64)
        far[name] = (np.abs(x - x.mean()) > limit * x.std()).any(axis=(0, 1))  # (h, w)
    return tuple(
        any(bool(far[name][slice(*boxes[name].rows), slice(*boxes[name].columns)].any()) for name in far)
        for patch in stage.patches(grid)
        for boxes in [stage.boxes(patch)]
    )


def saturated(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, float]:
    """The share of codes at the ends of their range in every map of fewer than 8 bits, by tensor name."""
    values = graph.codes(inputs)
    found: dict[str, float] = {}
    for node in graph.nodes:
        y, bits = values[node.output.name], node.output.bits
        if bits < 8:
            ends = (y == (1 << bits - 1) - 1) | ((y == -(1 << bits - 1)) & (node.output.zero_point > -(1 << bits - 1)))
            found[node.output.name] = float(ends.mean())
    return found


def entropy(counts: Array) -> float:
    """Shannon entropy in bits of codes that occur `counts` times."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _parts(split: Graph, origins: Mapping[str, patches.Origin], outliers: Sequence[bool]) -> dict[str, list[str]]:
    """The tensors of the patched graph that stand for each map; those of outlier patches are left out."""
    found: dict[str, list[str]] = {}
    for node in split.nodes:
        origin = origins.get(node.output.name, patches.Origin(node.output.name, None))
        if origin.patch is None or not outliers[origin.patch]:
            found.setdefault(origin.map, []).append(node.output.name)
    return found


def _regions(
    stage: patches.Stage | None, grid: tuple[int, int], outliers: Sequence[bool]
) -> dict[str, list[patches.Box]]:
    """For every map inside the stage, the boxes of it that searched patches compute."""
    if stage is None:
        return {}
    inside = [n.output.name for n in stage.nodes if n.output.name != stage.output.name]
    boxes = [stage.boxes(p) for p, out in zip(stage.patches(grid), outliers, strict=True) if not out]
    return {name: [b[name] for b in boxes] for name in inside}


def _maps(
    graph: Graph,
    split: Graph,
    values: Mapping[str, Array],
    parts: Mapping[str, list[str]],
    regions: Mapping[str, list[patches.Box]],
    accepted: Sequence[int],
) -> Iterator[Map]:
    """Every map that can be narrowed, in dataflow order."""
    for node in graph.nodes:
        tensor = node.output
        names = parts.get(tensor.name, [])
        widths = [b for b in sorted(accepted, reverse=True) if tensor.shape[1] * b % 8 == 0]
        if not names or len(widths) < 2 or not _takes(split, set(names)):
            continue
        x = values[tensor.name]
        if tensor.name in regions:
            counts = sum(
                (_count(x[:, :, slice(*b.rows), slice(*b.columns)]) for b in regions[tensor.name]), _count(x[:0])
            )
        else:
            counts = _count(x)
        macs = sum(graph.ops[n.op].macs(n) for n in graph.nodes if tensor.name in [t.name for t in n.inputs])
        choices = {b: tensor if b == 8 else narrow_maps.fit(tensor, counts, b) for b in widths}
        saving = {b: 1 - b / 8 if macs else 0.0 for b in widths}
        yield Map(tensor.name, tuple(names), choices, _losses(tensor, choices, counts), saving)


def _takes(split: Graph, names: set[str]) -> bool:
    """Whether all layers that write or read these tensors take packed codes, and no border of the model is among them."""
    borders = {p.tensor.name for p in (*split.inputs, *split.outputs)}
    around = [n for n in split.nodes if n.output.name in names or any(t.name in names for t in n.inputs)]
    moved = all(
        {t.name for t in (*n.inputs, n.output)} <= names for n in around if n.op in narrow_maps.MOVES
    )  # a move of a part of them would mix quantizations
    return not names & borders and all(map(narrow_maps.takes, around)) and moved


def _assign(split: Graph, maps: Sequence[Map], ram: int, weight: float) -> dict[str, int]:
    """Widths by map: of the best score, then lower ones while a step in which a map lives needs more than `ram`."""
    steps, sizes = _alive(split)
    owner = {name: m.name for m in maps for name in m.tensors}
    lives: dict[str, set[int]] = {m.name: set() for m in maps}
    for step, names in enumerate(steps):
        for name in names:
            if name in owner:
                lives[owner[name]].add(step)
    widths = {m.name: m.best(weight) for m in maps}

    def need(step: int) -> int:
        return sum(-(-sizes[n] * (widths[owner[n]] if n in owner else 8) // 8) for n in steps[step])

    changed = True
    while changed:
        changed = False
        for m in maps:
            lower = [b for b in m.choices if b < widths[m.name]]
            if lower and any(need(s) > ram for s in lives[m.name]):
                widths[m.name] = max(lower)
                changed = True
    most = max(range(len(steps)), key=need)
    if need(most) > ram:
        raise PlanishError(
            f"memory of {ram} bytes for feature maps: layer '{split.nodes[most].name}' needs {need(most)}, "
            f"{need(most) - ram} more, with every map in its fewest bits"
        )
    return widths


def _alive(split: Graph) -> tuple[list[list[str]], dict[str, int]]:
    """Names of the buffers that live at each step, and their codes."""
    elements = {n: t.size for n, t in split.tensors.items()}
    buffers, _, _ = memory.demand(split, {}, memory.views(split))
    steps = [[b.name for b in buffers if b.first <= s <= b.last] for s in range(len(split.nodes))]
    return steps, {b.name: elements[b.name] for b in buffers}


def _losses(tensor: Tensor, choices: Mapping[int, Tensor], counts: Array) -> dict[int, float]:
    """What every width loses of the entropy of the codes. A lower width loses no less than a higher one."""
    full = entropy(counts)
    found: dict[int, float] = {}
    least = 0.0
    for bits, narrowed in choices.items():
        if bits < 8:
            codes = narrow_maps.codes(tensor, narrowed).astype(np.int64) + 128
            least = max(least, 1 - entropy(np.bincount(codes, counts, 256)) / full if full > 0 else 0.0)
        found[bits] = least
    return found


def _count(codes: Array) -> Array:
    return np.bincount(codes.astype(np.int64).reshape(-1) + 128, minlength=256)
