"""`linear_codebook` in TVM: four-bit codes looked up in a register where they are multiplied.

MXFP4 and NVFP4 keep their scales of one byte; NF4 and FP4 keep float32 scales, nested ones too, which are widened when the module is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .. import codebooks
from .lowering import Lowering, Use
from .packed import Packed, add_bias, linear, plain, table


class LinearCodebook(Lowering):
    """Equal to the reference within float32 rounding."""

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out)."""
        form = str(use.attributes["format"])
        codes = codebooks.unpack(torch.from_numpy(use.array("codes").copy()), codebooks.high_first(form)).numpy()
        weight = self._weight(use, form, codes)
        y = linear(use, use.tensors["x"], weight)
        if form == "nvfp4":
            second = float(use.array("second_scale"))
            y = use.emit(use.ir.relax.op.multiply(y, use.ir.relax.const(np.float32(second))))
        return [add_bias(use, y)]

    def _weight(self, use: Use, form: str, codes: np.ndarray) -> Packed:
        out, channels = codes.shape
        group = int(use.attributes["group"])
        values, scale = codebooks.table(form).numpy()[None], use.array("scale")
        if form in ("mxfp4", "nvfp4"):
            widen = _power_of_two if form == "mxfp4" else _e4m3
            return Packed(codes, 4, group, scale, table, tables=values, widen=lambda s: widen(use, s))
        stored, second, offset = (use.optional(n) for n in ("scale", "second_scale", "offset"))
        blocks = codebooks.block_scales(torch.tensor(stored), _tensor(second), _tensor(offset), form)
        run = math.gcd(channels, group)  # blocks go over the end of a row where the group does not divide it
        starts = np.arange(0, out * channels, run).reshape(out, -1)
        return Packed(codes, 4, run, blocks.numpy()[starts // group], table, tables=values, widen=plain)


def _tensor(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values)


def _power_of_two(use: Use, byte: Any) -> Any:
    """2^(byte - 127); byte 0 is below the normal float32 numbers."""
    tirx = use.ir.tirx
    bits = byte.astype("uint32") << tirx.const(23, "uint32")
    least = tirx.const(1 << 22, "uint32")
    return tirx.reinterpret("float32", tirx.Select(bits == tirx.const(0, "uint32"), least, bits))


def _e4m3(use: Use, byte: Any) -> Any:
    """The E4M3 value of a byte without sign, as a float16 with another exponent bias."""
    tirx = use.ir.tirx
    wide = tirx.reinterpret("float16", byte.astype("uint16") << tirx.const(7, "uint16"))
    return wide.astype("float32") * tirx.const(2.0**8, "float32")
