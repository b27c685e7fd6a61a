"""MambaQuant's smoothing and rotations (Xu et al. 2025, arXiv 2501.13484), exact in float: a pass in front of a quantizing one.

Row vectors: a tensor X (rows, n) that a linear y = X W^T reads becomes X R, and W becomes W R. R = K H is the Karhunen-Loeve
rotation K (eigenvectors of the second moments X^T X of the calibration data) times a normalized Hadamard matrix H with random signs:
every channel of X K H then has the same mean square (section 4.1). H alone, `klt: false`, spreads outliers but leaves the
channels unequal. Scales s = max|X|^(1/2) / max|W|^(1/2) per channel are folded first (section 4.2):

    S1  norm -> in_proj          gain / s, in_proj columns * s; only where the stream cannot be rotated (R1 folds the gain away)
    S2  gate -> out_proj         gate rows of in_proj / s, silu(z) becomes SwiSiLU u * sigmoid(s u), out_proj columns * s
    S3  state, per channel       the scan's x / s (the one product at run time), out_proj columns * s; s = max|h|, the whole of it:
                                 nothing else that is quantized has to bear it
    S4  state, per state         B rows of x_proj / s, C rows * s; s = max|h|^(1/2) / max|C|^(1/2) in [0.01, 100]
    S5  x_proj -> dt_proj        step rows of x_proj / s, dt_proj columns * s
    S7  in_proj -> convolution   x rows of in_proj / s, convolution weights * s

    R1  residual stream          embedding, in_proj, out_proj, head; one K for the net, from the mean second moment of what
                                 the in_proj of all blocks read (the paper's code takes one layer's)
    R2  out_proj's input         Hadamard, at run time
    R3  state over channels      Hadamard, at run time, inside the scan
    R4  state over states        at run time inside the scan, C rows of x_proj offline
    R5  dt_proj's input          offline
    R6  x_proj's input           Hadamard, at run time

R2 and R6 are nodes of planish::hadamard, R3 a product of two small Hadamard matrices in the scan. A carried scan
state is kept in scaled units (S3, S4), so states of the original and of the rotated model are not interchangeable.
Folds are computed in float64 and rounded once, to float32; embeddings and heads that are stored in 16 bits stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pydantic
import torch
from torch.fx import GraphModule, Interpreter, Node

from ...common.progress import track
from ...kernels import selective_scan
from ...kernels.hadamard import hadamard_matrix, largest_block
from .. import layers, mamba_graph
from ..mamba_graph import Block, Residual
from ..model import Entry, Model
from ..moments import Moments
from ..passes import Context, Pass

aten = torch.ops.aten
LEAST = 1e-2
"""smallest scale, and for S4 the inverse of the largest"""
Batches = Callable[[], Iterable[tuple[torch.Tensor, ...]]]


class MambaRotations(Pass):
    """Smoothing and rotations of MambaQuant for every Mamba block; the model stays float and computes the same."""

    needs_data: ClassVar[bool] = True

    smooth: bool = True
    """S1 to S7"""
    rotate: bool = True
    """R1 to R6"""
    klt: bool = True
    """K H for R1, R4 and R5; else a Hadamard matrix alone, as in QuaRot"""
    samples: int = pydantic.Field(default=64, ge=1)
    """calibration samples, drawn from the data by the recipe's seed"""

    def apply(self, model: Model, context: Context) -> Model:
        """Fold scales and rotations. Raises PlanishError for a model without Mamba blocks."""
        assert context.data is not None  # the pipeline has checked needs_data
        layers.refuse_quantized(model, "quantize.mamba_rotations")
        data = context.data.sample(self.samples, context.generator)

        def batches() -> Iterable[tuple[torch.Tensor, ...]]:
            return data.batches(model, 8)

        model = model.copy()
        module = model.graph
        found = mamba_graph.blocks(model)
        stream = mamba_graph.residual(model)
        entries: list[Entry] = []
        if self.smooth:
            seen = _observe(module, found, batches)
            for block in found:
                _smooth(module, block, seen[block.name])
                if isinstance(stream, str) or not self.rotate:
                    _smooth_norm(module, block, seen[block.name])
                entries.append(Entry(block.name, "folded", "MambaQuant scales S1-S7", 0, 0))
        if self.rotate:
            seen = _observe(module, found, batches) if self.klt else {}
            rotation = _Rotations(self.klt, context.generator)
            if isinstance(stream, str):
                entries.append(Entry("residual stream", "left", f"not rotated: {stream}", 0, 0))
            else:
                mean = sum(seen[b.name].normal.hessian() for b in found) / len(found) if self.klt else None
                entries += _rotate_stream(module, stream, {b.in_proj for b in found}, rotation, mean)
            for block in found:
                _rotate(module, block, seen.get(block.name), rotation)
                entries.append(Entry(block.name, "folded", "MambaQuant rotations R1-R6", 0, 0))
        layers.drop_unused(module)
        return model.with_receipt(*entries)


# --- the matrices


def klt(second: torch.Tensor) -> torch.Tensor:
    """K (n, n) float64, orthogonal: eigenvectors of second moments (n, n) as columns, the largest entry of each positive."""
    vectors = torch.linalg.eigh(second.double()).eigenvectors
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, n)
    return vectors * torch.sign(peak)


def klt_hadamard(second: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """K H (n, n) float64 for row vectors X -> X K H: each channel then has the mean square trace / n."""
    return klt(second) @ spread.double()


def _blocks(n: int) -> torch.Tensor:
    """(n, n) float64 with Hadamard matrices of the largest known order on the diagonal."""
    block = largest_block(n)
    return torch.kron(torch.eye(n // block, dtype=torch.float64), hadamard_matrix(block))


def halves(n: int) -> tuple[int, int]:
    """(p, q) with p * q = n and p the largest power of two that divides n and is at most its square root."""
    p = 1
    while n % (2 * p) == 0 and 4 * p * p <= n:
        p *= 2
    return p, n // p


@dataclass(frozen=True)
class _Rotations:
    """Draws the rotations that a model needs."""

    klt: bool
    generator: torch.Generator

    def signs(self, n: int) -> torch.Tensor:
        """(n,) random +1 and -1, float64."""
        return torch.randint(0, 2, (n,), generator=self.generator).double() * 2 - 1

    def signed(self, n: int) -> torch.Tensor:
        """A Hadamard matrix (n, n) float64 whose rows have random signs; in equal blocks where n has none."""
        return self.signs(n)[:, None] * _blocks(n)

    def offline(self, n: int, second: torch.Tensor | None) -> torch.Tensor:
        """K H where second moments (n, n) are given, else H alone."""
        spread = self.signed(n)
        return spread if second is None else klt_hadamard(second, spread)

    def factors(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(outer, inner): their Kronecker product is a Hadamard matrix (n, n) with random signs."""
        p, q = halves(n)
        return self.signed(p), self.signed(q)


# --- what calibration sees of a block


@dataclass
class _Seen:
    """Channel statistics of one block's tensors."""

    normal: Moments
    """what in_proj reads, divided by the norm's gain; (width,) channels"""
    conv: Moments
    """what the convolution reads; channels"""
    low: Moments
    """what dt_proj reads; rank"""
    c: Moments
    """states"""
    product: Moments
    """what out_proj reads; channels"""
    peak: torch.Tensor
    """(channels, states) largest |h| over the steps"""
    second: torch.Tensor
    """(states, states) float64, sum of h^T h over steps and channels"""


class _Observer(Interpreter):
    """Runs the graph and shows tensors, and each scan's operands, to functions by node."""

    def __init__(self, module: GraphModule, show: dict[Node, Callable[[Any], None]]) -> None:
        super().__init__(module)
        self.show = show

    def run_node(self, n: Node) -> object:
        if layers.op(n) == mamba_graph.SCAN and n in self.show:
            self.show[n](self.fetch_args_kwargs_from_env(n)[0])
        value = super().run_node(n)
        if layers.op(n) != mamba_graph.SCAN and n in self.show:
            self.show[n](value)
        return value


def observe(module: GraphModule, show: dict[Node, Callable[[Any], None]], batches: Batches) -> None:
    """Run the calibration data and call `show[node]` with the value of the node; for a scan, with its arguments."""
    run = _Observer(module, show)
    with torch.inference_mode():
        for batch in track(list(batches()), "calibrating"):
            run.run(*batch)


def _observe(module: GraphModule, found: Sequence[Block], batches: Batches) -> dict[str, _Seen]:
    """Statistics of every block by name."""
    seen: dict[str, _Seen] = {}
    show: dict[Node, Callable[[Any], None]] = {}
    for block in found:
        channels, states = layers.value(module, block.scan.args[2]).shape
        width, rank = (layers.value(module, n.args[1]).shape[1] for n in (block.in_proj, block.dt_proj))
        s = _Seen(
            Moments(width, products=True),
            Moments(channels),
            Moments(rank, products=True),
            Moments(states),
            Moments(channels),
            torch.zeros(channels, states),
            torch.zeros(states, states, dtype=torch.float64),
        )
        seen[block.name] = s
        source = block.in_proj.args[0]
        assert isinstance(source, Node)
        norm = mamba_graph.norm(source)
        gain = layers.value(module, norm.gain) if norm is not None else torch.ones(width)

        def at(
            moments: Moments, name: str, factor: torch.Tensor | float = 1.0, axis: int = -1
        ) -> Callable[[Any], None]:
            return lambda value: moments.add(value.movedim(axis, -1) * factor, name)

        show[source] = at(s.normal, f"{block.name}.in_proj", torch.where(gain != 0, 1 / gain, 0.0))
        show[block.line] = at(s.conv, f"{block.name}.conv1d", axis=1)
        show[block.low] = at(s.low, f"{block.name}.dt_proj")
        show[block.c] = at(s.c, f"{block.name}.x_proj")
        show[block.product] = at(s.product, f"{block.name}.out_proj")
        show[block.scan] = _state_statistics(s)
    observe(module, show, batches)
    return seen


def _state_statistics(seen: _Seen) -> Callable[[Any], None]:
    def show(arguments: Any) -> None:
        x, delta, a_log, b, _, _, state, *_ = arguments
        for h in selective_scan.states(x, delta, a_log.float(), b, state):
            torch.maximum(seen.peak, h.abs().amax(0), out=seen.peak)
            rows = h.flatten(0, 1)  # (batch x channels, states)
            seen.second += rows.T @ rows

    return show


# --- folds of scales


@dataclass
class _Linear:
    """Weight and bias of a linear or convolution node in float64, written back by `store`."""

    module: GraphModule
    node: Node
    weight: torch.Tensor = field(init=False)
    """(out, in) or (channels, 1, taps)"""
    bias: torch.Tensor | None = field(init=False)
    """(out,)"""

    def __post_init__(self) -> None:
        self.weight = layers.value(self.module, self.node.args[1]).double()
        bias = layers.argument(self.node, "bias")
        self.bias = None if bias is None else layers.value(self.module, bias).double()

    def rows(self, start: int, factor: torch.Tensor) -> None:
        """Multiply the outputs start, start + 1, ... by `factor`."""
        part = slice(start, start + len(factor))
        self.weight[part] *= factor.reshape(-1, *[1] * (self.weight.ndim - 1))
        if self.bias is not None:
            self.bias[part] *= factor

    def turn_rows(self, start: int, rotation: torch.Tensor) -> None:
        """Outputs o (rows) become o R: W becomes R^T W over the outputs start, start + 1, ..."""
        part = slice(start, start + len(rotation))
        self.weight[part] = rotation.T @ self.weight[part]
        if self.bias is not None:
            self.bias[part] = rotation.T @ self.bias[part]

    def store(self) -> None:
        """Round to float32 and put into the graph."""
        layers.store(self.module, self.node, 1, str(layers.parameter(self.node.args[1])), self.weight.float())
        if self.bias is not None:
            layers.store(self.module, self.node, 2, layers.bias_name(self.node), self.bias.float())


def balance(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """(n,) float64 scales max|X|^(1/2) / max|W|^(1/2), at least LEAST; 1 for a channel that is always zero."""
    x, w = x.double(), w.double()
    return torch.where((x > 0) & (w > 0), (x / w.clamp_min(1e-30)).sqrt(), 1.0).clamp_min(LEAST)


def _smooth(module: GraphModule, block: Block, seen: _Seen) -> None:
    """S2 to S5 and S7."""
    in_proj, conv, x_proj, dt_proj, out_proj = (
        _Linear(module, n) for n in (block.in_proj, block.conv, block.x_proj, block.dt_proj, block.out_proj)
    )
    channels, states = layers.value(module, block.scan.args[2]).shape
    rank = dt_proj.weight.shape[1]

    s7 = balance(seen.conv.peak, conv.weight.abs().amax((1, 2)))  # (channels,)
    in_proj.rows(0, 1 / s7)
    conv.weight *= s7.reshape(-1, 1, 1)  # not its bias: the products are what they were
    s5 = balance(seen.low.peak, dt_proj.weight.abs().amax(0))  # (rank,)
    x_proj.rows(0, 1 / s5)
    dt_proj.weight *= s5
    peak = seen.peak.double().amax(1)
    s3 = torch.where(peak > 0, peak, 1.0).clamp_min(float(peak.max()) * LEAST)  # (channels,)
    s3 = s3 / s3.log().mean().exp()
    _scale_scan_input(module, block, 1 / s3)
    s4 = balance((seen.peak / s3[:, None]).amax(0), seen.c.peak).clamp_max(1 / LEAST)  # (states,)
    x_proj.rows(rank, 1 / s4)
    x_proj.rows(rank + states, s4)
    out_proj.weight *= s3
    s2 = balance(seen.product.peak / s3, out_proj.weight.abs().amax(0))  # (channels,)
    in_proj.rows(channels, 1 / s2)
    out_proj.weight *= s2
    _swisilu(module, block, s2)
    for linear in (in_proj, conv, x_proj, dt_proj, out_proj):
        linear.store()


def _scale_scan_input(module: GraphModule, block: Block, factor: torch.Tensor) -> None:
    """The scan reads x times `factor` (channels,); y and the state come out times it."""
    graph = module.graph
    with graph.inserting_before(block.scan):
        constant = layers.add_buffer(module, f"{block.name}.scan_scale", factor.float())
        scaled = graph.call_function(aten.mul.Tensor, (block.x, constant))
    scaled.meta["val"] = block.x.meta.get("val")
    block.scan.update_arg(0, scaled)


def _swisilu(module: GraphModule, block: Block, scale: torch.Tensor) -> None:
    """SwiSiLU in the place of the gate's silu: u * sigmoid(s u), which is silu(z) / s for u = z / s."""
    graph = module.graph
    with graph.inserting_before(block.gate):
        constant = layers.add_buffer(module, f"{block.name}.gate_scale", scale.float())
        inside = graph.call_function(aten.mul.Tensor, (block.z, constant))
        gate = graph.call_function(aten.sigmoid.default, (inside,))
        product = graph.call_function(aten.mul.Tensor, (block.z, gate))
    for node in (inside, gate, product):
        node.meta["val"] = block.gate.meta.get("val")
    block.gate.replace_all_uses_with(product)
    graph.erase_node(block.gate)


def _smooth_norm(module: GraphModule, block: Block, seen: _Seen) -> None:
    """S1, where in_proj alone reads a norm with a gain; else nothing."""
    source = block.in_proj.args[0]
    assert isinstance(source, Node)
    norm = mamba_graph.norm(source)
    if norm is None or len(source.users) != 1:
        return
    gain = layers.value(module, norm.gain).double()  # (width,)
    in_proj = _Linear(module, block.in_proj)
    s1 = balance(seen.normal.peak * gain.abs(), in_proj.weight.abs().amax(0))
    in_proj.weight *= s1
    in_proj.store()
    index = source.args.index(norm.gain)
    layers.store(module, source, index, str(layers.parameter(norm.gain)), (gain / s1).float())


# --- rotations


def _store_alike(module: GraphModule, node: Node, index: int, value: torch.Tensor) -> None:
    """Store a parameter in the type in which it is stored now, so that 16-bit embeddings and heads do not double."""
    old = node.args[index]
    assert isinstance(old, Node)
    kept = old if layers.is_constant(old) else old.all_input_nodes[0]
    dtype = layers.read(module, kept).dtype
    layers.store(module, node, index, str(layers.parameter(old)), value.to(dtype))
    if dtype != torch.float32:
        stored = node.args[index]
        assert isinstance(stored, Node)
        with module.graph.inserting_after(stored):
            wide = module.graph.call_function(aten._to_copy.default, (stored,), {"dtype": torch.float32})
        wide.meta["val"] = value.float()
        node.update_arg(index, wide)


def _rotate_stream(
    module: GraphModule, stream: Residual, inside: set[Node], rotation: _Rotations, second: Any
) -> list[Entry]:
    """R1: fold the gains into the linears behind the norms, then rotate everything that writes or reads the stream."""
    width = layers.value(module, stream.norms[0][0].gain).shape[0]
    r1 = rotation.offline(width, second)
    for norm, readers in stream.norms:
        gain = layers.value(module, norm.gain).double()  # (width,)
        for node in readers:
            linear = _Linear(module, node)
            linear.weight = (linear.weight * gain) @ r1
            if node in inside:
                linear.store()
            else:  # the head: other passes may leave it as it is
                _store_alike(module, node, 1, linear.weight)
        norm.without_gain()
    for node in stream.writers:
        linear = _Linear(module, node)
        linear.turn_rows(0, r1)
        linear.store()
    for node in stream.embeddings:
        table = layers.value(module, node.args[0]).double() @ r1  # (vocabulary, width)
        _store_alike(module, node, 0, table)
    return [Entry("residual stream", "folded", "MambaQuant rotation R1, gains folded into the next linears", 0, 0)]


def _rotate(module: GraphModule, block: Block, seen: _Seen | None, rotation: _Rotations) -> None:
    """R2 to R6 of one block."""
    channels, states = layers.value(module, block.scan.args[2]).shape
    rank = layers.value(module, block.dt_proj.args[1]).shape[1]
    r4 = rotation.offline(states, None if seen is None else seen.second)
    r5 = rotation.offline(rank, None if seen is None else seen.low.hessian())
    r3 = rotation.factors(channels)
    x_proj, dt_proj, out_proj = (_Linear(module, n) for n in (block.x_proj, block.dt_proj, block.out_proj))
    x_proj.turn_rows(0, r5)
    dt_proj.weight = dt_proj.weight @ r5
    x_proj.turn_rows(rank + states, r4)
    for linear, name in ((x_proj, "x_signs"), (out_proj, "out_signs")):
        signs = rotation.signs(channels)
        linear.weight = (linear.weight * signs) @ _blocks(channels)
        _turn_input(module, linear.node, f"{block.name}.{name}", signs)
    for linear in (x_proj, dt_proj, out_proj):
        linear.store()
    graph = module.graph
    with graph.inserting_before(block.scan):
        constants = [
            layers.add_buffer(module, f"{block.name}.{n}", m.float())
            for n, m in (("state_rotation", r4), ("state_outer", r3[0]), ("state_inner", r3[1]))
        ]
    for index, constant in zip((7, 8, 9), constants, strict=True):
        block.scan.update_arg(index, constant)


def _turn_input(module: GraphModule, linear: Node, name: str, signs: torch.Tensor) -> None:
    """Let a linear read its input X (batch, time, n) as X R, R the Hadamard matrix with rows of the given signs (n,)."""
    source = linear.args[0]
    assert isinstance(source, Node)
    with module.graph.inserting_before(linear):
        constant = layers.add_buffer(module, name, signs.float())
        args = (source, constant, largest_block(len(signs)), False)
        turned = module.graph.call_function(torch.ops.planish.hadamard.default, args)
    turned.meta["val"] = source.meta.get("val")
    linear.update_arg(0, turned)
