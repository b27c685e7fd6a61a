"""`linear_svd` in TVM: the packed residual on rounded activations, and the float16 branch by the same kernel with 16-bit codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..linear_svd import FLOAT_BITS
from . import activations
from .linear_wna16 import unpacked
from .lowering import Lowering, Use
from .packed import add_bias, half, linear, symmetric


class LinearSvd(Lowering):
    """Equal to the reference within float32 rounding; the activation codes are the reference's."""

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether activations are rounded."""
        return int(attributes["activation_bits"]) < FLOAT_BITS

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out)."""
        op, x, smooth = use.ir.relax.op, use.tensors["x"], use.tensors["smooth"]
        bits, group, x_bits = (int(use.attributes[n]) for n in ("bits", "group", "activation_bits"))
        shift, unsigned = float(use.attributes["shift"]), bool(use.attributes["unsigned"])
        h = use.emit(op.multiply(x, smooth))
        moved = h
        if shift:
            positive = use.emit(op.add(x, use.ir.relax.const(np.float32(shift))))
            moved = use.emit(op.multiply(positive, smooth))
        codes = unpacked(use.array("codes"), bits, group)
        *front, channels = use.shape(x)
        if codes.shape[1] > channels:
            filling = use.ir.relax.const(np.zeros((*front, codes.shape[1] - channels), np.float32))
            moved = use.emit(op.concat([moved, filling], axis=-1))
        if x_bits < FLOAT_BITS:
            moved = use.emit(op.nn.relu(moved)) if unsigned else moved
            moved = activations.symmetric(use, moved, x_bits + unsigned, group)
        y = add_bias(use, linear(use, moved, symmetric(codes, bits, group, use.array("scale"))))
        down, up = use.array("down"), use.array("up")
        if len(down):
            thin = linear(use, linear(use, h, half(down)), half(up))
            y = use.emit(op.add(y, thin))
        return [y]
