"""`Linears`: the base of the methods that replace linear layers by a fused low-bit op, block by block.

A method says what becomes of one group of linears that read the same tensor (q, k and v); this file walks the blocks, collects what
the method asks for, edits the graph, and writes the receipt.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic
import torch
from torch.fx import GraphModule, Node

from ...common.errors import PlanishError, listed
from .. import layers
from ..blocks import Block, Linear, calibrate, split
from ..fold_affine import fold_affine
from ..journal import Record
from ..model import Entry, Model
from ..moments import SAMPLE, Moments
from ..passes import Context, Foreseen, Part, Pass, matches

BIAS = "bias"
"""name of a replacement's own bias in the journal; no op has a tensor of that name besides"""
HEAD = ("lm_head", "*.lm_head")
"""the output projection of a language model, which the papers' methods leave in float; named so or not, when it is tied to the embedding"""


@dataclass(frozen=True)
class Replacement:
    """What one linear becomes: planish::<op>(x, tensors..., attributes..., bias)."""

    op: str
    """name of the fused op"""
    tensors: Mapping[str, torch.Tensor]
    """by the schema's argument name, x and bias not among them; stored as buffers `<layer>.weight_<argument>`"""
    attributes: Mapping[str, Any]
    reason: str
    """method and format, for the receipt"""
    restored: torch.Tensor | None = None
    """(out, in) what the stored weight stands for, for the error in the receipt; None where there is no single matrix"""
    lost: float | None = None
    """instead of `restored`: the sum of squares of what it differs by from the weight"""
    bias: torch.Tensor | None = None
    """(out,) replaces the layer's bias where given (a correction)"""
    skipped: str | None = None
    """why the layer is left in float; then nothing else is used"""
    action: str = "quantized"
    """for the receipt: quantized or pruned"""

    def without_restored(self, item: Linear) -> Replacement:
        """The same with `lost` in the place of `restored`, which is as large as the weight."""
        if self.restored is None or self.lost is not None:
            return dataclasses.replace(self, restored=None)
        lost = float((self.restored - item.weight).norm()) ** 2
        return dataclasses.replace(self, restored=None, lost=lost)


@dataclass(frozen=True)
class Sizes:
    """A linear layer whose weights nobody has read."""

    name: str
    outputs: int
    inputs: int
    biased: bool


def left(reason: str) -> Replacement:
    """A layer that the method leaves in float."""
    return Replacement("", {}, {}, "", skipped=reason)


class Chosen(Pass):
    """A pass on chosen linear layers. Fields that every such pass has."""

    layers: tuple[str, ...] = ("*",)
    """layers that are treated: globs of layer names"""
    skip: tuple[str, ...] = HEAD
    """layers left alone: globs of layer names; with lm_head among them an output projection that shares the embedding's table"""
    samples: int = pydantic.Field(default=128, ge=1)
    """calibration samples, drawn from the data by the recipe's seed"""

    def wants(self, name: str) -> bool:
        """Whether a layer name is chosen by `layers` and not by `skip`."""
        return matches(name, self.layers) and not matches(name, self.skip)

    def wanted(self, model: Model) -> Callable[[str], bool]:
        """`wants` for the layers of a model, whose tied output projection counts as lm_head. Raises PlanishError for a glob that matches none."""
        check_patterns(model, self._title(), (*self.layers, *(s for s in self.skip if s not in HEAD)))
        tied = tied_heads(model) if matches(HEAD[0], self.skip) else set()
        return lambda name: self.wants(name) and name not in tied

    def batches(self, context: Context, model: Model) -> list[tuple[torch.Tensor, ...]]:
        """Calibration batches. Raises PlanishError when there is no data."""
        if context.data is None:
            raise PlanishError(f"{self._title()} as configured calibrates on data; none was given")
        return list(context.data.sample(self.samples, context.generator).batches(model, 8))

    def _method(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def _title(self) -> str:
        """The pass's name in a recipe: quantize.gptq."""
        return ".".join(type(self).__module__.split(".")[-2:])


class Linears(Chosen):
    """A method that replaces linear layers."""

    copies: ClassVar[int] = 2
    """float32 matrices of a group's size that the method works on at a time, about"""
    calibrates: ClassVar[bool] = False
    """whether `replacements` uses the moments of the layer's input"""
    products: ClassVar[bool] = False
    """whether it uses their second moments (the Hessian)"""
    keep: ClassVar[int] = SAMPLE
    """rows of the layer's input that it is given"""

    formats: ClassVar[tuple[str, ...]] = ("onnx", "pt2", "tvm")

    @abc.abstractmethod
    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """What becomes of the linears that read one tensor. `moments` are None for a method that does not calibrate."""

    @abc.abstractmethod
    def stored(self, members: Sequence[Sizes]) -> int:
        """Bytes that the linears that read one tensor take when replaced, biases that they have not among them.

        What depends on data (outlier columns) is counted as none. Raises PlanishError for a shape that `replacements` refuses.
        """

    def foresee(self, model: Model, taken: frozenset[str]) -> Foreseen:
        """Sizes of what is stored, and the layers whose shapes `replacements` refuses."""
        samples = self.samples if self.reads_data() else 0
        return foreseen(self, model, taken, samples, self.stored, self.copies, self.reads_products())

    def reads_data(self) -> bool:
        """Whether this configuration of the method calibrates."""
        return self.calibrates

    def reads_products(self) -> bool:
        """Whether it uses second moments."""
        return self.products

    def _left(self, model: Model, wanted: Callable[[str], bool]) -> list[Entry]:
        """Lines of the receipt for linears that `layers` names and `skip` leaves out."""
        found = []
        for node in model.graph.graph.nodes:
            name = layers.layer(node) if node.target is torch.ops.aten.linear.default else ""
            if name and matches(name, self.layers) and not wanted(name):
                size = layers.stored(model.graph, node.args[1]).numel() * 4 if layers.is_parameter(node.args[1]) else 0
                reason = (
                    "skipped" if matches(name, self.skip) else "skipped: an output projection tied to the embedding"
                )
                found += [Entry(f"{name}.weight", "left", reason, size, size)] if size else []
        return found

    def apply(self, model: Model, context: Context) -> Model:
        """Replace the chosen linears. Raises PlanishError when none is chosen and for weights that are not finite."""
        model = fold_affine(model)
        wanted = self.wanted(model)
        entries = self._left(model, wanted)
        batches = self.batches(context, model) if self.reads_data() else []

        journal = context.journal.section(self._method())

        def visit(block: Block, members: Sequence[Sequence[Linear]], moments: Mapping[Node, Moments]) -> None:
            def make() -> Record:
                made: list[Replacement] = []
                for group in members:
                    for item in group:
                        check_weight(item)
                    found = self.replacements(group, moments.get(group[0].source), context.generator)
                    made += [r.without_restored(i) for r, i in zip(found, group, strict=True)]
                return _record(made)

            items = [i for group in members for i in group]
            made = _recalled(journal.once(block.name, [i.name for i in items], make, context.generator))
            for item, replacement in zip(items, made, strict=True):
                entries.append(replace(model.graph, item, replacement))

        calibrate(
            model,
            batches,
            wanted,
            visit,
            journal,
            products=self.reads_products(),
            keep=self.keep,
            what=self._title(),
        )
        layers.drop_unused(model.graph)
        return model.with_receipt(*entries)


def _record(made: Sequence[Replacement]) -> Record:
    """Replacements as tensors and facts. A tensor that several of them hold is stored once."""
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[int, str] = {}
    facts: list[dict[str, Any]] = []
    for index, item in enumerate(made):
        own = dict(item.tensors) | ({} if item.bias is None else {BIAS: item.bias})
        for name, value in own.items():
            if id(value) not in keys:
                keys[id(value)] = f"{index}.{name}"
                tensors[keys[id(value)]] = value
        plain = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.name not in ("bias", "restored")}
        facts.append(plain | {"tensors": {n: keys[id(v)] for n, v in own.items()}})
    return Record(tensors, facts)


def _recalled(record: Record) -> list[Replacement]:
    """The replacements that `_record` was given."""
    made = []
    for item in record.facts:
        tensors = {n: record.tensors[key] for n, key in item["tensors"].items()}
        bias = tensors.pop(BIAS, None)
        made.append(Replacement(**item | {"tensors": tensors, "bias": bias}))
    return made


def foreseen(
    step: Chosen,
    model: Model,
    taken: frozenset[str],
    samples: int,
    stored: Callable[[Sequence[Sizes]], int] | None = None,
    copies: int = 2,
    products: bool = False,
) -> Foreseen:
    """What a pass on linear layers will do. `stored` as in `Linears`; None for a pass that replaces no layer."""
    wanted = step.wanted(model)
    blocks: dict[str, Part] = {}
    problems: list[str] = []
    for block in split(model.graph):
        parts: list[Part] = []
        for members in _sizes(model, block, lambda name: wanted(name) and name not in taken):
            try:
                parts.append(_part(members, stored, copies, products))
            except PlanishError as error:
                problems.append(str(error))
        if parts:
            names = tuple(n for p in parts for n in p.layers)
            work = max(p.work for p in parts)
            blocks[block.name] = Part(names, sum(p.stored for p in parts), sum(p.weights for p in parts), work)
    return Foreseen(blocks, samples, tuple(problems))


def _sizes(model: Model, block: Block, wanted: Callable[[str], bool]) -> list[list[Sizes]]:
    """The block's wanted linears, those that read the same tensor together."""
    found: dict[object, list[Sizes]] = {}
    for node in block.nodes:
        if (
            node.target is torch.ops.aten.linear.default
            and layers.is_parameter(node.args[1])
            and wanted(layers.layer(node))
        ):
            weight = layers.stored(model.graph, node.args[1])
            biased = layers.argument(node, "bias") is not None
            found.setdefault(node.args[0], []).append(Sizes(layers.layer(node), weight.size(0), weight.size(1), biased))
    return list(found.values())


def _part(
    members: Sequence[Sizes], stored: Callable[[Sequence[Sizes]], int] | None, copies: int, products: bool
) -> Part:
    """One group of linears. Raises PlanishError as `stored` does."""
    inputs, values = members[0].inputs, sum(m.outputs * m.inputs for m in members)
    after = 0 if stored is None else stored(members)
    names = () if stored is None else tuple(m.name for m in members)
    work = 4 * values * copies + 4 * inputs * (SAMPLE + (9 * inputs if products else 0))
    return Part(names, after, 4 * values, work)


def tied_heads(model: Model) -> set[str]:
    """Names of linears that read the table of an embedding: an output projection is then the same tensor."""
    nodes = [n for n in model.graph.graph.nodes if n.op == "call_function"]
    tables = {layers.parameter(n.args[0]) for n in nodes if n.target is torch.ops.aten.embedding.default}
    heads = [n for n in nodes if n.target is torch.ops.aten.linear.default and layers.parameter(n.args[1]) in tables]
    return {layers.layer(n) for n in heads}


def check_weight(item: Linear) -> None:
    """Raise PlanishError for a weight with NaN or Inf."""
    check_finite(item.name, item.weight)


def check_finite(layer: str, weight: torch.Tensor) -> None:
    """The same for a weight (rows, columns) of a layer by name."""
    if math.isfinite(float(weight.sum())):  # takes no memory, and no finite sum has NaN or Inf in it
        return
    bad = (~torch.isfinite(weight)).nonzero()
    if len(bad):
        raise PlanishError(
            f"layer '{layer}': its weight has {len(bad)} NaN or Inf values, the first at {tuple(bad[0].tolist())}"
        )


def check_patterns(model: Model, title: str, patterns: Sequence[str]) -> None:
    """Raise PlanishError for a glob that matches no linear layer, listing what there is. `title` is the pass's name."""
    nodes = [n for n in model.graph.graph.nodes if layers.op(n) in ("aten.linear", "aten.conv1d") or layers.op(n).startswith("planish.linear")]  # fmt: skip
    names = [layers.layer(n) for n in nodes]
    for pattern in patterns:
        if not any(matches(n, [pattern]) for n in names):
            raise PlanishError(f"{title}: '{pattern}' matches no linear layer; layers: {listed(names, 6) or 'none'}")


def replace(module: GraphModule, item: Linear, replacement: Replacement) -> Entry:
    """Put the fused op in the linear's place; returns the line of the receipt."""
    weight = item.name + ".weight"
    before = item.weight.numel() * 4
    if replacement.skipped is not None:
        return Entry(weight, "left", replacement.skipped, before, before)
    graph, node = module.graph, item.node
    schema = getattr(torch.ops.planish, replacement.op).default._schema
    after = 0
    with graph.inserting_before(node):
        # not `item.source`, which may be a layer that was replaced before this one
        given: dict[str, Any] = {schema.arguments[0].name: node.args[0], **replacement.attributes}
        for name, value in replacement.tensors.items():
            given[name] = layers.add_buffer(module, f"{weight}_{name}", value)
            after += value.numel() * value.element_size()
        if replacement.bias is not None:
            given["bias"] = layers.add_parameter(module, f"{item.name}.bias", replacement.bias)
        elif len(node.args) > 2:
            given["bias"] = node.args[2]
        unknown = set(given) - {a.name for a in schema.arguments}
        assert not unknown, f"{schema.name} has no {unknown}"
        args = tuple(given.get(a.name, a.default_value) for a in schema.arguments)
        made = graph.call_function(getattr(torch.ops.planish, replacement.op).default, args)
        if len(schema.returns) > 1:  # the layer's output is the first
            made = graph.call_function(operator.getitem, (made, 0))
    made.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    error, lost = None, replacement.without_restored(item).lost
    if lost is not None:
        norm = float(item.weight.norm())
        error = lost**0.5 / norm if norm else 0.0
    return Entry(weight, replacement.action, replacement.reason, before, after, error)
