"""Automatic mixed precision: every layer gets the format with which the whole model loses least within a budget.

A layer's loss is measured with all other layers in float, and the losses add up (the model of HAWQ, Dong et al. 2020, and of AdaQuant's
integer program, Hubara et al. 2021): as the KL divergence of the model's scores on calibration data, or as the error of the layer's
own output. Its cost is bytes, or milliseconds of the layer as exported. The assignment is the exact optimum of this model (knapsack.py).

    - quantize.auto: {bits: 4.5}                                   # average over the layers, scales included
    - quantize.auto: {bytes: 400000, choices: [8, 4, quantize.gptq: {bits: 3}], pins: {"layers.0.*": 8}}
    - quantize.auto: {milliseconds: 1.5, choices: [float, quantize.dynamic, 4]}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import pydantic
import torch
from torch.fx import Graph, GraphModule

from ...common.errors import PlanishError, listed
from ...common.progress import say
from .. import layers
from ..blocks import Linear, linear
from ..evaluation import is_causal
from ..journal import Record
from ..model import Entry, Input, Model
from ..passes import Context, Pass, matches
from . import knapsack, sensitivity
from .embeddings import tables
from .linears import HEAD, Linears, Replacement, check_patterns, replace, tied_heads
from .sensitivity import Candidate

FLOAT = "float"
Choice: TypeAlias = int | str | dict[str, dict[str, Any]]
"""8, 4, 3 or 2 for quantize.rtn at these bits, a method's name, {method: fields}, or float"""
NANOSECONDS = 1_000_000
"""costs in time are whole nanoseconds, so that sums are exact"""


class Auto(Pass):
    """Choose each linear layer's format by measured loss against bytes or time; give one of `bits`, `bytes` and `milliseconds`."""

    choices: tuple[Choice, ...] = (8, 4, 3, 2)
    """formats to choose from: bits of quantize.rtn, names of methods on linear layers, {method: fields}, float"""
    bits: float | None = pydantic.Field(default=None, gt=0)
    """budget: average bits of a weight over the layers not pinned to float, scales and zero points included"""
    bytes: int | None = pydantic.Field(default=None, ge=1)
    """budget: bytes of the whole model"""
    milliseconds: float | None = pydantic.Field(default=None, gt=0)
    """budget: sum over the layers not pinned to float of each one's time alone, for `tokens` rows"""
    objective: Literal["auto", "kl", "output"] = "auto"
    """loss of a layer: kl of the model's scores, or squared relative error of the layer's output; auto: kl for causal and labelled models"""
    pins: dict[str, Choice] = pydantic.Field(default={name: FLOAT for name in HEAD})
    """format of layers by glob, the last match counts; embeddings and what is no linear layer stay float without a pin"""
    layers: tuple[str, ...] = ("*",)
    """layers that are quantized: globs of layer names"""
    samples: int = pydantic.Field(default=16, ge=1)
    """calibration samples for the losses, drawn from the data by the recipe's seed; a method's own calibration takes its own number"""
    tokens: int = pydantic.Field(default=1, ge=1)
    """rows that a timed layer is given: 1 for generation"""
    table: dict[str, float] | None = None
    """milliseconds by 'format outxin', as in the receipt of an earlier run: the times are taken from it and not measured"""

    needs_data: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = ("onnx", "pt2", "tvm")

    @pydantic.model_validator(mode="after")
    def _one_budget(self) -> Auto:
        given = [n for n in ("bits", "bytes", "milliseconds") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"one budget is given by bits, bytes or milliseconds, found {listed(given) or 'none'}")
        if self.table is not None and self.milliseconds is None:
            raise ValueError("a table of milliseconds belongs to a budget in milliseconds")
        if not self.choices:
            raise ValueError("choices are empty")
        return self

    def apply(self, model: Model, context: Context) -> Model:
        """The quantized model. Raises PlanishError for an unknown choice, a glob without layers, and a budget that cannot be kept."""
        assert context.data is not None  # the pipeline has checked needs_data
        offered = _Offers(self, tied_heads(model))
        pins = [
            p for p, choice in self.pins.items() if p not in HEAD and not (choice == FLOAT and _embedding(model, p))
        ]
        check_patterns(model, "quantize.auto", (*self.layers, *pins))
        items = _linears(model, self.layers)
        methods = {n: offered.for_layer(n) for n in items}
        free = {n: m for n, m in methods.items() if set(m) != {FLOAT}}
        if not free:
            raise PlanishError("quantize.auto: every layer is pinned to float")
        objective = self._objective(model, context)
        decided = context.journal.once(
            "choice",
            list(free),
            lambda: self._decide(model, context, items, free, offered, objective),
            context.generator,
        )
        result = model.with_receipt(*(Entry(**e) for e in decided.facts["receipt"]))
        for index, method in enumerate(offered.methods):
            names = tuple(n for n, choice in decided.facts["choices"].items() if choice == index)
            if method is not None and names:
                own = dataclasses.replace(context, journal=context.journal.section(f"{index}"))
                result = method.model_copy(update={"layers": names, "skip": ()}).apply(result, own)
        return result

    def _decide(
        self,
        model: Model,
        context: Context,
        items: Mapping[str, Linear],
        free: Mapping[str, list[str]],
        offered: _Offers,
        objective: Literal["kl", "output"],
    ) -> Record:
        """{choices: {layer: index of a method}, receipt: lines as dicts}. The times that it measures are not the same in another run."""
        assert context.data is not None
        batches = list(context.data.sample(self.samples, context.generator).batches(model, 4))
        wanted = {n: {k: m for k, m in enumerate(offered.methods) if offered.labels[k] in free[n] and m} for n in free}
        times = _Times(self, context)
        options: dict[str, list[_Option]] = {}
        for item, found in sensitivity.measure(model, batches, wanted, context.generator, objective == "kl"):  # pyright: ignore[reportArgumentType]
            options[item.name] = self._options(item, found, offered, FLOAT in free[item.name], objective, model, times)
        budget, unit, scale = self._budget(model, items, options)
        solution = self._solve(options, budget, unit, scale)
        chosen = {n: options[n][c] for n, c in zip(options, solution.choices, strict=True)}
        entries = [*_receipt(chosen, options, solution, budget, unit, objective, scale), *times.receipt()]
        facts = {
            "choices": {n: o.choice for n, o in chosen.items()},
            "receipt": [dataclasses.asdict(e) for e in entries],
        }
        return Record({}, facts)

    def _objective(self, model: Model, context: Context) -> Literal["kl", "output"]:
        if self.objective != "auto":
            return self.objective
        labelled = context.data is not None and context.data.labels is not None
        return "kl" if labelled or is_causal(model) else "output"

    def _options(
        self,
        item: Linear,
        found: Sequence[Candidate],
        offered: _Offers,
        with_float: bool,
        objective: str,
        model: Model,
        times: _Times,
    ) -> list[_Option]:
        """Formats of a layer with loss and cost."""
        timed = self.milliseconds is not None
        made = []
        for c in found:
            loss = c.kl if objective == "kl" else c.error
            assert loss is not None
            if not (math.isfinite(loss) and math.isfinite(c.error)):
                say(
                    f"quantize.auto: '{offered.labels[c.choice]}' gives layer '{item.name}' NaN or infinite outputs; not a choice"
                )
                continue
            cost = times.of(item, c.replacement) if timed else c.bytes
            made.append(_Option(c.choice, offered.labels[c.choice], max(0.0, loss), cost, c.error))
        if with_float:
            cost = times.of(item, None) if timed else float_bytes(model, item)
            made.append(_Option(offered.labels.index(FLOAT), FLOAT, 0.0, cost, 0.0))
        if not made:
            raise PlanishError(f"quantize.auto: layer '{item.name}' can take none of {listed(offered.labels, 8)}")
        return made

    def _budget(
        self, model: Model, items: Mapping[str, Linear], options: Mapping[str, Sequence[_Option]]
    ) -> tuple[int, str, float]:
        """(what the layers may cost, unit, how many of the costs make one unit)"""
        if self.milliseconds is not None:
            return int(self.milliseconds * NANOSECONDS), "ms", NANOSECONDS
        if self.bits is not None:
            return int(self.bits * sum(items[n].weight.numel() for n in options) / 8 + 1e-6), "bytes", 1
        assert self.bytes is not None
        return self.bytes - (model.bytes() - sum(float_bytes(model, items[n]) for n in options)), "bytes", 1

    def _solve(
        self, options: Mapping[str, Sequence[_Option]], budget: int, unit: str, scale: float
    ) -> knapsack.Solution:
        costs = [[o.cost for o in row] for row in options.values()]
        least = sum(min(row) for row in costs)
        if least > budget:
            short = least - budget
            if self.bytes is not None:
                closest = f"{self.bytes + short} bytes; bytes: {self.bytes} was asked for"
            elif self.bits is not None:
                closest = (
                    f"{math.ceil(1e4 * self.bits * least / budget) / 1e4:g} bits; bits: {self.bits:g} was asked for"
                )
            else:
                closest = f"{least / scale:.6g} ms; milliseconds: {self.milliseconds:g} was asked for"
            raise PlanishError(
                f"quantize.auto: the budget cannot be kept with these choices and pins: the smallest model has {closest}"
            )
        return knapsack.solve(costs, [[o.loss for o in row] for row in options.values()], budget)


@dataclass(frozen=True)
class _Option:
    """One format of one layer."""

    choice: int
    label: str
    loss: float
    cost: int
    """bytes or nanoseconds"""
    error: float


def _embedding(model: Model, pattern: str) -> bool:
    """Whether a pin names an embedding, which this pass leaves in float anyway."""
    return any(matches(t.name, [pattern]) for t in tables(model))


class _Offers:
    """The formats that the fields name: those to choose from, and those that only pins use."""

    def __init__(self, config: Auto, tied: set[str]) -> None:
        self.config, self.tied = config, tied
        named = [*config.choices, *config.pins.values(), FLOAT]
        self.labels = list(dict.fromkeys(label(c) for c in named))
        self.methods = [_method(next(c for c in named if label(c) == text)) for text in self.labels]

    def for_layer(self, name: str) -> list[str]:
        """Labels of the formats that a layer may take. An output projection tied to the embedding is pinned as lm_head too."""
        names = [name, HEAD[0]] if name in self.tied else [name]
        pinned = [c for pattern, c in self.config.pins.items() if any(matches(n, [pattern]) for n in names)]
        return [label(pinned[-1])] if pinned else [label(c) for c in self.config.choices]


def label(choice: Choice) -> str:
    """How a format is called in messages and the receipt: 'float', 'rtn bits=4', 'dynamic'."""
    if choice == FLOAT:
        return FLOAT
    name, fields = _named(choice)
    return " ".join([name.removeprefix("quantize."), *(f"{k}={v}" for k, v in fields.items())])


def _named(choice: Choice) -> tuple[str, dict[str, Any]]:
    """(name of the pass, its fields)"""
    if isinstance(choice, int):
        return "quantize.rtn", {"bits": choice}
    if isinstance(choice, str):
        return choice, {}
    if len(choice) != 1:
        raise PlanishError(f"quantize.auto: a choice is one method with its fields, found {listed(choice)}")
    return next(iter(choice.items()))


def _method(choice: Choice) -> Linears | None:
    """The pass of a format, None for float. Raises PlanishError for what is no method on linear layers."""
    from .. import recipe

    if choice == FLOAT:
        return None
    name, fields = _named(choice)
    known = {n: kind for n, kind in recipe.methods().items() if issubclass(kind, Linears)}
    if name not in known:
        raise PlanishError(
            f"quantize.auto: '{name}' is no choice; accepted: bits of quantize.rtn, {FLOAT}, {listed(known, 20)}"
        )
    try:
        return known[name].model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "fields"
        raise PlanishError(f"quantize.auto: choice '{label(choice)}', {where}: {first['msg']}") from None


def _linears(model: Model, patterns: Sequence[str]) -> dict[str, Linear]:
    """The linear layers in question, by name; a layer that is called twice counts once."""
    found = (linear(model.graph, n) for n in model.graph.graph.nodes)
    return {i.name: i for i in found if i is not None and matches(i.name, patterns)}


def float_bytes(model: Model, item: Linear) -> int:
    """Bytes that go when the layer is quantized: none where something else reads its weight too (tied embeddings)."""
    node = item.node.args[1]
    while not layers.is_constant(node):
        if len(node.users) > 1:  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            return 0
        node = node.args[0]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    same = [n for n in model.graph.graph.nodes if n.op == "get_attr" and n.target == node.target]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    if sum(len(n.users) for n in same) > 1:
        return 0
    value = layers.tensor(model.graph, str(node.target))  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return value.numel() * value.element_size()


class _Times:
    """Milliseconds of single layers, one measurement for each shape and format."""

    def __init__(self, config: Auto, context: Context) -> None:
        self.config, self.context = config, context
        self.found: dict[str, float] = {}
        if config.milliseconds is not None and config.table is None:
            if context.target.name != "host":
                raise PlanishError(
                    f"quantize.auto: layers are timed on this machine only, not for '{context.target.name}'; give bytes, bits or a table"
                )
            if context.time is None:
                raise PlanishError(
                    "quantize.auto: nothing here times layers (Context.time); give bytes, bits or a table"
                )

    def of(self, item: Linear, replacement: Replacement | None) -> int:
        """Nanoseconds of a layer in a format, None for float."""
        out, width = item.weight.shape
        text = FLOAT if replacement is None else f"{replacement.op} " + ",".join(f"{k}={v}" for k, v in sorted(replacement.attributes.items()))  # fmt: skip
        key = f"{text} {out}x{width}"
        if key not in self.found:
            self.found[key] = self._given(key) if self.config.table is not None else self._measured(item, replacement)
        return round(self.found[key] * NANOSECONDS)

    def receipt(self) -> list[Entry]:
        """A line for every time, from which `table` can be written."""
        return [Entry(k, "timed", f"{v:.6g} ms for {self.config.tokens} rows", 0, 0) for k, v in self.found.items()]

    def _given(self, key: str) -> float:
        assert self.config.table is not None
        if key not in self.config.table:
            raise PlanishError(f"quantize.auto: the table has no '{key}'; it has {listed(self.config.table, 6)}")
        return self.config.table[key]

    def _measured(self, item: Linear, replacement: Replacement | None) -> float:
        assert self.context.time is not None
        model = alone(item)
        if replacement is not None:
            (only,) = _linears(model, ["*"]).values()
            replace(model.graph, only, replacement)
            layers.drop_unused(model.graph)
        x = torch.randn(self.config.tokens, item.weight.shape[1], generator=torch.Generator().manual_seed(0))
        return float(f"{self.context.time(model, {'x': x.numpy()}):.6g}")


def alone(item: Linear) -> Model:
    """A model of one linear layer: x (batch, in) -> (batch, out)."""
    module = GraphModule(torch.nn.Module(), Graph())
    x = module.graph.placeholder("x")
    weight = layers.add_parameter(module, "layer.weight", item.weight.clone())
    bias = None if item.bias is None else layers.add_parameter(module, "layer.bias", item.bias.clone())
    module.graph.output(module.graph.call_function(torch.ops.aten.linear.default, (x, weight, bias)))
    module.recompile()
    return Model(module, (Input("x", (1, item.weight.shape[1]), torch.float32),), True, item.name)


def _receipt(
    chosen: Mapping[str, _Option],
    options: Mapping[str, Sequence[_Option]],
    solution: knapsack.Solution,
    budget: int,
    unit: str,
    objective: str,
    scale: float,
) -> list[Entry]:
    """What was decided, and for every layer what it was decided from."""
    total = f"{objective} {solution.loss:.6g} in total, {solution.cost / scale:.10g} of {budget / scale:.10g} {unit}"
    entries = [Entry("mixed precision", "solved", total, 0, 0)]
    for name, option in chosen.items():
        others = "; ".join(
            f"{o.label}: {objective} {o.loss:.3g}, output error {o.error**0.5:.3g}, {o.cost / scale:.6g} {unit}"
            for o in options[name]
        )
        entries.append(Entry(f"{name}.weight", "chosen", f"{option.label} of ({others})", 0, 0))
    return entries
