"""Layer normalization with SMLAD for the sums and the FPU's rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np

from ... import layer_norm
from ...op import Call, Node
from ..version import Version

REACH = 2**30
"""codes before saturation must stay below it"""


class LayerNorm(Version):
    """Rows of whole words."""

    op: ClassVar[str] = "layer_norm"
    features: ClassVar[tuple[str, ...]] = ("dsp", "fpu")

    def call(self, node: Node) -> Call | None:
        """See Version."""
        size = node.inputs[0].shape[-1]
        gain, shift = (float(np.abs(node.constants[k]).max()) for k in ("gain", "shift"))
        reach = math.sqrt(size) * gain + shift + 256  # no code of a row is further than that from the mean
        if size % 4 or reach >= REACH or any(t.bits != 8 for t in (*node.inputs, node.output)):
            return None
        made = layer_norm.LayerNorm().call(node)
        source = "dsp/layer_norm.c"
        return replace(made, kernel="dsp_layer_norm", sources=(source,), headers=("dsp/layer_norm.h",))
