"""How much a model suffers when one layer alone is quantized: the error of the layer's output, and the KL divergence of the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ...common.progress import track
from ..blocks import Block, Linear, Run, groups, split
from ..evaluation import divergence
from ..model import Model
from ..moments import Moments
from .linears import Linears, Replacement, check_weight

Swap = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """One layer in one form."""

    name: str
    """layer name"""
    choice: int
    """index of the method"""
    replacement: Replacement
    bytes: int
    """of the weight with scales, and of a bias that the method adds"""
    error: float
    """squared error of the layer's output on calibration rows, as a share of its square"""
    kl: float | None
    """mean KL divergence (original || model with only this layer changed) in nats; None when it was not asked for"""


def measure(
    model: Model,
    batches: Sequence[tuple[torch.Tensor, ...]],
    methods: Mapping[str, Mapping[int, Linears]],
    generator: torch.Generator,
    kl: bool,
) -> Iterator[tuple[Linear, list[Candidate]]]:
    """Every layer that `methods` names, with its forms: {layer name: {index: method}}. One block of the model at a time.

    The model itself stays as it is: each layer reads what the unquantized model gives it. A form that the method refuses for the layer
    (`left`) is missing. `kl` runs the rest of the model once for every form and batch.
    """
    module = model.graph
    run = Run(module, batches)
    blocks = split(module)
    done: list[Node] = []
    for block in track(blocks, "sensitivity of layers", len(blocks)):
        members = groups(module, block.nodes, lambda name: name in methods)
        moments = _moments(run, block, members, methods)
        found: list[tuple[Linear, dict[int, Replacement]]] = []
        for item in (i for g in members for i in g):
            check_weight(item)
            made = {
                c: m.replacements([item], moments[item.source], generator)[0] for c, m in methods[item.name].items()
            }
            found.append((item, {c: r for c, r in made.items() if r.skipped is None}))
        divergences = _divergences(module, run, done, found) if kl else {}
        for item, forms in found:
            rows = moments[item.source].kept
            yield (
                item,
                [
                    Candidate(
                        item.name, c, r, stored(item, r), output_error(item, r, rows), divergences.get((item.name, c))
                    )
                    for c, r in forms.items()
                ],
            )
        run.advance(block)
        done += block.nodes


def swap(item: Linear, replacement: Replacement) -> Swap:
    """The replaced layer as a function of its input (..., in)."""
    op = getattr(torch.ops.planish, replacement.op).default
    bias = item.bias if replacement.bias is None else replacement.bias
    given: dict[str, Any] = {**replacement.tensors, **replacement.attributes, "bias": bias}
    rest = [given.get(a.name, a.default_value) for a in op._schema.arguments[1:]]

    def call(x: torch.Tensor) -> torch.Tensor:
        answer = op(x, *rest)
        return answer[0] if isinstance(answer, tuple) else answer

    return call


def stored(item: Linear, replacement: Replacement) -> int:
    """Bytes of the replaced layer's weight, scales and what else the method stores, without the bias that it had."""
    added = [] if replacement.bias is None or item.bias is not None else [replacement.bias]
    return sum(t.numel() * t.element_size() for t in [*replacement.tensors.values(), *added])


def output_error(item: Linear, replacement: Replacement, rows: torch.Tensor) -> float:
    """|Y' - Y|^2 / |Y|^2 of the layer's output on rows (n, in) of its input, the bias left out; 0 for a layer that gives only zeros."""
    with torch.inference_mode():
        exact = torch.nn.functional.linear(rows, item.weight, item.bias)
        apart = swap(item, replacement)(rows) - exact
        size = (exact if item.bias is None else exact - item.bias).double().square().sum()
    return float(apart.double().square().sum() / size) if size > 0 else 0.0


def _moments(
    run: Run, block: Block, members: Sequence[Sequence[Linear]], methods: Mapping[str, Mapping[int, Linears]]
) -> dict[Node, Moments]:
    """Statistics of what the block's layers read, second moments where a method wants them."""
    readers = {
        g[0].source: any(m.reads_products() for i in g for m in methods[i.name].values()) for g in members
    }  # source: whether second moments are needed
    names = {g[0].source: g[0].name for g in members}
    found: dict[Node, Moments] = {}

    def show(node: Node, value: torch.Tensor) -> None:
        if node in readers:
            found.setdefault(node, Moments(value.shape[-1], readers[node])).add(value, names[node])

    if members:
        run.see(block, show)
    return found


def _divergences(
    module: GraphModule, run: Run, done: Sequence[Node], found: Sequence[tuple[Linear, Mapping[int, Replacement]]]
) -> dict[tuple[str, int], float]:
    """Mean KL divergence of the model's first output by (layer, choice)."""
    total: dict[tuple[str, int], float] = {}
    rows = 0
    swaps = {(item.name, c): (item.node, swap(item, r)) for item, forms in found for c, r in forms.items()}
    if not swaps:
        return {}
    skipped = [n for n in module.graph.nodes if n.op == "placeholder"] + list(done)
    for state in run.states:
        env: dict[Node, Any] = dict.fromkeys(skipped) | state
        exact = _Rest(module, {}).scores(env)
        count = exact[..., 0].numel()
        for key, (node, function) in swaps.items():
            other = _Rest(module, {node: function}).scores(env)
            total[key] = total.get(key, 0.0) + divergence(exact, other) * count
        rows += count
    return {key: value / max(1, rows) for key, value in total.items()}


class _Rest(Interpreter):
    """The graph from some place on, with functions in the place of some linear layers."""

    def __init__(self, module: GraphModule, swaps: Mapping[Node, Swap]) -> None:
        super().__init__(module)
        self.swaps = swaps

    def run_node(self, n: Node) -> Any:
        if n in self.swaps:
            source = n.args[0]
            assert isinstance(source, Node)
            return self.swaps[n](self.env[source])
        return super().run_node(n)

    def scores(self, env: Mapping[Node, Any]) -> torch.Tensor:
        """First output, given the values of everything in front."""
        with torch.inference_mode():
            return tree_leaves(self.run(initial_env=dict(env), enable_io_processing=False))[0]
