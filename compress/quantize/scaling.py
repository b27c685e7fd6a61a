"""`Scaling`: the base of the methods that move size between activations and weights and leave the network in float.

The channels of what a group of linears reads are divided by factors and the columns of their weights multiplied by them. A quantizing pass
that follows rounds both. All factors are found on the given network, and then all are folded: each one is exact, so none of
them changes what another one saw, but for the scale of rows, which rounding does not see.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch.fx import Node

from .. import foldings, layers
from ..blocks import Block, Linear, calibrate
from ..fold_affine import fold_affine
from ..foldings import Folding
from ..journal import Record
from ..model import Entry, Model
from ..moments import SAMPLE, Moments
from ..passes import Context, Foreseen
from .linears import Chosen, check_weight, foreseen


class Scaling(Chosen):
    """A method that scales the input channels of linear layers."""

    needs_data: ClassVar[bool] = True
    keep: ClassVar[int] = SAMPLE
    """rows of the layers' input that `factors` is given"""

    def foresee(self, model: Model, taken: frozenset[str]) -> Foreseen:
        """No layer is replaced; 16-bit weights that no later pass quantizes become float32."""
        return foreseen(self, model, taken, self.samples)

    @abc.abstractmethod
    def factors(self, members: Sequence[Linear], moments: Moments, folding: Folding) -> tuple[torch.Tensor, str]:
        """What the tensor that `members` read is divided by, (folding.count,) > 0, and the choice in words for the receipt."""

    def apply(self, model: Model, context: Context) -> Model:
        """Scale the inputs of the chosen linears. Raises PlanishError when none is chosen and for weights that are not finite."""
        model = fold_affine(model)
        wanted = self.wanted(model)
        sizes = foldings.concrete(model)
        found: list[tuple[Sequence[Linear], Folding, torch.Tensor, str]] = []

        journal = context.journal.section(self._method())

        def visit(block: Block, members: Sequence[Sequence[Linear]], moments: Mapping[Node, Moments]) -> None:
            place = [foldings.find(model.graph, g[0].source, [m.node for m in g], sizes) for g in members]

            def make() -> Record:
                tensors, choices = {}, []
                for index, (group, folding) in enumerate(zip(members, place, strict=True)):
                    for item in group:
                        check_weight(item)
                    tensors[str(index)], choice = self.factors(group, moments[group[0].source], folding)
                    choices.append(choice)
                return Record(tensors, choices)

            record = journal.once(block.name, [m.name for g in members for m in g], make, context.generator)
            for index, (group, folding) in enumerate(zip(members, place, strict=True)):
                light = [Linear(m.name, m.node, m.source, torch.empty(0), None) for m in group]
                found.append((light, folding, record.tensors[str(index)], record.facts[index]))

        calibrate(
            model,
            self.batches(context, model),
            wanted,
            visit,
            journal,
            keep=self.keep,
            edits=False,
            what=f"quantize.{self._method()}",
        )
        entries: list[Entry] = []
        for group, folding, factors, choice in found:
            where = folding.where
            readers = [m.node for m in group]
            foldings.divide(model.graph, group[0].source, readers, folding, factors)
            for item in group:
                foldings.scale_columns(model.graph, item.node, factors[folding.channels])
                size = layers.value(model.graph, item.node.args[1]).numel() * 4
                what = f"{self._method()}: columns multiplied, {choice}; the input is divided in {where}"
                entries.append(Entry(f"{item.name}.weight", "folded", what, size, size))
            journal.spill(model.graph)
            journal.release()
        layers.drop_unused(model.graph)
        return model.with_receipt(*entries)
