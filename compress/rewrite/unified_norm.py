"""Unified Normalization (Yang et al. 2022, arXiv 2208.01313): norms whose statistics are constants after training, so that they fold away.

A layer norm divides by what it computes from each token. Here every channel is divided by its own second moment over batch and tokens,
without a mean, and inference takes a running one:

    training    m_t = mean of x^2;  s^2 = geometric mean of the last `window` m, after `smooth_after` steps, before that m_t itself
                z = x / sqrt(s^2 + eps),  y = gamma z + beta;  rv <- 0.9 rv + 0.1 s^2
    gradient    r = sqrt(s^2 + eps) / sqrt(rv + eps), within 1/5 .. 5, and 1 while nothing is smoothed;  g = r gamma dy
                dx = (g - e z) / sqrt(s^2 + eps);  e = mean of g z, smoothed by the arithmetic mean of the window and 0.9 e + 0.1 of it
    outliers    where for some channel the arithmetic mean of the window exceeds the geometric one by `window` times the variance of its
                roots (over steps and channels), this step is not smoothed and rv takes its place in the window
    inference   y = gamma x / sqrt(rv + eps) + beta: one scale and one shift for each channel, which fold into the next layer

A trained model computes something else with other norms. So it starts from the scale and the shift of each channel that come closest to the
norm's output on the data, and is then trained to answer as the original does (distill).
"""

from __future__ import annotations

from collections.abc import Mapping

import pydantic
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...common.errors import PlanishError, listed
from .. import layers
from ..distill import Distill
from ..model import Entry, Model
from ..passes import Context, matches
from ..quantize.observers import watch

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
EPS = 1e-5
KEEP = 0.9
"""share of a running value that stays"""
LIMIT = 5.0
"""of the gradient's correction, and its reciprocal"""


class UnifiedNorm(Distill):
    """Replace layer norms and RMS norms, and train the model to answer as before. The fields of distill say how."""

    layers: tuple[str, ...] = ("*",)
    """norms that are replaced: globs of their names"""
    window: int = pydantic.Field(default=4, ge=1)
    """steps whose statistics are averaged"""
    smooth_after: int = pydantic.Field(default=4000, ge=0)
    """training steps after which they are"""
    filter_outliers: bool = True
    """leave steps with outliers out of the average; the paper does so for images, not for text"""
    samples: int = pydantic.Field(default=256, ge=2)
    """samples that the first scales and shifts are fitted to"""

    def apply(self, model: Model, context: Context) -> Model:
        """The model with constant norms. Raises PlanishError without norms, for norms over several dimensions, and as distill does."""
        layers.refuse_quantized(model, "rewrite.unified_norm")
        if context.data is None:
            raise PlanishError("rewrite.unified_norm trains; it needs data (--data)")
        student = model.copy()
        norms = _norms(student, self.layers)
        batches = list(context.data.sample(self.samples, context.generator).batches(student, 64))
        fits = _fits(student.graph, list(norms), batches)
        for node, name in norms.items():
            unified = Unified(*fits[node], self.window, self.smooth_after, self.filter_outliers)
            _place(student.graph, node, name, unified)
        student.graph.recompile()
        trained = super().apply(student, context)
        entries = []
        for name in norms.values():
            module = trained.graph.get_submodule(_module(name))
            assert isinstance(module, Unified)
            size = 4 * module.gamma.numel()
            entries.append(Entry(name, "trained", "unified norm: a scale and a shift for each channel", size, 2 * size))
            _freeze(trained.graph, name, module)
        layers.drop_unused(trained.graph)
        return trained.with_receipt(*entries)


class Unified(torch.nn.Module):
    """The norm while it is trained; it keeps statistics where gradients are taken, and uses them elsewhere."""

    def __init__(
        self, scale: Tensor, shift: Tensor, moment: Tensor, window: int, smooth_after: int, filter_outliers: bool
    ) -> None:
        """Start as y = scale x + shift for x of the given second moment; all (channels,)."""
        super().__init__()
        self.window, self.smooth_after, self.filter_outliers = window, smooth_after, filter_outliers
        self.gamma = torch.nn.Parameter(scale * (moment + EPS).sqrt())
        self.beta = torch.nn.Parameter(shift.clone())
        self.rv, self.e = (torch.nn.Buffer(v.clone()) for v in (moment, torch.zeros_like(moment)))
        self.moments, self.gradients = (
            torch.nn.Buffer(v.repeat(window, 1)) for v in (moment, torch.zeros_like(moment))
        )
        self.steps = torch.nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x (..., channels), of the same shape."""
        if not torch.is_grad_enabled():
            scale, shift = self.constants()
            return x * scale + shift
        return _Unify.apply(x.float(), self.gamma, self.beta, self)  # pyright: ignore[reportReturnType]

    def constants(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (channels,), of inference."""
        scale = self.gamma.detach().double() / (self.rv.double() + EPS).sqrt()
        return scale.float(), self.beta.detach()

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """(s^2, r, whether it is smoothed) of a training step for x (rows, channels); moves the running values on."""
        slot, step = int(self.steps) % self.window, int(self.steps)
        self.steps += 1
        seen = x.square().mean(0)
        spread = self.moments.sqrt().var(unbiased=False)
        self.moments[slot] = seen
        found, smoothed = seen, step >= self.smooth_after
        if smoothed:
            found = self.moments.clamp_min(EPS * EPS).log().mean(0).exp()
            if self.filter_outliers and bool((self.moments.mean(0) - found > self.window * spread).any()):
                found, smoothed = seen, False
                self.moments[slot] = self.rv
        self.rv.mul_(KEEP).add_(found, alpha=1 - KEEP)
        ratio = ((found + EPS) / (self.rv + EPS)).sqrt().clamp(1 / LIMIT, LIMIT)
        return found, ratio if smoothed else torch.ones_like(ratio), smoothed

    def answer(self, product: Tensor, smoothed: bool) -> Tensor:
        """The value e (channels,) for the batch's mean of g z."""
        self.gradients[(int(self.steps) - 1) % self.window] = product
        self.e.mul_(KEEP).add_(self.gradients.mean(0), alpha=1 - KEEP)
        return self.e if smoothed else product


class _Unify(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, state: Unified) -> Tensor:
        moment, ratio, smoothed = state.observe(x.flatten(0, -2))
        root = (moment + EPS).sqrt()
        z = x / root
        ctx.save_for_backward(z, gamma, root, ratio)
        ctx.state, ctx.smoothed = state, smoothed
        return gamma * z + beta

    @staticmethod
    def backward(ctx, *outputs: Tensor):
        (dy,) = outputs
        z, gamma, root, ratio = ctx.saved_tensors
        g = ratio * gamma * dy
        rows = tuple(range(z.ndim - 1))
        e = ctx.state.answer((g * z).mean(rows), ctx.smoothed)
        return (g - e * z) / root, (dy * z).sum(rows), dy.sum(rows), None


def _norms(model: Model, patterns: tuple[str, ...]) -> dict[Node, str]:
    """Norms by node with their names. Raises PlanishError where there is none, and for one over several dimensions."""
    found: dict[Node, str] = {}
    for node in model.graph.graph.nodes:
        if node.target in NORMS:  # a norm that is used twice becomes two
            name = layers.layer(node)
            found[node] = node.name if name in found.values() else name
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in found.values()):
            raise PlanishError(
                f"rewrite.unified_norm: '{pattern}' matches no layer norm or RMS norm (norms that are written out in single "
                f"operations are not recognized); norms: {listed(list(found.values()), 6) or 'none'}"
            )
    chosen = {n: name for n, name in found.items() if matches(name, patterns)}
    for node, name in chosen.items():
        shape = list(layers.argument(node, "normalized_shape"))
        if len(shape) != 1:
            raise PlanishError(f"norm '{name}' is over dimensions {shape}; unified norms are over the last one")
    return chosen


def _fits(
    module: GraphModule, nodes: list[Node], batches: list[tuple[Tensor, ...]]
) -> Mapping[Node, tuple[Tensor, Tensor, Tensor]]:
    """(scale, shift, second moment), each (channels,), by norm: the least squared distance to its output."""
    sums: dict[Node, Tensor] = {}
    held: dict[Node, Tensor] = {}
    made = {n.args[0]: [m for m in nodes if m.args[0] is n.args[0]] for n in nodes}

    def see(node: Node, value: Tensor) -> None:
        for norm in made.get(node, ()):
            held[norm] = value.flatten(0, -2).double()
        if node in held and node in nodes:
            x, y = held[node], value.flatten(0, -2).double()
            new = torch.stack([torch.full_like(x[0], len(x)), x.sum(0), y.sum(0), x.square().sum(0), (x * y).sum(0)])
            sums[node] = new if node not in sums else sums[node] + new

    watch(module, [*made, *nodes], batches, see)  # pyright: ignore[reportArgumentType]
    fits = {}
    for node, (count, x, y, square, product) in sums.items():
        spread = square - x * x / count
        scale = torch.where(spread > 0, (product - x * y / count) / spread.clamp_min(1e-30), 0.0)
        fits[node] = tuple(v.float() for v in (scale, (y - scale * x) / count, square / count))
    return fits


def _module(name: str) -> str:
    return f"{name}.unified"


def _place(module: GraphModule, node: Node, name: str, unified: Unified) -> None:
    """Let a module compute what the norm did."""
    module.add_submodule(_module(name), unified)
    with module.graph.inserting_before(node):
        made = module.graph.call_module(_module(name), (node.args[0],))
    made.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _freeze(module: GraphModule, name: str, unified: Unified) -> None:
    """Write the module as a multiplication and an addition."""
    node = next(n for n in module.graph.nodes if n.op == "call_module" and n.target == _module(name))
    scale, shift = unified.constants()
    with module.graph.inserting_before(node):
        gamma = layers.add_parameter(module, f"{name}.weight", scale)
        product = module.graph.call_function(aten.mul.Tensor, (node.args[0], gamma))
        beta = layers.add_parameter(module, f"{name}.bias", shift)
        made = module.graph.call_function(aten.add.Tensor, (product, beta))
    for new in (product, made):
        new.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
    module.delete_submodule(_module(name))
