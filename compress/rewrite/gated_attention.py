"""Gated attention: a gate per head and token that can close, so that training grows no outliers (Bondarenko et al. 2023).

    head_h(t) becomes head_h(t) * sigmoid(G_h(x_h(t))),  G_h(x) = w_h x + b_h

x_h is head h's share of the attention's input x (batch, length, width): its features h * width / heads and following. The
gates start at `pi` on average: w ~ N(0, deviation^2), b = logit(pi). For fine-tuning, what a gate lets through is scaled by 1 / pi, so that
the model starts where it was (exactly with deviation 0); without, it starts with heads of pi times their size, for training anew.
"""

from __future__ import annotations

import math

import pydantic
import torch
from torch.fx import GraphModule, Node

from ...common.errors import PlanishError
from .. import attention, layers
from ..attention import Attention
from ..model import Entry, Model
from ..passes import Context, Pass

aten = torch.ops.aten


class GatedAttention(Pass):
    """Multiply each head of attention by a learned gate. For training; with `finetune` the model starts as the original."""

    pi: float = pydantic.Field(default=0.25, gt=0, lt=1)
    """how far the gates are open at first; the paper has 0.25 for OPT and 0.25 to 0.9 for BERT"""
    deviation: float = pydantic.Field(default=0.01, ge=0)
    """standard deviation of the gates' weights at first"""
    finetune: bool = True
    """whether a trained model is rewritten: scales what the gates let through by 1 / pi"""
    layers: tuple[str, ...] = ("*",)
    """attentions that are changed: globs of their names"""

    def untrained(self) -> bool:
        """Whether the model must be trained before it computes anything like the original."""
        return not self.finetune

    def apply(self, model: Model, context: Context) -> Model:
        """The rewritten model. Raises PlanishError without attention, for heads that do not share its input, and for a quantized model."""
        name = "rewrite.gated_attention"
        layers.refuse_quantized(model, name)
        model = model.copy()
        attention.describe(model)
        entries = []
        for item in attention.chosen(model, name, self.layers):
            size = self._gate(model.graph, item, context.generator)
            entries.append(Entry(f"{item.name}.gate.weight", "added", f"gated attention, pi {self.pi:g}", 0, 4 * size))
        layers.drop_unused(model.graph)
        return model.with_receipt(*entries)

    def _gate(self, module: GraphModule, item: Attention, generator: torch.Generator) -> int:
        """Put a gate behind the heads; returns the number of its weights."""
        x = attention.input_of(item)
        heads, width = _sizes(item, x)
        assert x is not None
        weight = torch.randn(heads, width // heads, generator=generator) * self.deviation  # (heads, width / heads)
        bias = torch.full((heads,), math.log(self.pi / (1 - self.pi)))  # (heads,)
        graph, mixed = module.graph, item.mixed
        readers = list(mixed.users)
        with graph.inserting_before(mixed.next):
            w = layers.add_parameter(module, f"{item.name}.gate.weight", weight)
            b = layers.add_parameter(module, f"{item.name}.gate.bias", bias)
            split = graph.call_function(aten.unflatten.int, (x, -1, [heads, width // heads]))
            products = graph.call_function(aten.mul.Tensor, (split, w))
            sums = graph.call_function(aten.sum.dim_IntList, (products, [-1]))  # (batch, length, heads)
            open_ = graph.call_function(aten.sigmoid.default, (graph.call_function(aten.add.Tensor, (sums, b)),))
            turned = graph.call_function(aten.transpose.int, (open_, 1, 2))
            gate = graph.call_function(aten.unsqueeze.default, (turned, -1))  # (batch, heads, length, 1)
            if self.finetune:
                gate = graph.call_function(aten.mul.Tensor, (gate, 1 / self.pi))
            gated = graph.call_function(aten.mul.Tensor, (mixed, gate))
        gated.meta["val"] = mixed.meta.get("val")
        for reader in readers:
            reader.replace_input_with(mixed, gated)
        return weight.numel() + bias.numel()


def _sizes(item: Attention, x: Node | None) -> tuple[int, int]:
    """Heads of an attention and the width of its input. Raises PlanishError where a head has no share of the input."""
    shape = tuple(item.mixed.meta["val"].shape)
    if len(shape) != 4 or not isinstance(shape[1], int):
        raise PlanishError(
            f"rewrite.gated_attention: '{item.name}' gives {shape}; (batch, heads, length, size) is expected"
        )
    if x is None or x.meta["val"].ndim != 3 or x.meta["val"].shape[-1] % shape[1]:
        found = "no linear layer" if x is None else str(tuple(x.meta["val"].shape))
        raise PlanishError(
            f"rewrite.gated_attention: the queries of '{item.name}' are made from {found}; (batch, length, width) with a width "
            f"that its {shape[1]} heads divide is expected"
        )
    return shape[1], int(x.meta["val"].shape[-1])
