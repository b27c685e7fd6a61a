"""LLM.int8(), Dettmers et al. 2022: int8 weights and activations, except for the columns in which activations have outliers.

A column is an outlier column when some activation of calibration reaches the threshold. These columns are frozen into the model: the
union over all calibration data, each layer's own, its size in the receipt. What was not seen in calibration is not lost either: the
model gets one more output, `values_beyond_threshold`, which counts for each sample the values beyond the threshold in other columns,
summed over the layers. With `frozen` false the columns are found at every call, as in the paper; then a token's result depends
on the batch, and with `exact` the model has no ONNX form.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pydantic
import torch
from torch.fx import Node

from ...common.errors import PlanishError
from ...kernels import linear_int8_outlier as op
from .. import layers
from ..blocks import Linear
from ..model import Model, output_names
from ..moments import Moments
from ..passes import Context
from .linears import Linears, Replacement, Sizes

COUNTER = "values_beyond_threshold"
"""name of the output (batch,) int64"""
LARGEST = 65504.0
"""of float16"""
aten = torch.ops.aten


class LlmInt8(Linears):
    """Vector-wise int8 with outlier columns in 16 bits."""

    needs_data: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    threshold: float = pydantic.Field(default=6.0, gt=0, allow_inf_nan=False)
    """activations of at least this magnitude make their column an outlier column"""
    exact: bool = True
    """keep the outlier columns of the weight in float16, as the paper does; false restores them from int8, as bitsandbytes does"""
    frozen: bool = True
    """take the outlier columns of calibration; false finds them at every call"""

    def stored(self, members: Sequence[Sizes]) -> int:
        """A byte for each weight and a float32 scale for each row; outlier columns are not known yet."""
        return sum(item.outputs * (item.inputs + 4) for item in members)

    def replacements(
        self, members: Sequence[Linear], moments: Moments | None, generator: torch.Generator
    ) -> list[Replacement]:
        """Each layer on its own; those that read one tensor have the same columns."""
        assert moments is not None
        columns = moments.outliers(self.threshold)  # (k,)
        return [self._replacement(item, columns, float(moments.peak.max())) for item in members]

    def _replacement(self, item: Linear, columns: torch.Tensor, peak: float) -> Replacement:
        """`peak` is the largest activation of calibration."""
        codes, scale = op.quantize_rows(item.weight)
        tensors, restored = {"codes": codes, "scale": scale}, codes.float() * scale[:, None]
        if self.frozen or self.exact:
            tensors["columns"] = columns
        if self.exact:
            outliers = item.weight[:, columns]  # (out, k)
            if bool((outliers.abs() > LARGEST).any()):
                raise PlanishError(
                    f"layer '{item.name}': its weight reaches {float(outliers.abs().max()):.3g} in an outlier column, beyond "
                    f"float16 ({LARGEST:.0f}); exact: false keeps these columns in int8"
                )
            tensors["outlier_weight"] = outliers.half()
            restored[:, columns] = tensors["outlier_weight"].float()
        kind = "float16" if self.exact else "restored from int8"
        found = f"{len(columns)} of {item.weight.shape[1]} columns {kind} (|x| >= {self.threshold:g} in calibration)"
        if not self.frozen:
            found += ", found again at every call"
        if peak > LARGEST:
            found += f"; activations reach {peak:.3g}, beyond float16, and are multiplied in float32"
        attributes = {"threshold": self.threshold, "dynamic": not self.frozen, "samples": -1}
        return Replacement(op.__name__.rpartition(".")[2], tensors, attributes, f"LLM.int8(): int8 per row, {found}", restored)  # fmt: skip

    def apply(self, model: Model, context: Context) -> Model:
        """Replace the chosen linears and add the counter. Raises PlanishError as `Linears` does, and for weights beyond float16."""
        before = {n.name for n in model.graph.graph.nodes}
        result = super().apply(model, context)
        made = [n for n in result.graph.graph.nodes if layers.op(n) == "planish.linear_int8_outlier" and n.name not in before]  # fmt: skip
        return _with_counter(result, made)


def _with_counter(model: Model, nodes: Sequence[Node]) -> Model:
    """The model with the output COUNTER: the second results of `nodes`, added up for each sample."""
    if not nodes:
        return model
    module, graph = model.graph, model.graph.graph
    output = next(n for n in graph.nodes if n.op == "output")
    names = list(output_names(model))
    leaves = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
    total = leaves[names.index(COUNTER)] if COUNTER in names else None
    small, large = (layers.shapes(model, batch) for batch in (2, 4))
    with graph.inserting_before(output):
        first = next(n for n in graph.nodes if n.op == "placeholder")
        batch = graph.call_function(aten.sym_size.int, (first, 0)) if model.batched else 1
        for node in nodes:
            source = node.args[0]
            assert isinstance(source, Node)
            along = [d for d, (a, b) in enumerate(zip(small[source], large[source], strict=True)) if a != b]
            layers.set_argument(node, "samples", along[0] if along else -1)
            count = graph.call_function(operator.getitem, (node, 1))  # (rows of all samples,) or (1,)
            if model.batched and (not along or large[source][along[0]] != 4):
                if not along:
                    raise PlanishError(f"layer '{layers.layer(node)}' reads a tensor without the batch dimension")
                split = graph.call_function(aten.reshape.default, (count, [batch, -1]))
                count = graph.call_function(aten.sum.dim_IntList, (split, [1]))
            total = count if total is None else graph.call_function(aten.add.Tensor, (total, count))
    if COUNTER in names:
        leaves[names.index(COUNTER)] = total
    else:
        place = len(leaves) - sum(i.state for i in model.inputs)  # states stay last
        leaves.insert(place, total)
        names.insert(place, COUNTER)
    output.args = (tuple(leaves),)
    layers.drop_unused(module)
    return replace(model, names=tuple(names))
