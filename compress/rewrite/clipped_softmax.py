"""Clipped softmax: attention that can give exactly nothing, so that training grows no outliers (Bondarenko et al. 2023).

    p = clip((zeta - gamma) * softmax(x) + gamma, 0, 1),  gamma = -alpha / length

A head that wants to do nothing must drive a softmax to almost zero, which takes ever larger values in front of it; here a
share of at most -gamma / (zeta - gamma) is exactly zero and has no gradient. Rows no longer add up to 1. gamma belongs to the
training length and is fixed here: at run time it does not follow the length of a batch.
"""

from __future__ import annotations

import pydantic
import torch

from ...common.errors import PlanishError
from ...common.progress import say
from .. import attention, layers
from ..evaluation import is_causal
from ..model import Entry, Model
from ..passes import Context, Pass

aten = torch.ops.aten


class ClippedSoftmax(Pass):
    """Stretch and clip the softmax of attention. For training: an already trained model computes something else with it."""

    alpha: float = pydantic.Field(default=4.0, ge=0)
    """gamma = -alpha / length; the paper has 2 to 4 for encoders, its OPT runs 12; 0 clips nothing"""
    zeta: float = pydantic.Field(default=1.0, ge=1)
    """upper end of the stretch; above 1 brings little"""
    length: int | None = pydantic.Field(default=None, ge=1)
    """tokens of a training sequence; None: the model's own window"""
    layers: tuple[str, ...] = ("*",)
    """attentions that are changed: globs of their names"""

    def untrained(self) -> bool:
        """Whether the model must be trained before it computes anything like the original."""
        return self.alpha > 0 or self.zeta > 1

    def apply(self, model: Model, context: Context) -> Model:
        """The rewritten model. Raises PlanishError without attention, without a known length, and for a quantized model."""
        name = "rewrite.clipped_softmax"
        layers.refuse_quantized(model, name)
        gamma = self.gamma(model)
        if is_causal(model):
            say(f"{name}: the paper's causal models lose with a clipped softmax; rewrite.gated_attention serves them")
        model = model.copy()
        attention.describe(model)
        found = attention.chosen(model, name, self.layers)
        for item in found:
            softmax = attention.decompose(model.graph, item).softmax
            assert softmax is not None
            graph = model.graph.graph
            readers = list(softmax.users)
            with graph.inserting_after(softmax):
                stretched = graph.call_function(aten.mul.Tensor, (softmax, self.zeta - gamma))
            with graph.inserting_after(stretched):
                moved = graph.call_function(aten.add.Tensor, (stretched, gamma))
            with graph.inserting_after(moved):
                clipped = graph.call_function(aten.clamp.default, (moved, 0.0, 1.0))
            for node in (stretched, moved, clipped):
                node.meta["val"] = softmax.meta.get("val")
            for reader in readers:
                reader.replace_input_with(softmax, clipped)
        layers.drop_unused(model.graph)
        why = f"clipped softmax, gamma {gamma:.6g}, zeta {self.zeta:g}"
        return model.with_receipt(*(Entry(f"softmax of {a.name}", "rewritten", why, 0, 0) for a in found))

    def gamma(self, model: Model) -> float:
        """-alpha / length."""
        length = self.length or (model.text.window if model.text is not None else None)
        if length is None:
            raise PlanishError(
                f"rewrite.clipped_softmax: '{model.source}' names no longest text; give the training length: length: 128"
            )
        return -self.alpha / length
