"""Static post-training quantization to integers: quantize/dequantize pairs around the ops that run in integers.

Weights are symmetric per output channel, of 8, 4 or 2 bits, activations affine per tensor in uint8 codes with ranges from calibration
data, biases int32 with scale = input scale * weight scale (Jacob et al. 2018, section 2; Krishnamoorthi 2018). Rounding
moves a layer's mean output; bias correction subtracts that shift per channel (Nagel et al. 2019, section 4.2, with
the expectation taken over the calibration data). Codes of 4 and 2 bits lie in [-2^(bits-1), 2^(bits-1) - 1], are rounded so that
later inputs make up for the error of earlier ones (compensation.py), and are kept as int8, which every runtime takes; the C code packs them.

Where pairs go. An op of COMPUTE or TABLE has its inputs quantized and its output quantized, after a ReLU or clip that
follows it alone, which then costs nothing: the output's range is the clip. Ops of TRANSPORT only move or select values, so
their output keeps the codes, the scale and the zero point of their input, and they run on integers unchanged. A product with a
positive number keeps the codes and scales the scale. Attention without a mask is taken apart into matrix products and softmax. A tensor
that an unknown op makes stays float and is named in the receipt, and so does what reads a cache: calibration starts with an empty one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import pydantic
import torch
from torch.fx import GraphModule, Node

from ...common.errors import PlanishError, listed
from ...common.progress import track
from ...kernels import affine
from .. import layers
from ..fold import canonicalize, fold_batch_norm
from ..fold_affine import fold_affine
from ..layers import is_constant
from ..model import Entry, Model
from ..passes import Context, Pass, matches
from . import compensation, operands
from .observers import Batches, Observer, Statistics, choose, collect, place, watch

aten = torch.ops.aten

WEIGHTED = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
COMPUTE = (
    *WEIGHTED,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.cat.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.matmul.default,
    aten.bmm.default,
    aten.layer_norm.default,
)
TABLE = (
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.gelu.default,
    aten.softmax.int,
)
CLIP = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
TRANSPORT = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
)
SCALING = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
MASKS = ("aten.masked_fill", "aten.where")
"""what hides scores from a softmax: no range of codes holds them and the others"""
LEVELS = 256
ACTIVATION_DTYPE = torch.uint8


@dataclass(frozen=True)
class Parameters:
    """Scale and zero point of one quantized activation, shared by the tensors that only move its values."""

    owner: Node
    scale: torch.Tensor
    zero_point: torch.Tensor


class Static(Pass):
    """Post-training static quantization: weights of 8, 4 or 2 bits, 8-bit activations, integer arithmetic throughout."""

    needs_data: ClassVar[bool] = True

    observer: Observer = "mse"
    """how an activation's range is chosen from the calibration data"""
    percentile: float = pydantic.Field(default=99.99, gt=50, le=100)
    """for observer 'percentile': the share of values, in percent, that each end of the range keeps"""
    weight_bits: Literal[8, 4, 2] = 8
    """of weight codes; below 8 they are stored in 8 bits everywhere but in C"""
    ends_bits: Literal[8, 4, 2] | None = None
    """of the first and the last layer's weights; null for as many as of the others"""
    weight_observer: Observer | None = None
    """how a weight channel's range is chosen: minmax or mse; null for minmax at 8 bits and mse below"""
    rounding: Literal["nearest", "compensated"] | None = None
    """of weights: each to its nearest code, or so that the layer's output errs least; null for nearest at 8 bits and compensated below"""
    samples: int = pydantic.Field(default=512, ge=1)
    """calibration samples, drawn from the data by the recipe's seed"""
    bias_correction: bool = True
    skip: tuple[str, ...] = ()
    """layers left in float: globs of layer names"""

    @pydantic.field_validator("weight_observer")
    @classmethod
    def _no_weight_percentile(cls, value: Observer | None) -> Observer | None:
        if value == "percentile":
            raise ValueError("a weight's range is chosen by 'minmax' or 'mse'")
        return value

    def apply(self, model: Model, context: Context) -> Model:
        """Quantize a float model. Needs calibration data; see the module's text for what becomes integer."""
        assert context.data is not None  # the pipeline has checked needs_data
        layers.refuse_quantized(model, "quantize.static")
        _refuse_other_floats(model)
        data = context.data.sample(self.samples, context.generator)

        def batches() -> list[tuple[torch.Tensor, ...]]:
            return list(data.batches(model, 64))

        model = fold_affine(fold_batch_norm(canonicalize(model)))
        module = model.graph
        operands.open_attention(module)
        operands.fold_constants(module)
        plan = _Plan(module, self.skip, {i.name for i in model.inputs if i.state})
        _own_biases(module, [n for n in plan.compute if n.target in WEIGHTED])
        entries: list[Entry] = [*plan.left]
        quantized = self._weights(module, plan, entries, batches)
        if self.bias_correction:
            _correct_biases(module, quantized, batches)
        entries += operands.quantize_constants(module, plan.compute)
        parameters = self._activations(module, plan, batches)
        _insert_pairs(module, parameters)
        _quantize_biases(module, quantized, entries)
        for node in plan.own:
            entries.append(_activation_entry(node, parameters[node], self.observer))
        layers.drop_unused(module)
        return model.with_receipt(*entries)

    def _weights(self, module: GraphModule, plan: _Plan, entries: list[Entry], batches: Batches) -> dict[Node, Weight]:
        """Codes of every weight that runs in integers, by the node that uses it; the graph reads the dequantized codes."""
        nodes = [n for n in plan.compute if n.target in WEIGHTED]
        bits = {n: self._bits(nodes, n) for n in nodes}
        compensated = [
            n for n in nodes if (self.rounding or ("nearest" if bits[n] == 8 else "compensated")) != "nearest"
        ]
        products = (
            compensation.hessians(module, compensated, track(batches(), "measuring inputs")) if compensated else {}
        )
        found: dict[Node, Weight] = {}
        for node in track(nodes, "quantizing weights"):
            source = node.args[1]
            assert isinstance(source, Node)
            value = layers.read(module, source).float()  # (out, ...)
            if not torch.isfinite(value).all():
                raise PlanishError(f"layer '{layers.layer(node)}': its weight has NaN or Inf values")
            low, high = _limits(bits[node])
            observer = self.weight_observer or ("minmax" if bits[node] == 8 else "mse")
            scale = _weight_scale(value, observer, low, high)  # (out,)
            zero = torch.zeros(len(scale), dtype=torch.int8)
            if node in products:  # all uses of a weight together decide its codes
                same = [products[n] for n in products if layers.parameter(n.args[1]) == layers.parameter(source)]
                rounded = compensation.rounded(value, scale, sum(same[1:], same[0]), low, high, layers.layer(node))
                codes = rounded.to(torch.int8)
            else:
                codes = affine.quantize(value, scale, zero, 0, low, high, torch.int8)
            name = str(source.target)
            node.update_arg(1, _stored(module, node, name, value, (codes, scale, zero)))
            real = affine.dequantize(codes, scale, zero, 0)
            found[node] = Weight(value, real, scale, bits[node])
            error = float((real - value).norm() / value.norm().clamp_min(1e-30))
            before, after = 4 * value.numel(), value.numel() + 5 * len(scale)
            reason = f"int{bits[node]} symmetric per channel"
            if bits[node] < 8:
                reason += f", kept in 8 bits; {-(-value.numel() * bits[node] // 8)} bytes of codes when packed, as in C"
            entries.append(Entry(name, "quantized", reason, before, after, error))
        return found

    def _bits(self, nodes: list[Node], node: Node) -> int:
        """Bits of a layer's weights: the same for all uses of one."""
        ends = {layers.parameter(nodes[i].args[1]) for i in (0, -1)}
        at_end = self.ends_bits is not None and layers.parameter(node.args[1]) in ends
        return self.ends_bits if at_end and self.ends_bits is not None else self.weight_bits

    def _activations(self, module: GraphModule, plan: _Plan, batches: Batches) -> dict[Node, Parameters]:
        """Scale and zero point for every activation that the plan quantizes; transported tensors share their source's."""
        steps = list(track(batches(), "calibrating"))
        stats = collect(module, plan.own, lambda: steps, self.observer != "minmax")
        found = {n: Parameters(n, *self._parameters(n, stats[n])) for n in plan.own}
        for node, (source, factor) in plan.derived.items():
            p = found[source]
            found[node] = p if factor == 1 else Parameters(node, p.scale * factor, p.zero_point)
        return found

    def _parameters(self, node: Node, stats: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point. Probabilities get 1/256 and 0 whatever was seen: a smaller scale overflows runtimes."""
        if node.target is aten.softmax.int:
            return torch.tensor(1 / LEVELS), torch.tensor(0, dtype=ACTIVATION_DTYPE)
        return operands.affine_range(*choose(stats, self.observer, self.percentile, LEVELS))


@dataclass(frozen=True)
class Weight:
    """A quantized weight: the original, what the codes stand for, the scale per channel (out,), and the codes' bits."""

    original: torch.Tensor
    restored: torch.Tensor
    scale: torch.Tensor
    bits: int


def _limits(bits: int) -> tuple[int, int]:
    """Least and largest code of a weight. At 8 bits -128 is left out: runtimes that add pairs of products could overflow."""
    return (-127, 127) if bits == 8 else (-(1 << bits - 1), (1 << bits - 1) - 1)


def _refuse_other_floats(model: Model) -> None:
    for name, value in [*model.graph.named_parameters(), *model.graph.named_buffers()]:
        if value.is_floating_point() and value.dtype is not torch.float32:
            raise PlanishError(
                f"quantize.static takes float32 models; '{name}' of '{model.source}' is {value.dtype}".replace(
                    "torch.", ""
                )
            )


def _own_biases(module: GraphModule, nodes: list[Node]) -> None:
    """A bias of its own for every use of a layer that is called twice: correction and scale differ from use to use."""
    weights = Counter(layers.parameter(n.args[1]) for n in nodes)
    biases = Counter(layers.bias_name(n) for n in nodes)
    for node in nodes:
        name = layers.bias_name(node)
        if weights[layers.parameter(node.args[1])] < 2 and biases[name] < 2:
            continue
        source = layers.argument(node, "bias")
        weight = node.args[1]
        assert isinstance(weight, Node)
        value = layers.read(module, source) if source is not None else torch.zeros(len(layers.read(module, weight)))
        with module.graph.inserting_before(node):
            _set_bias(node, layers.add_parameter(module, f"{name}_of_{node.name}", value))


class _Plan:
    """Which nodes run in integers and which tensors carry a quantize/dequantize pair."""

    def __init__(self, module: GraphModule, skip: tuple[str, ...], states: set[str]) -> None:
        self.compute: list[Node] = []
        """nodes that run in integers"""
        self.own: list[Node] = []
        """tensors with a scale and zero point of their own, in graph order"""
        self.derived: dict[Node, tuple[Node, float]] = {}
        """transported and scaled tensors, in graph order: the tensor whose parameters they have, and the factor of its scale"""
        self.left: list[Entry] = []
        """receipt lines for what stays float"""
        nodes = list(module.graph.nodes)
        wanted: set[Node] = set()
        for node in nodes:
            if node.op != "call_function" or not _has_tensor(node) or node.target in (*CLIP, *TRANSPORT):
                continue
            if _factor(module, node) is not None:
                continue
            if not _runs_in_integers(node):
                self._leave(module, node, f"{node.target} has no integer form here")
            elif matches(layers.layer(node), skip):
                self._leave(module, node, "skipped by the recipe")
            elif any(n.op == "placeholder" and n.name in states for n in node.all_input_nodes):
                self._leave(module, node, "reads a cache")
            else:
                if node.target is aten.layer_norm.default:
                    self._leave(module, node, "float32 factors of a layer norm's rounding")
                self.compute.append(node)
                wanted.add(self._after_clip(node))
                for source in node.all_input_nodes:
                    self._want(module, source, wanted)
        self._place(module, nodes, wanted)
        for pattern in skip:
            if not any(matches(layers.layer(n), [pattern]) for n in nodes if _runs_in_integers(n)):
                names = sorted({layers.layer(n) for n in nodes if _runs_in_integers(n)})
                raise PlanishError(f"quantize.static: skip '{pattern}' matches no layer; layers: {listed(names, 6)}")

    def _want(self, module: GraphModule, node: Node, wanted: set[Node]) -> None:
        """Ask for integer codes of `node`, and of what it moves, so that the move itself runs on codes."""
        while not is_constant(node) and _is_float(node) and node not in wanted:
            wanted.add(node)
            moves = node.target in TRANSPORT and _exact_transport(node)
            if not (moves or _factor(module, node) is not None) or not isinstance(node.args[0], Node):
                return
            node = node.args[0]

    def _leave(self, module: GraphModule, node: Node, reason: str) -> None:
        constants = [a for a in node.all_input_nodes if is_constant(a)]
        for constant in constants:
            size = layers.read(module, constant).numel() * layers.read(module, constant).element_size()
            self.left.append(Entry(str(constant.target), "left", reason, size, size))
        if not constants:
            self.left.append(Entry(f"activation of {layers.layer(node)}", "left", reason, 0, 0))

    @staticmethod
    def _after_clip(node: Node) -> Node:
        """The tensor that is quantized for `node`: its clip's output when a clip alone reads it, else its own."""
        users = list(node.users)
        if len(users) == 1 and users[0].target in CLIP:
            return users[0]
        return node

    def _place(self, module: GraphModule, nodes: list[Node], wanted: set[Node]) -> None:
        """Decide owners: walk forward; a transport of an owned tensor shares, all else that is wanted owns."""
        quantized: dict[Node, Node] = {}
        for node in nodes:
            if not _is_float(node) or is_constant(node):
                continue
            source = node.args[0] if node.op == "call_function" else None
            moves = node.target in TRANSPORT and _exact_transport(node)
            factor = 1.0 if moves else _factor(module, node)
            if isinstance(source, Node) and source in quantized and factor is not None:
                if _only_pads_convolutions(node):
                    continue
                quantized[node] = quantized[source] if moves else node
                self.derived[node] = (quantized[source], factor)
            elif node in wanted or (node.target in CLIP and node.args[0] in quantized):
                quantized[node] = node
                self.own.append(node)


def _runs_in_integers(node: Node) -> bool:
    if node.op != "call_function" or node.target not in (*COMPUTE, *TABLE):
        return False
    if node.target in WEIGHTED:
        return is_constant(node.args[1]) and (len(node.args) < 3 or node.args[2] is None or is_constant(node.args[2]))
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        given = [a for a in node.args[:2] if isinstance(a, Node) and _is_float(a)]
        plain = node.kwargs.get("alpha", 1) == 1 and len(given) == 2
        return bool(plain) and not all(is_constant(a) for a in given)
    if node.target in (aten.matmul.default, aten.bmm.default):
        return all(isinstance(a, Node) and not is_constant(a) and a.meta["val"].ndim > 1 for a in node.args[:2])
    if node.target is aten.layer_norm.default:
        weight, bias = (layers.argument(node, n) for n in ("weight", "bias"))
        last = len(layers.argument(node, "normalized_shape")) == 1
        return last and is_constant(weight) and (bias is None or is_constant(bias))
    if node.target is aten.softmax.int:
        return layers.op(node.args[0]) not in MASKS  # pyright: ignore[reportArgumentType]
    if node.target in (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default):
        return set(node.args[1]) == {1}  # pyright: ignore[reportArgumentType]
    if node.target is aten.mean.dim:
        return _is_float(node) and _mean_of_positions(node)
    return True


def _factor(module: GraphModule, node: Node) -> float | None:
    """The number by which a node scales its first input; None where it does something else. Codes keep their places if it is positive."""
    if node.op != "call_function" or node.target not in SCALING or len(node.args) < 2 or not _is_float(node):
        return None
    source, other = node.args[:2]
    if isinstance(other, Node) and is_constant(other) and other.meta["val"].ndim == 0:
        other = layers.read(module, other).item()
    if not isinstance(source, Node) or is_constant(source) or not isinstance(other, int | float):
        return None
    factor = 1 / other if other and node.target in (aten.div.Tensor, aten.div.Scalar) else float(other)
    return factor if 0 < factor < float("inf") else None


def _mean_of_positions(node: Node) -> bool:
    """A mean over the length of (n, channels, length), or over the tokens of (n, tokens, channels)."""
    source, axes = node.args[0], node.args[1]
    assert isinstance(source, Node)
    if source.meta["val"].ndim != 3 or not isinstance(axes, list | tuple) or len(axes) != 1:
        return False
    return axes[0] in (1, 2, -1, -2)


def _exact_transport(node: Node) -> bool:
    """Pads must insert zero, which every affine code represents exactly; other fill values are not moved codes."""
    if node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else "constant"
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return bool(mode == "constant" and value in (None, 0, 0.0))
    if node.target is aten.constant_pad_nd.default:
        return bool((node.args[2] if len(node.args) > 2 else 0) == 0)
    return True


def _only_pads_convolutions(node: Node) -> bool:
    """A spatial zero pad that only convolutions read becomes their own padding at export, so it carries no pair."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default) or not _exact_transport(node):
        return False
    amounts = list(node.args[1])  # pyright: ignore[reportArgumentType]
    for convolution, own in ((aten.conv1d.default, 2), (aten.conv2d.default, 4)):
        if all(u.target is convolution for u in node.users):
            return min(amounts) >= 0 and not any(amounts[own:])
    return False


def _has_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _weight_scale(weight: torch.Tensor, observer: Observer, low: int = -127, high: int = 127) -> torch.Tensor:
    """(out,) scales so that codes span low..high; 'mse' tries smaller ranges per channel. All-zero channels get 1."""
    flat = weight.reshape(len(weight), -1)  # (out, n)
    peak = torch.maximum(flat.amax(1) / high, flat.amin(1) / low).clamp_min(0)  # (out,)
    best = torch.where(peak > 0, peak, torch.ones_like(peak))
    if observer == "mse":
        least = torch.full_like(best, float("inf"))
        full = best.clone()
        for factor in torch.linspace(0.5 if high > 7 else 0.2, 1.0, 51 if high > 7 else 81):
            scale = full * factor
            codes = torch.clamp(torch.round(flat / scale[:, None]), low, high)
            error = ((codes * scale[:, None] - flat) ** 2).sum(1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _correct_biases(module: GraphModule, weights: dict[Node, Weight], batches: Batches) -> None:
    """Add to each bias the mean per channel of what weight rounding takes away, over the float activations."""
    total: dict[Node, torch.Tensor] = {}
    count: dict[Node, int] = {}
    inputs: dict[Node, list[Node]] = {}
    for node in weights:
        inputs.setdefault(node.args[0], []).append(node)  # pyright: ignore[reportArgumentType]

    def see(source: Node, value: torch.Tensor) -> None:
        for node in inputs[source]:
            weight = weights[node]
            rest = node.args[3:] if len(node.args) > 3 else ()
            lost = node.target(value, weight.original - weight.restored, None, *rest)  # pyright: ignore[reportCallIssue]
            axes = [d for d in range(lost.ndim) if d != (lost.ndim - 1 if node.target is aten.linear.default else 1)]
            total[node] = total.get(node, torch.zeros(len(weight.scale))) + lost.sum(axes)
            count[node] = count.get(node, 0) + lost.numel() // len(weight.scale)

    # the graph already reads restored weights; the float activations come from the original ones
    for node, weight in weights.items():
        _swap(module, node, weight.original)
    watch(module, inputs, track(batches(), "correcting biases"), see)
    for node in weights:
        _swap(module, node, None)
        old = node.args[2] if len(node.args) > 2 else None
        shift = (total[node] / count[node]).detach()
        bias = shift + (layers.read(module, old) if isinstance(old, Node) else 0)
        with module.graph.inserting_before(node):
            new = layers.add_parameter(module, layers.bias_name(node), bias)
        _set_bias(node, new)


_ORIGINALS = "_planish_original"


def _swap(module: GraphModule, node: Node, value: torch.Tensor | None) -> None:
    """Let `node` read `value` instead of its dequantized weight, or (None) read the dequantized weight again."""
    name = f"{_ORIGINALS}_{node.name}"
    if value is not None:
        with module.graph.inserting_before(node):
            plain = layers.add_buffer(module, name, value)
        plain.meta["restored"] = node.args[1]
        node.update_arg(1, plain)
        return
    plain = node.args[1]
    assert isinstance(plain, Node)
    node.update_arg(1, plain.meta["restored"])
    module.graph.erase_node(plain)
    delattr(module, name)


def _set_bias(node: Node, bias: Node) -> None:
    if len(node.args) > 2:
        node.update_arg(2, bias)
    else:
        node.args = (*node.args, bias)


def _insert_pairs(module: GraphModule, parameters: dict[Node, Parameters]) -> None:
    """Quantize -> dequantize behind every tensor that has parameters; every reader then reads the dequantized tensor."""
    graph = module.graph
    for node, p in parameters.items():
        readers = list(node.users)
        anchor = node.next
        while anchor.op == "placeholder":
            anchor = anchor.next
        with graph.inserting_before(anchor):
            name = place(p.owner)
            scale = layers.add_buffer(module, f"{name}.scale", p.scale)
            zero = layers.add_buffer(module, f"{name}.zero_point", p.zero_point)
            codes = graph.call_function(
                torch.ops.planish.quantize.default, (node, scale, zero, 0, 0, LEVELS - 1, ACTIVATION_DTYPE)
            )
            restored = graph.call_function(torch.ops.planish.dequantize.default, (codes, scale, zero, 0))
        restored.meta["val"] = node.meta["val"]
        restored.meta["parameters"] = p
        for reader in readers:
            reader.replace_input_with(node, restored)


def _quantize_biases(module: GraphModule, weights: dict[Node, Weight], entries: list[Entry]) -> None:
    """int32 codes with scale = input scale * weight scale, so that they add to the accumulator as they are."""
    scales = _room_for_biases(module, weights)
    for node in weights:
        bias = node.args[2] if len(node.args) > 2 else None
        if not isinstance(bias, Node):
            continue
        value = layers.read(module, bias)  # (out,)
        scale = _input_scale(node) * scales[_weight_name(node)]  # (out,)
        zero = torch.zeros(len(scale), dtype=torch.int32)
        codes = torch.round(value.double() / scale.double()).to(torch.int32)
        name = str(bias.target)
        node.update_arg(2, _stored(module, node, name, value, (codes, scale, zero)))
        entries.append(Entry(name, "quantized", "int32 at the accumulator's scale", 4 * len(scale), 4 * len(scale)))


def _stored(module: GraphModule, node: Node, name: str, value: torch.Tensor, codes: tuple[torch.Tensor, ...]) -> Node:
    """The dequantized form, in front of `node`, of a constant called `name`; `codes` are codes, scale and zero point."""
    with module.graph.inserting_before(node):
        parts = [layers.add_buffer(module, name + s, t) for s, t in zip(layers.STORED_AS, codes, strict=True)]
        restored = module.graph.call_function(torch.ops.planish.dequantize.default, (*parts, 0))
    restored.meta["val"] = value
    return restored


def _room_for_biases(module: GraphModule, weights: dict[Node, Weight]) -> dict[str, torch.Tensor]:
    """Weight scales (out,) by weight name, raised where a bias would leave no room in the 32-bit sum.

    A channel that is almost dead has a tiny scale, in which its bias is a huge number of steps. Its codes are made anew at
    the scale that leaves the bias 2^30, half of the accumulator's range.
    """
    scales = {_weight_name(node): weight.scale for node, weight in weights.items()}
    for node in weights:
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, Node):
            least = layers.read(module, bias).abs() / (_input_scale(node) * 2.0**30)
            scales[_weight_name(node)] = torch.maximum(scales[_weight_name(node)], least)
    for node, weight in weights.items():
        name = _weight_name(node)
        if not torch.equal(scales[name], weight.scale):
            zero = torch.zeros(len(weight.scale), dtype=torch.int8)
            codes = affine.quantize(weight.original, scales[name], zero, 0, *_limits(weight.bits), torch.int8)
            raised = (scales[name] != weight.scale).reshape(
                -1, *[1] * (codes.ndim - 1)
            )  # the others keep their rounding
            codes = torch.where(raised, codes, layers.tensor(module, f"{name}_codes"))
            layers.set_tensor(module, f"{name}_codes", codes)
            layers.set_tensor(module, f"{name}_scale", scales[name])
    return scales


def _weight_name(node: Node) -> str:
    name = layers.parameter(node.args[1])
    assert name is not None
    return name


def _input_scale(node: Node) -> torch.Tensor:
    """Scale of the activation that a weighted node reads (through a pad that became its own, if there is one)."""
    source = node.args[0]
    while isinstance(source, Node) and "parameters" not in source.meta:
        source = source.args[0]
    assert isinstance(source, Node)
    return source.meta["parameters"].scale


def _activation_entry(node: Node, p: Parameters, observer: str) -> Entry:
    reason = f"uint8 by {observer}, scale {float(p.scale):.6g}, zero point {int(p.zero_point)}"
    name = node.name if node.op == "placeholder" else f"activation of {layers.layer(node)}"
    shape = node.meta["val"].shape
    size = prod(d for d in shape if isinstance(d, int))  # of one sample: a dynamic batch is no number
    return Entry(name, "quantized", reason, 4 * size, size)
