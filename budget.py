"""`--budget`: the widths of the weights, layer by layer, that bring an integer network within flash, RAM and latency.

What a layer costs is not guessed: the network is built for the device in every width and run in the emulator, which gives each
layer's bytes and cycles. What a width loses is measured too: each layer alone is narrowed, and the distance of the network's outputs
from the int8 network's on the golden samples is its loss. The choice of least total loss within the budget is a multiple-choice
knapsack; losses of layers are taken to add up. The result is built, run and measured again, so what is reported is not the table.
"""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .common.errors import PlanishError
from .common.progress import track
from .compress.quantize import knapsack
from .export import c as c_format
from .export import c_project, memory, narrow, patches, qdq, quant_mcu
from .export.artifact import Artifact
from .export.format import Source
from .export.graph import Graph
from .kernels import integer
from .kernels.op import Call
from .runtimes.emulator import Emulator
from .targets.target import Memory, Target

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
FORM = "flash=BYTES,ram=BYTES,latency=TIME, e.g. flash=256K,ram=64K,latency=20ms (one or more of the three)"
ROUNDS = 4
"""choices tried at most: code size and padding are only known once a choice is built"""
SETS = ((8, 4), (8, 2), (8, 4, 2))
"""widths that are tried together: every width brings code of its own"""
ROOM = 1 << 24
"""bytes of a memory without limit"""
INNER = 0.1
"""weight of the tensors inside the network in the loss of a layer"""
SAMPLES = 4
"""golden samples that the loss of a layer is measured on"""
WEIGHTS = np.geomspace(1e-3, 1e3, 13)
"""exchange rates between bytes and cycles that are tried when both are short"""


@dataclass(frozen=True)
class Budget:
    """What the device may spend; None: no limit but the device's own memories."""

    flash: int | None = None
    """bytes"""
    ram: int | None = None
    """bytes: arena, variables and reserved stack"""
    latency_ms: float | None = None
    """of one inference, the high end of the estimate"""


@dataclass(frozen=True)
class Cost:
    """What a network needs on the device."""

    flash: int
    ram: int
    latency_ms: float | None
    """None for a device without a clock or a cycle model"""
    layers: Mapping[str, float]
    """cycles at the high end, or instructions, by layer"""
    weights: Mapping[str, int]
    """bytes of constants by layer"""
    patches: Mapping[str, Any] | None = None
    """how the first layers run in patches, where they do"""

    def over(self, budget: Budget) -> list[str]:
        """What exceeds the budget, in words."""
        found: list[str] = []
        for name, has, limit in (("flash", self.flash, budget.flash), ("RAM", self.ram, budget.ram)):
            if limit is not None and has > limit:
                found.append(f"{name} {has} bytes, {has - limit} over {limit}")
        if budget.latency_ms is not None and self.latency_ms is not None and self.latency_ms > budget.latency_ms:
            found.append(
                f"latency {self.latency_ms:.3g} ms, {self.latency_ms - budget.latency_ms:.3g} over {budget.latency_ms:g}"
            )
        return found


def parse(text: str) -> Budget:
    """A Budget from FORM. Raises PlanishError for anything else."""
    found: dict[str, Any] = {}
    for part in text.lower().replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if name in found:
            raise PlanishError(f"--budget names {name} twice; accepted: {FORM}")
        size = re.fullmatch(r"(\d+)(k|m|)(?:i?b)?", value)
        time = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", value)
        if name in ("flash", "ram") and size:
            found[name] = int(size[1]) * UNITS[size[2]]
        elif name == "latency" and time:
            found[name] = float(time[1]) * TIMES[time[2]]
        else:
            raise PlanishError(f"--budget: '{part}' is not understood; accepted: {FORM}")
        if found[name] <= 0:
            raise PlanishError(f"--budget: '{part}' is not above 0; accepted: {FORM}")
    return Budget(found.get("flash"), found.get("ram"), found.get("latency"))


def limited(target: Target, budget: Budget) -> Target:
    """The target with no more memory than the budget. Raises PlanishError for a device that is no microcontroller."""
    if target.flash is None or target.ram is None:
        raise PlanishError(f"--budget is for microcontrollers; '{target.name}' is none")
    flash = min(target.flash.length, budget.flash or target.flash.length)
    ram = min(target.ram.length, budget.ram or target.ram.length)
    return target.model_copy(
        update={
            "flash": Memory(origin=target.flash.origin, length=flash),
            "ram": Memory(origin=target.ram.origin, length=ram),
        }
    )


def fit(source: Source, target: Target, budget: Budget) -> tuple[Source, dict[str, Any]]:
    """The source with the deployment graph that keeps the budget with least loss, and what was traded for it.

    Raises PlanishError when no choice keeps it: the closest plan, and what it lacks.
    """
    device = limited(target, budget)
    golden = {k: v[:SAMPLES] for k, v in source.golden_inputs.items()}
    graph = qdq.read(source.onnx)
    before = measure(graph, source.name, roomy(target, ram=True), golden)
    if budget.latency_ms is not None and before.latency_ms is None:
        raise PlanishError(f"--budget: latency cannot be estimated for '{target.name}' (no clock or no cycle model)")

    maps: Maps | None = None

    def shaped(changed: Graph) -> Graph:
        return changed if maps is None else maps.of(changed, golden).graph

    def build(changed: Graph) -> Cost:  # in patches where whole maps do not fit
        return measure(shaped(changed), source.name, roomy(device, ram=False), golden)

    start = before
    if budget.ram is not None and before.ram > budget.ram:
        calls = functools.partial(c_project.calls_of, features=target.features)
        room = budget.ram - (before.ram - memory.of(graph, calls(graph)).plan.arena)
        found = patches.choose(graph, calls, room)
        if found is not None:
            start = measure(found.graph, source.name, roomy(target, ram=True), golden)
        if start.ram > budget.ram:
            maps = _maps(graph, found, golden, room, calls)
            if maps is None:
                fewest = Maps(None, (1, 1), 1.0, (8, 4, 2), 0.0).of(narrow.narrow(graph, 2), golden).graph
                least = measure(fewest, source.name, roomy(target, ram=True), golden)
                raise PlanishError(_missing([before, start, least], budget, "with patches and fewer bits neither"))
        start = build(graph)
    chosen, after = (graph, start) if not start.over(budget) else _narrowed(graph, start, golden, budget, build)
    made = replace(source, graph=shaped(chosen))
    return made, _report(graph, chosen, made.graph or chosen, golden, before, after, maps)


@dataclass(frozen=True)
class Maps:
    """Feature maps in fewer bits (QuantMCU), with the first layers in patches or not: how it is done to any widths of weights."""

    stage: int | None
    """index of the stage that runs in patches"""
    grid: tuple[int, int]
    phi: float
    widths: tuple[int, ...]
    weight: float

    def of(self, graph: Graph, golden: Mapping[str, np.ndarray]) -> quant_mcu.Searched:
        """The graph with its maps narrowed."""
        stage = None if self.stage is None else patches.stages(graph)[self.stage]
        found = quant_mcu.space(graph, golden, stage, self.grid, self.phi, self.widths)
        return found.at(self.weight, ROOM)


def _maps(
    graph: Graph,
    patched: patches.Patched | None,
    golden: Mapping[str, np.ndarray],
    room: int,
    calls: Callable[[Graph], Mapping[str, Call]],
) -> Maps | None:
    """The widest maps whose arena fits `room`, whole or in patches; None where the fewest bits need more."""
    stages = patches.stages(graph)
    shapes: list[tuple[int | None, tuple[int, int], tuple[float, ...]]] = [(None, (1, 1), (1.0,))]
    if patched is not None:
        index = next(i for i, s in enumerate(stages) if s.output.name == patched.until)
        shapes.insert(0, (index, patched.grid, (quant_mcu.PHI, 1.0)))  # 1: no patch keeps 8 bits for its outliers
    for widths in ((8, 4), (8, 4, 2)):
        for stage, grid, limits in shapes:
            for phi in limits:
                space = quant_mcu.space(graph, golden, None if stage is None else stages[stage], grid, phi, widths)
                steps = space.weights()
                tried = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(steps)), 1.0]
                low, high, best = 0, len(tried), None
                while low < high:  # fewer bits, less memory: bisection
                    middle = (low + high) // 2
                    made = space.at(tried[middle], ROOM).graph
                    if memory.of(made, calls(made)).plan.arena <= room:
                        best, low = tried[middle], middle + 1
                    else:
                        high = middle
                if best is not None:
                    return Maps(stage, grid, phi, widths, best)
    return None


def roomy(target: Target, ram: bool) -> Target:
    """The target with more flash (and RAM) than it has: a network that is too large is measured all the same, to say by how much."""
    assert target.flash is not None
    assert target.ram is not None
    larger = {"flash": target.flash} | ({"ram": target.ram} if ram else {})
    return target.model_copy(update={k: Memory(origin=m.origin, length=max(m.length, ROOM)) for k, m in larger.items()})


def measure(graph: Graph, name: str, target: Target, golden: Mapping[str, np.ndarray]) -> Cost:
    """Build a graph for the device and run it in the emulator."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        facts, flash, ram = c_format.write_project(graph, name, target, golden, folder, [])
        if flash is None or ram is None or not facts["toolchain"]:
            raise PlanishError("--budget needs a compiler: pip install 'planish[mcu]'")
        with Emulator().open(Artifact(folder, {"format": "c", "target": target.name}), 1) as session:
            found = session.profile(golden, 1, 0)
    cycles: Counter[str] = Counter()
    for x in found.layers:
        cycles[patches.original(x.name)] += x.cycles[1] if x.cycles else x.instructions or 0
    weights: dict[str, int] = {}
    for x in facts["layers"]:
        layer = patches.original(x["name"])  # patches of a layer share its constants
        weights[layer] = max(weights.get(layer, 0), int(x["bytes"]))
    latency = None if found.latency_estimate_ms is None else found.latency_estimate_ms[1]
    return Cost(flash, ram, latency, cycles, weights, facts.get("patches"))


def _narrowed(
    graph: Graph, start: Cost, golden: Mapping[str, np.ndarray], budget: Budget, measure: Callable[[Graph], Cost]
) -> tuple[Graph, Cost]:
    """The choice of widths with least loss that keeps the budget, built and measured."""
    names = [n.name for n in graph.nodes if n.op in narrow.OPS and narrow.bits(n) == 8]
    tables = {8: start} | {w: measure(narrow.narrow(graph, w)) for w in (4, 2)}
    losses = dict(zip(names, _losses(graph, names, golden), strict=True))
    tried: list[Cost] = [start, tables[4], tables[2]]
    found: tuple[float, Graph, Cost] | None = None
    for widths in SETS:
        for loss, chosen in _assignments(graph, names, widths, tables, losses, budget, tried, measure):
            if found is None or loss < found[0]:
                found = (loss, chosen, tried[-1])
    if found is None:
        raise PlanishError(_missing(tried, budget, "with weights of 4 and 2 bits"))
    return found[1], found[2]


def _assignments(
    graph: Graph,
    names: Sequence[str],
    widths: Sequence[int],
    tables: Mapping[int, Cost],
    losses: Mapping[str, Mapping[int, float]],
    budget: Budget,
    tried: list[Cost],
    measure: Callable[[Graph], Cost],
) -> Iterator[tuple[float, Graph]]:
    """(loss, graph) of the best assignment of `widths` that keeps the budget when built, if there is one; every graph that was
    built is added to `tried`. What is besides the layers (code, other ops) is known only then, so a miss shrinks the room.
    """
    start = tables[8]
    others = sum(v for k, v in start.weights.items() if k not in names)
    code = max(tables[w].flash - sum(tables[w].weights.values()) for w in widths)
    per_ms = sum(start.layers.values()) / start.latency_ms if start.latency_ms else 1.0
    rest = sum(v for k, v in start.layers.items() if k not in names)
    room_flash = np.inf if budget.flash is None else budget.flash - code - others
    room_cycles = np.inf if budget.latency_ms is None else budget.latency_ms * per_ms - rest
    costs = [[(tables[w].weights[n], tables[w].layers[n]) for w in widths] for n in names]
    loss = [[losses[n][w] for w in widths] for n in names]
    for _ in range(ROUNDS):
        choice = _choose(costs, loss, room_flash, room_cycles)
        if choice is None:
            return
        chosen = graph
        for name, index in zip(names, choice, strict=True):
            chosen = narrow.narrow(chosen, widths[index], [name])
        after = measure(chosen)
        tried.append(after)
        if not after.over(budget):
            yield sum(row[i] for row, i in zip(loss, choice, strict=True)), chosen
            return
        if budget.flash is not None:
            room_flash -= max(after.flash - budget.flash, 0)
        if budget.latency_ms is not None and after.latency_ms is not None:
            room_cycles -= max(after.latency_ms - budget.latency_ms, 0.0) * per_ms


def _choose(
    costs: Sequence[Sequence[tuple[int, float]]], losses: Sequence[Sequence[float]], flash: float, cycles: float
) -> tuple[int, ...] | None:
    """Indices of the choices with least loss within both limits, None where there are none."""
    best: tuple[float, tuple[int, ...]] | None = None
    for rate in [0.0, *WEIGHTS, np.inf]:
        scale_flash = 0.0 if np.isinf(flash) or np.isinf(rate) else 1 / max(flash, 1.0)
        scale_cycles = 0.0 if np.isinf(cycles) else (1.0 if np.isinf(rate) else rate) / max(cycles, 1.0)
        limit = (scale_flash > 0) + scale_cycles * cycles if scale_cycles else float(scale_flash > 0)
        if not (scale_flash or scale_cycles):
            continue
        mixed = [[f * scale_flash + c * scale_cycles for f, c in row] for row in costs]
        try:
            found = knapsack.solve(mixed, losses, limit)
        except PlanishError:
            continue
        picked = [row[i] for row, i in zip(costs, found.choices, strict=True)]
        fits = sum(f for f, _ in picked) <= flash and sum(c for _, c in picked) <= cycles
        if fits and (best is None or found.loss < best[0]):
            best = (found.loss, found.choices)
    return None if best is None else best[1]


def _losses(graph: Graph, names: Sequence[str], golden: Mapping[str, np.ndarray]) -> list[dict[int, float]]:
    """For every layer the loss of 8, 4 and 2 bits: squared distance of the outputs when it alone is narrowed, and INNER times that of
    all tensors: samples on which the outputs stand at an end of their range do not make every width look free.
    """
    whole, inner = _answers(graph, golden), _values(graph, golden)

    def loss(name: str, width: int) -> float:
        narrowed = narrow.narrow(graph, width, [name])
        return _distance(_answers(narrowed, golden), whole) + INNER * _distance(_values(narrowed, golden), inner)

    return [{8: 0.0} | {w: loss(n, w) for w in (4, 2)} for n in track(names, "measuring what fewer bits lose")]


def _answers(graph: Graph, golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Real values of the outputs, of what a softmax reads where one makes them: sure probabilities hide what was lost."""
    makers = {n.output.name: n for n in graph.nodes}
    codes = graph.codes(golden)
    found: dict[str, np.ndarray] = {}
    for port in graph.outputs:
        node = makers.get(port.tensor.name)
        tensor = node.inputs[0] if node is not None and node.op == "softmax" else port.tensor
        found[port.name] = integer.dequantize(codes[tensor.name], tensor)
    return found


def _values(graph: Graph, golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Real values of what every node makes."""
    codes = graph.codes(golden)
    return {n.output.name: integer.dequantize(codes[n.output.name], n.output) for n in graph.nodes}


def _distance(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> float:
    """Mean over the outputs of the squared difference as a share of the squared size."""
    return float(
        np.mean(
            [
                np.square(got[k].astype(np.float64) - v).sum() / max(np.square(v.astype(np.float64)).sum(), 1e-30)
                for k, v in want.items()
            ]
        )
    )


def _missing(tried: Sequence[Cost], budget: Budget, why: str) -> str:
    """One line: the closest plan and what it lacks."""

    def excess(cost: Cost) -> float:
        parts = [
            (cost.flash, budget.flash),
            (cost.ram, budget.ram),
            (cost.latency_ms or 0.0, budget.latency_ms),
        ]
        return sum(max(has / limit - 1, 0.0) for has, limit in parts if limit)

    best = min(tried, key=excess)
    latency = "" if best.latency_ms is None else f", latency {best.latency_ms:.3g} ms"
    return (
        f"the budget cannot be kept, {why}: the closest plan needs flash {best.flash} bytes, RAM {best.ram} bytes{latency}; "
        f"over: {'; '.join(best.over(budget)) or 'nothing alone, but not all at once'}"
    )


def _report(
    whole: Graph,
    narrowed: Graph,
    final: Graph,
    golden: Mapping[str, np.ndarray],
    before: Cost,
    after: Cost,
    maps: Maps | None,
) -> dict[str, Any]:
    """What was traded: widths by layer, maps, patches, figures before and after, and how far the outputs moved."""
    original = {n.name: narrow.bits(n) for n in whole.nodes if n.op in narrow.OPS}
    widths = {n.name: narrow.bits(n) for n in narrowed.nodes if n.op in narrow.OPS}
    want, got = _answers(whole, golden), _answers(final, golden)
    return {
        "narrowed": {k: w for k, w in widths.items() if w < original[k]},
        "maps": None if maps is None else maps.of(narrowed, golden).summary(),
        "patches": after.patches,
        "before": {"flash_bytes": before.flash, "ram_bytes": before.ram, "latency_ms": before.latency_ms},
        "after": {"flash_bytes": after.flash, "ram_bytes": after.ram, "latency_ms": after.latency_ms},
        "output_error": float(np.sqrt(_distance(got, want))),
    }
