"""`linear_fp8` in TVM: a code becomes a float16 by moving its bits, and float32 where it is multiplied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..linear_fp8 import LEAST, MAX
from . import activations
from .lowering import Lowering, Use
from .packed import Decode, Packed, Reader, add_bias, linear

LAYOUTS = {"e4m3": (3, -6), "e5m2": (2, -14)}
"""bits of the mantissa, exponent of the smallest normal number"""


class LinearFp8(Lowering):
    """Equal to the reference within float32 rounding; rounded activations are the reference's."""

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether activations are rounded."""
        return attributes["activations"] != "none"

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out)."""
        x, codes = use.tensors["x"], use.array("codes")
        if use.attributes["activations"] != "none":
            x = per_token(use, x, str(use.attributes["activations"]))
        decode = DECODES[str(use.attributes["format"])]
        weight = Packed(codes, 8, codes.shape[1], use.array("scale")[:, None], decode)
        return [add_bias(use, linear(use, x, weight))]


def _e4m3(reader: Reader, k: Any) -> Any:
    """Sign, 4 bits of exponent (bias 7) and 3 of mantissa, put where float16 (bias 15) has them: smaller by 2^8, zero and below too."""
    tirx, code = reader.tirx, reader.code(k)
    bits = (code & tirx.const(0x80, "uint32")) << tirx.const(8, "uint32")
    bits = bits | ((code & tirx.const(0x7F, "uint32")) << tirx.const(7, "uint32"))
    return tirx.reinterpret("float16", bits.astype("uint16")).astype("float32") * tirx.const(2.0**8, "float32")


def _e5m2(reader: Reader, k: Any) -> Any:
    """The upper half of a float16."""
    tirx = reader.tirx
    bits = reader.code(k) << tirx.const(8, "uint32")
    return tirx.reinterpret("float16", bits.astype("uint16")).astype("float32")


DECODES: dict[str, Decode] = {"e4m3": _e4m3, "e5m2": _e5m2}


def per_token(use: Use, x: Any, form: str) -> Any:
    """The value q(x / s) s of each token of x, q to the nearest 8-bit float, ties to even: a whole number of its steps there."""
    tirx = use.ir.tirx
    mantissa, smallest = LAYOUTS[form]

    def rounded(value: Any, largest: Any) -> Any:
        scale = tirx.max(largest / tirx.const(MAX[form], "float32"), tirx.const(LEAST, "float32"))
        small = activations.clip(use, value / scale, -MAX[form], MAX[form])
        exponent = (tirx.reinterpret("int32", small) >> 23) & tirx.const(0xFF, "int32")
        exponent = tirx.max(exponent, tirx.const(127 + smallest, "int32")) - tirx.const(mantissa, "int32")
        step = tirx.reinterpret("float32", exponent << 23)
        return tirx.nearbyint(small / step) * step * scale

    return activations.segments(use, x, use.shape(x)[-1], rounded, "rounded")
