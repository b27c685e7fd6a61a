"""The key/value cache of a causal language model in 8 bits: a scale for each token of each head. No data is needed.

New keys and values become `planish::kv_cache` before they join the past, keys behind their rotary embedding. The scale is a token's own, so the
model computes to the bit what a runtime computes that holds codes (kernels/kv_cache.py); attention itself stays as it was. Put it behind
the passes that quantize weights: those that calibrate take a model in float.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...common.errors import PlanishError, listed
from ...kernels import kv_cache as op
from .. import kv_caches, layers
from ..kv_caches import Cached, Stored
from ..model import Entry, Model
from ..passes import Context, Foreseen, Pass

FLOAT = 4
"""bytes of a number in the cache of a model that computes in float32"""


class KvCache(Pass):
    """Round new keys and values to 8 bits before they are cached."""

    formats = ("onnx", "pt2", "tvm")

    format: op.Name = "int8"
    """int8, or e4m3: 8-bit floats, 4 bits of exponent and 3 of mantissa"""

    def foresee(self, model: Model, taken: frozenset[str]) -> Foreseen:
        """No tensor of the model changes."""
        self._caches(model)
        return Foreseen({}, 0)

    def apply(self, model: Model, context: Context) -> Model:
        """Put the op on every layer's keys and values. Raises PlanishError for a model without a cache, or with a rounded one."""
        model = model.editable()
        entries = []
        for cached in self._caches(model):
            for kind, stored in (("key", cached.key), ("value", cached.value)):
                entries.append(self._entry(f"{kind} cache of layer {cached.name}", stored))
                self._round(model, stored)
        layers.drop_unused(model.graph)
        return model.with_receipt(*entries)

    def _caches(self, model: Model) -> Sequence[Cached]:
        """Every layer's cache, in float."""
        found = kv_caches.find(model)
        if not found:
            states = [i.name for i in model.inputs if i.state]
            raise PlanishError(
                f"quantize.kv_cache: '{model.source}' carries {f'the states {listed(states)}' if states else 'no state'}; "
                "a causal language model with past_key_… and past_value_… is expected"
            )
        coded = [c.name for c in found if c.key.format != "none" or c.value.format != "none"]
        if coded:
            raise PlanishError(
                f"quantize.kv_cache: the cache of '{model.source}' is quantized already (layer {coded[0]})"
            )
        return found

    def _entry(self, name: str, stored: Stored) -> Entry:
        """Bytes of one token."""
        before, after = stored.heads * stored.size * FLOAT, stored.heads * (stored.size + op.SCALE)
        return Entry(
            name,
            "quantized",
            f"{self.format}, a scale for each token and head; bytes are those of a token",
            before,
            after,
        )

    def _round(self, model: Model, stored: Stored) -> None:
        """Let the op stand between what is new and the concatenation."""
        with model.graph.graph.inserting_before(stored.whole):
            made = model.graph.graph.call_function(torch.ops.planish.kv_cache.default, (stored.new, self.format))
        made.meta["val"] = stored.new.meta.get("val")
        stored.whole.args = ([stored.past, made], *stored.whole.args[1:])
