"""From a linear layer to `planish::linear_codebook`: what the passes nf4, fp4, mxfp4 and nvfp4 share."""

from __future__ import annotations

from ...kernels import codebooks, linear_codebook
from ..blocks import Linear
from .linears import Replacement, Sizes

assert linear_codebook.LinearCodebook  # its import defines the op


def coded(item: Linear, name: codebooks.Name, group: int, nested: bool = False) -> Replacement:
    """The layer in a format of codebooks.py. Raises PlanishError for a shape that the format does not take."""
    found = codebooks.encode(item.weight, name, group, nested, item.name)
    tensors = {n: t for n, t in vars(found).items() if t is not None}
    lost = codebooks.lost(item.weight, found, name, group)
    what = f"{name}, blocks of {group}" + (", scales in 8 bits" if nested else "")
    return Replacement("linear_codebook", tensors, {"format": name, "group": group}, what, lost=lost)


def stored(item: Sizes, name: codebooks.Name, group: int, nested: bool = False) -> int:
    """Bytes of `coded`. Raises PlanishError as it does."""
    codebooks.check(name, item.inputs, group, item.name)
    values = item.outputs * item.inputs
    blocks = -(-values // group)
    if name in ("mxfp4", "nvfp4"):
        return values // 2 + blocks + (4 if name == "nvfp4" else 0)
    return values // 2 + (blocks + 4 * -(-blocks // codebooks.NESTED) + 4 if nested else 4 * blocks)
