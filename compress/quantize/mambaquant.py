"""MambaQuant (Xu et al. 2025, arXiv 2501.13484): static W8A8 for Mamba models, scan operands too, behind smoothing and rotations.

`quantize.mamba_rotations` comes first, with the fields of the same names; `smooth: false, klt: false` is a plain Hadamard
rotation as in QuaRot, and with `rotate: false` too it is round to nearest.

Weights of linears and convolutions are symmetric int8 per output channel; activations affine uint8 per tensor with ranges from
calibration data, as in `quantize.static`. They stand in the graph as quantize/dequantize pairs around ordinary ops.
Of the scan, x, B and C are read through such pairs and h is rounded to symmetric int8 in front of its product with C; the
step size, the state that is carried and the gate stay float. Nothing but linears, convolutions and scans is touched:
norms, embeddings and the head (`skip`) stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pydantic
import torch
from torch.fx import GraphModule, Node

from ...common.errors import PlanishError
from ...kernels import affine, selective_scan
from .. import layers, mamba_graph
from ..model import Entry, Model
from ..passes import Context, Pass, matches
from .linears import HEAD, check_patterns
from .mamba_rotations import Batches, MambaRotations, observe
from .observers import BINS, Observer, Statistics, choose, collect, place
from .operands import affine_range
from .static import ACTIVATION_DTYPE, LEVELS, _stored, _weight_scale

WEIGHTED = ("aten.linear", "aten.conv1d")
OPERANDS = {"x": 0, "B": 3, "C": 4}
"""the scan's arguments that are quantized, by position"""
STATE_SCALE = 10
"""position of the scan's argument state_scale"""


class MambaQuant(Pass):
    """Int8 weights, activations and scan operands of a Mamba model, from calibration data."""

    needs_data: ClassVar[bool] = True

    smooth: bool = True
    """the scales S1 to S7"""
    rotate: bool = True
    """the rotations R1 to R6"""
    klt: bool = True
    """rotations by K H instead of a Hadamard matrix alone"""
    observer: Observer = "mse"
    """how a tensor's range is chosen from the calibration data"""
    percentile: float = pydantic.Field(default=99.999, gt=50, le=100)
    """for observer 'percentile': the share of values, in percent, that each end of the range keeps"""
    scan: bool = True
    """quantize the scan's operands too"""
    skip: tuple[str, ...] = HEAD
    """layers left in float: globs of layer names"""
    samples: int = pydantic.Field(default=64, ge=1)
    """calibration samples, drawn from the data by the recipe's seed"""

    def apply(self, model: Model, context: Context) -> Model:
        """Quantize a float model. Raises PlanishError for one without a selective scan."""
        assert context.data is not None  # the pipeline has checked needs_data
        layers.refuse_quantized(model, "quantize.mambaquant")
        check_patterns(model, "quantize.mambaquant", [s for s in self.skip if s not in HEAD])
        if not mamba_graph.scans(model):
            raise PlanishError(f"quantize.mambaquant: '{model.source}' has no Mamba block; use quantize.static")
        data = context.data.sample(self.samples, context.generator)

        def batches() -> list[tuple[torch.Tensor, ...]]:
            return list(data.batches(model, 8))

        if self.smooth or self.rotate:
            exact = MambaRotations(smooth=self.smooth, rotate=self.rotate, klt=self.klt, samples=self.samples)
            model = exact.apply(model, context)
        model = model.copy()
        module = model.graph
        entries: list[Entry] = []
        weighted = [n for n in _weighted(module) if self._wanted(module, n, entries)]
        scans = mamba_graph.scans(model) if self.scan else []
        readers: list[tuple[Node, int]] = [(n, 0) for n in weighted]
        readers += [(n, index) for n in scans for index in OPERANDS.values()]
        sources = list(dict.fromkeys(node.args[index] for node, index in readers))
        stats = collect(module, sources, batches, self.observer != "minmax")  # pyright: ignore[reportArgumentType]
        states = _states(module, scans, batches)

        for node in weighted:
            entries.append(_quantize_weight(module, node))
        pairs = {s: self._pair(module, s, stats[s]) for s in sources if isinstance(s, Node)}
        for node, index in readers:
            node.update_arg(index, pairs[node.args[index]])  # pyright: ignore[reportArgumentType]
        for node in scans:
            seen, peak = states[node]
            high = min(choose(seen, self.observer, self.percentile, LEVELS // 2)[1], peak)
            scale = torch.tensor(high / (LEVELS // 2 - 1), dtype=torch.float32)
            node.update_arg(STATE_SCALE, float(scale))
            reason = f"int8 symmetric in front of the product with C, range by {self.observer}"
            entries.append(Entry(f"activation of {layers.layer(node)}.state", "quantized", reason, 0, 0))
        entries += [
            Entry(f"activation of {s.name}", "quantized", f"uint8 per tensor, range by {self.observer}", 0, 0)
            for s in pairs
        ]
        layers.drop_unused(module)
        return model.with_receipt(*entries)

    def _wanted(self, module: GraphModule, node: Node, entries: list[Entry]) -> bool:
        """Whether a layer is quantized; one that is not gets its line in the receipt."""
        if not matches(layers.layer(node), self.skip):
            return True
        size = layers.value(module, node.args[1]).numel() * 4
        entries.append(Entry(str(layers.parameter(node.args[1])), "left", "skipped by the recipe", size, size))
        return False

    def _pair(self, module: GraphModule, source: Node, stats: Statistics) -> Node:
        """Quantize -> dequantize behind `source`; returns the dequantized tensor. Other readers keep the float one."""
        scale, zero = affine_range(*choose(stats, self.observer, self.percentile, LEVELS))
        graph = module.graph
        with graph.inserting_after(source):
            name = place(source)
            scale_node = layers.add_buffer(module, f"{name}.scale", scale)
        with graph.inserting_after(scale_node):
            zero_node = layers.add_buffer(module, f"{name}.zero_point", zero)
        with graph.inserting_after(zero_node):
            codes = graph.call_function(
                torch.ops.planish.quantize.default,
                (source, scale_node, zero_node, 0, 0, LEVELS - 1, ACTIVATION_DTYPE),
            )
        with graph.inserting_after(codes):
            restored = graph.call_function(torch.ops.planish.dequantize.default, (codes, scale_node, zero_node, 0))
        restored.meta["val"] = source.meta.get("val")
        return restored


def _weighted(module: GraphModule) -> list[Node]:
    """Linears and convolutions with constant weights, in graph order."""
    return [n for n in module.graph.nodes if layers.op(n) in WEIGHTED and layers.is_parameter(n.args[1])]


def _quantize_weight(module: GraphModule, node: Node) -> Entry:
    """Let a layer read int8 codes of its weight; the line of the receipt."""
    value = layers.value(module, node.args[1])  # (out, in) or (channels, 1, taps)
    name = str(layers.parameter(node.args[1]))
    if not torch.isfinite(value).all():
        raise PlanishError(f"layer '{layers.layer(node)}': its weight has NaN or Inf values")
    scale = _weight_scale(value, "minmax")  # (out,)
    zero = torch.zeros(len(scale), dtype=torch.int8)
    codes = affine.quantize(value, scale, zero, 0, -127, 127, torch.int8)
    node.update_arg(1, _stored(module, node, name, value, (codes, scale, zero)))
    error = float((affine.dequantize(codes, scale, zero, 0) - value).norm() / value.norm().clamp_min(1e-30))
    after = value.numel() + 5 * len(scale)
    return Entry(name, "quantized", "int8 symmetric per channel", 4 * value.numel(), after, error)


def _states(module: GraphModule, scans: Iterable[Node], batches: Batches) -> dict[Node, tuple[Statistics, float]]:
    """Statistics of |h|, as each scan rotates it, over all steps, and its maximum, in one run: the histogram's range doubles when it must."""
    found = {n: Statistics(0.0, 0.0, torch.zeros(BINS, dtype=torch.float64)) for n in scans}
    peaks = dict.fromkeys(found, 0.0)

    def add(node: Node) -> Callable[[Any], None]:
        stats = found[node]

        def show(arguments: Any) -> None:
            x, delta, a_log, b, _, _, state, rotation, outer, inner, _ = arguments
            for h in selective_scan.states(x, delta, a_log.float(), b, state):
                values = selective_scan.rotated(h, rotation, outer, inner).abs()
                largest = float(values.max())
                peaks[node] = max(peaks[node], largest)
                stats.high = stats.high or largest
                while largest > stats.high > 0:
                    halved = stats.counts.reshape(-1, 2).sum(1)
                    stats.counts = torch.cat([halved, torch.zeros(BINS // 2, dtype=torch.float64)])
                    stats.high *= 2
                if stats.high > 0:
                    stats.counts += torch.histc(values, BINS, 0.0, stats.high).double()

        return show

    if found:
        observe(module, {n: add(n) for n in found}, batches)
    return {n: (s, peaks[n]) for n, s in found.items()}
