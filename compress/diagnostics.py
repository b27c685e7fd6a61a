"""What stands in a model, layer by layer, and how hard it will be to quantize: `planish inspect`.

Outliers are seen as the papers measure them: the largest magnitude (infinity norm) and the kurtosis of a tensor (Bondarenko et al. 2023), the
channels with a magnitude of 6 and more (Dettmers et al. 2022), and how far the largest channel stands above the median one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..common.progress import track
from ..kernels.packing import CHUNK
from . import attention, cost, layers
from .blocks import Linear, Run, linear, split
from .model import Model
from .moments import Moments
from .quantize import sensitivity
from .quantize.rtn import RoundToNearest

THRESHOLD = 6.0
"""magnitude from which LLM.int8() calls a channel an outlier"""
BITS = (8, 4, 3, 2)
TABLES = ("aten.embedding",)
CHANNELS_FIRST = ("aten.conv1d", "aten.conv2d", "aten.conv3d")


@dataclass(frozen=True)
class Outliers:
    """One activation tensor over all calibration samples."""

    peak: float
    """largest magnitude: the infinity norm"""
    kurtosis: float
    """E[x^4] / E[x^2]^2; 3 for a normal distribution"""
    columns: int
    """channels with a magnitude of at least THRESHOLD"""
    ratio: float | None
    """largest channel's magnitude over the median channel's; None when that is 0"""


@dataclass(frozen=True)
class Row:
    """One layer that has weights."""

    name: str
    op: str
    """'linear', 'conv2d', 'embedding', or the low-bit op"""
    shape: tuple[int, ...] | None
    """of the float weight, or of the codes as they are stored"""
    bits: int | None
    """of a weight element as stored; None for a format of mixed widths"""
    bytes: int
    """of the tensors that the layer reads, each counted where it is read first"""
    macs: int
    weight_peak: float | None
    weight_kurtosis: float | None
    error: float | None
    """relative error of the stored weight, from the receipt of a compressed model"""
    input: Outliers | None
    """what the layer reads"""
    sensitivity: Mapping[int, float] | None
    """relative error |Y' - Y| / |Y| of the output with the weight rounded to nearest, by bits"""


@dataclass(frozen=True)
class AttentionRow:
    """The output of one attention, its projection included."""

    name: str
    output: Outliers


@dataclass(frozen=True)
class Diagnosis:
    """The layers in graph order."""

    layers: tuple[Row, ...]
    attention: tuple[AttentionRow, ...]
    """empty without data"""


def inspect(model: Model, batches: Sequence[tuple[torch.Tensor, ...]] = ()) -> Diagnosis:
    """Layers of a model; with calibration batches also the outliers that they read and their sensitivity."""
    module = model.graph
    shapes = layers.shapes(model)
    samples = 1 if model.batched else max(1, model.inputs[0].shape[0])
    errors = {e.tensor.removesuffix(".weight"): e.error for e in model.receipt if e.action == "quantized"}
    outputs = {a.projection or a.mixed: a.name for a in attention.find(module)}
    watched = _watched(model, set(outputs))
    moments = _collect(model, batches, watched) if batches else {}
    seen: set[str] = set()
    rows = []
    for node in module.graph.nodes:
        stored = _tensors(node)
        weight = next((layers.tensor(module, n) for n in stored if layers.tensor(module, n).ndim > 1), None)
        if weight is None or not _has_weight(node):
            continue
        size = 0
        for name in [n for n in stored if n not in seen]:
            tensor = layers.tensor(module, name)
            seen.add(name)
            size += tensor.numel() * tensor.element_size()
        item = linear(module, node)
        name = stored[0].rpartition(".")[0] if layers.op(node) in TABLES else layers.layer(node)
        read = moments.get(node.args[0]) if isinstance(node.args[0], Node) else None
        peak, kurtosis = _weight(weight)
        rows.append(
            Row(
                name,
                layers.op(node).rpartition(".")[2],
                tuple(weight.shape),
                _bits(node, weight),
                size,
                cost.node_macs(node, shapes) // samples,
                peak,
                kurtosis,
                errors.get(name),
                None if read is None else outliers(read),
                None if read is None or item is None else _sensitivity(item, read.kept),
            )
        )
    found = [AttentionRow(name, outliers(moments[n])) for n, name in outputs.items() if n in moments]
    return Diagnosis(tuple(rows), tuple(found))


def outliers(moments: Moments) -> Outliers:
    """The figures of one tensor."""
    peak = moments.peak
    middle = float(peak.median())
    ratio = float(peak.max()) / middle if middle > 0 else None
    return Outliers(float(peak.max()), moments.kurtosis, len(moments.outliers(THRESHOLD)), ratio)


def _has_weight(node: Node) -> bool:
    name = layers.op(node)
    return (
        name in (*CHANNELS_FIRST, *TABLES, "aten.linear", "aten.matmul", "aten.mm", "aten.addmm")
        or name in cost.CONVOLUTION | cost.TRANSPOSED | cost.RECURRENT
        or name.startswith(("planish.linear", "planish.embedding"))
    )


def _tensors(node: Node) -> list[str]:
    """Parameters and buffers that an op reads, also through a conversion or a dequantize."""
    found = [n for a in node.all_input_nodes if layers.parameter(a) is not None for n in _constants(a)]
    return list(dict.fromkeys(found))


def _constants(node: Node) -> list[str]:
    """Names of the tensors that a parameter's value is made from: one, or codes with scale and zero point."""
    if node.op == "get_attr":
        return [str(node.target)]
    return [n for a in node.all_input_nodes for n in _constants(a)]


def _bits(node: Node, weight: torch.Tensor) -> int | None:
    """Bits of a weight as stored: the op's own number where it packs codes."""
    if layers.op(node).startswith("planish."):
        try:
            return int(layers.argument(node, "bits"))
        except KeyError:
            return None
    return weight.element_size() * 8


def _weight(weight: torch.Tensor) -> tuple[float | None, float | None]:
    """Largest magnitude and kurtosis of a float weight; None for codes."""
    if not weight.is_floating_point():
        return None, None
    low, high = weight.detach().aminmax()
    square = fourth = 0.0
    for part in weight.detach().reshape(-1).split(CHUNK):
        squares = part.double().square()
        square += float(squares.sum())
        fourth += float(squares.square_().sum())
    return float(torch.maximum(-low, high)), fourth * weight.numel() / square**2 if square > 0 else 0.0


def _watched(model: Model, outputs: set[Node]) -> dict[Node, int]:
    """Tensors to look at, with the dimension of their channels."""
    found = dict.fromkeys(outputs, -1)
    for node in model.graph.graph.nodes:
        name = layers.op(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or source.op == "get_attr":
            continue
        if name == "aten.linear" or name.startswith("planish.linear"):
            found.setdefault(source, -1)
        elif name in CHANNELS_FIRST:
            found.setdefault(source, 1)
    return found


def _collect(
    model: Model, batches: Sequence[tuple[torch.Tensor, ...]], watched: Mapping[Node, int]
) -> dict[Node, Moments]:
    """Statistics of the watched tensors over all batches, one block of the model at a time."""
    found: dict[Node, Moments] = {}
    run = Run(model.graph, batches)
    blocks = split(model.graph)
    done: set[Node] = set()  # what an earlier block has shown, and a later one reads again

    def show(node: Node, value: torch.Tensor) -> None:
        if node in watched and node not in done and value.is_floating_point() and value.ndim:
            x = value.movedim(watched[node], -1)
            found.setdefault(node, Moments(x.shape[-1])).add(x, node.name)

    for block in track(blocks, "inspecting layers", len(blocks)):
        run.see(block, show)
        run.advance(block)
        done.update(found)
    return found


def _sensitivity(item: Linear, rows: torch.Tensor) -> dict[int, float]:
    """Relative output error by bits, for kept rows (n, in) of the layer's input."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for bits in BITS:
        (made,) = RoundToNearest(bits=bits).replacements([item], None, generator)
        found[bits] = sensitivity.output_error(item, made, rows) ** 0.5
    return found
