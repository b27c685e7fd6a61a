"""Embeddings: tables of rows that integers pick, rounded to the grids of quantize.rtn. No data is needed.

In a small encoder the words' table holds half of the weights. Rows become `planish::embedding_wna16`, which decodes those that are picked.
A table that an output projection shares has to stay as long as that needs it: once a pass has quantized the projection, with a
`skip` that lets it, the table has no other reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import pydantic
import torch
from torch.fx import Node

from ...common.errors import PlanishError, listed
from ...common.progress import track
from ...kernels import embedding_wna16
from ...kernels.packing import CHUNK, group_bytes, pack, parts
from .. import layers
from ..blocks import split
from ..journal import Record
from ..model import Entry, Model
from ..passes import Context, Foreseen, Part, Pass, matches
from . import grids
from .integer import SCALE
from .linears import check_finite

assert embedding_wna16  # registers planish::embedding_wna16

EMBEDDING = torch.ops.aten.embedding.default
COPIES = 12
"""temporaries of a chunk while its grid is searched, about"""


@dataclass(frozen=True)
class Table:
    """One table and what reads it."""

    name: str
    """layer name"""
    weight: str
    """name of the parameter (rows, columns)"""
    nodes: tuple[Node, ...]
    """embeddings"""
    others: tuple[Node, ...]
    """that read the whole table: an output projection"""


class Embeddings(Pass):
    """Round embedding tables to nearest, with a search for the range of each group that errs least."""

    formats = ("onnx", "pt2", "tvm")

    bits: Literal[8, 4] = 4
    """of a value of the table"""
    group: int | Literal["auto"] = "auto"
    """columns of a row that share a scale; auto for the largest of 64, 32, 16 that divides the row, else the row"""
    symmetric: bool = True
    """without zero points"""
    clip: bool = True
    """search the range of each group; otherwise it covers the group's values"""
    layers: tuple[str, ...] = ("*",)
    """embeddings that are treated: globs of layer names"""
    skip: tuple[str, ...] = ()
    """embeddings left alone: globs of layer names"""

    @pydantic.field_validator("group")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a group has at least one column")
        return value

    def foresee(self, model: Model, taken: frozenset[str]) -> Foreseen:
        """Sizes of what is stored. An embedding goes by the name of its table, since a tied projection has the layer's name."""
        blocks: dict[str, Part] = {}
        problems: list[str] = []
        places = {node: block.name for block in split(model.graph) for node in block.nodes}
        for table in self._chosen(model):
            others = tuple(n for n in table.others if layers.layer(n) not in taken)
            if table.weight in taken or self._left(replace(table, others=others)) is not None:
                continue
            stored = layers.tensor(model.graph, table.weight)
            rows, columns = stored.shape
            try:
                group = grids.group_size(table.name, columns, self.group)
            except PlanishError as error:
                problems.append(str(error))
                continue
            each = group_bytes(group, self.bits) + SCALE + (0 if self.symmetric else 1)
            own = Part((table.weight,), rows * (columns // group) * each, stored.nbytes, 4 * CHUNK * COPIES)
            place = places[table.nodes[0]]
            old = blocks.get(place, Part((), 0, 0, 0))
            blocks[place] = Part(
                old.layers + own.layers, old.stored + own.stored, old.weights + own.weights, max(old.work, own.work)
            )
        return Foreseen(blocks, 0, tuple(problems))

    def apply(self, model: Model, context: Context) -> Model:
        """Replace the chosen embeddings. Raises PlanishError when there is none and for tables that are not finite."""
        model = model.editable()
        journal = context.journal.section("embeddings")
        entries = []
        for table in track(self._chosen(model), "quantize.embeddings"):
            stored = layers.tensor(model.graph, table.weight).detach()
            before = stored.numel() * 4
            reason = self._left(table)
            if reason is not None:
                entries.append(Entry(table.weight, "left", reason, before, before))
                continue
            group = grids.group_size(table.name, stored.shape[1], self.group)
            found = journal.once(
                table.weight,
                [table.name],
                lambda t=table, s=stored, g=group: self._rounded(t.name, s, g),
                context.generator,
            )
            self._replace(model, table, found, group)
            width = f"groups of {group}" if group < stored.shape[1] else "per row"
            what = f"round to nearest{', clipped' if self.clip else ''}: int{self.bits}, {width}"
            after = sum(t.nbytes for t in found.tensors.values())
            what += "" if self.symmetric else ", zero points"
            entries.append(Entry(table.weight, "quantized", what, before, after, found.facts["error"]))
        layers.drop_unused(model.graph)
        return model.with_receipt(*entries)

    def _chosen(self, model: Model) -> list[Table]:
        """Tables that `layers` names. Raises PlanishError for a glob that matches none."""
        every = list(tables(model))
        names = [t.name for t in every]
        for pattern in (*self.layers, *self.skip):
            if not any(matches(n, [pattern]) for n in names):
                raise PlanishError(
                    f"quantize.embeddings: '{pattern}' matches no embedding; embeddings: {listed(names, 6) or 'none'}"
                )
        return [t for t in every if matches(t.name, self.layers)]

    def _left(self, table: Table) -> str | None:
        """Why a table stays as it is."""
        if matches(table.name, self.skip):
            return "skipped"
        if any(layers.op(n) != "aten.linear" for n in table.others):
            return f"{listed([n.name for n in table.others])} reads all of it"
        if table.others:
            return "shared with an output projection; when a pass before has quantized that (skip: []), it can be taken"
        return None

    def _rounded(self, name: str, stored: torch.Tensor, group: int) -> Record:
        """Codes and scales of a table (rows, columns), a few rows at a time, and the relative error."""
        check_finite(name, stored)
        rows, columns = stored.shape
        codes = torch.empty(rows, columns // group, group_bytes(group, self.bits), dtype=torch.uint8)
        scale, zero = torch.empty(rows, columns // group), torch.empty(rows, columns // group)
        lost = whole = 0.0
        for part in parts(stored):
            weight = stored[part].float()
            grid = grids.fit(weight, self.bits, group, self.symmetric, self.clip)
            chosen = grid.encode(weight)
            codes[part], scale[part], zero[part] = pack(chosen, self.bits, group), grid.scale, grid.zero
            lost += float(grid.decode(chosen).sub_(weight).square_().sum())
            whole += float(weight.square().sum())
        tensors = {"codes": codes, "scale": scale}
        if not self.symmetric:
            tensors["zero_point"] = zero.to(torch.uint8)
        return Record(tensors, {"error": (lost / whole) ** 0.5 if whole else 0.0})

    def _replace(self, model: Model, table: Table, found: Record, group: int) -> None:
        """Let every embedding that reads the table read the codes."""
        module = model.graph
        taken = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
        name = table.weight
        if f"{name}_codes" in taken:  # of a projection that shared the table
            name = f"{table.name}.embedding.weight"
        with module.graph.inserting_before(table.nodes[0]):
            stored = {k: layers.add_buffer(module, f"{name}_{k}", v) for k, v in found.tensors.items()}
        for node in table.nodes:
            indices = layers.argument(node, "indices")
            args = (indices, stored["codes"], stored["scale"], stored.get("zero_point"), self.bits, group)
            with module.graph.inserting_before(node):
                made = module.graph.call_function(torch.ops.planish.embedding_wna16.default, args)
            made.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)


def tables(model: Model) -> Iterator[Table]:
    """The floating tables that embeddings read, in graph order."""
    readers: dict[str, list[Node]] = {}
    for node in model.graph.graph.nodes:
        for source in node.all_input_nodes:
            if layers.is_parameter(source) and layers.op(node) != "aten._to_copy":
                readers.setdefault(_stored_in(source), []).append(node)
    for name, nodes in readers.items():
        own = tuple(n for n in nodes if n.target is EMBEDDING and _stored_in(n.all_input_nodes[0]) == name)
        if own and layers.tensor(model.graph, name).is_floating_point():
            others = tuple(n for n in nodes if n not in own)
            yield Table(name.rpartition(".")[0] or name, name, own, others)


def _stored_in(source: Node) -> str:
    """Name of the tensor of a node for which `layers.is_parameter` holds."""
    return str((source if source.op == "get_attr" else source.all_input_nodes[0]).target)
