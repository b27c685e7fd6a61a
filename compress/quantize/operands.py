"""Getting a graph's operands ready for integers: attention taken apart, constants computed, and those that add and mul read as codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ...common.errors import PlanishError
from ...kernels import affine
from .. import attention, layers
from ..layers import is_constant
from ..model import Entry

aten = torch.ops.aten
ELEMENTWISE = (aten.add.Tensor, aten.mul.Tensor)


def open_attention(module: GraphModule) -> None:
    """Write fused attention without a mask as matrix product, softmax, matrix product; other attention stays as it is."""
    for found in attention.find(module):
        node = found.mixed
        if found.softmax is not None:
            continue
        plain = layers.argument(node, "attn_mask") is None and not layers.argument(node, "is_causal")
        if plain and not layers.argument(node, "enable_gqa") and "val" in node.meta:
            attention.decompose(module, found)
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            args = map_arg(node.args, lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args)


def fold_constants(module: GraphModule) -> None:
    """Compute what an add or mul reads and what depends on constants only: a slice of a table of positions, say."""
    for node in list(module.graph.nodes):
        for index, source in enumerate(node.args[:2]) if node.target in ELEMENTWISE else ():
            if (
                isinstance(source, Node)
                and source.op == "call_function"
                and (value := layers.constant(module, source)) is not None
            ):
                with module.graph.inserting_before(node):
                    made = layers.add_parameter(module, _name(source), value)
                node.update_arg(index, made)
    module.graph.eliminate_dead_code()


def _name(node: Node) -> str:
    """The name of a computed constant: that of a parameter behind it, and its own."""
    source = node
    while source.all_input_nodes:
        source = source.all_input_nodes[0]
    return f"{source.target}_{node.name}" if is_constant(source) else f"constants.{node.name}"


def quantize_constants(module: GraphModule, nodes: list[Node]) -> list[Entry]:
    """uint8 codes for the constants that the add and mul nodes read, one scale a tensor, which is what runtimes take; receipt lines."""
    entries: list[Entry] = []
    for node in nodes:
        for index, source in enumerate(node.args[:2]) if node.target in ELEMENTWISE else ():
            if not is_constant(source):
                continue
            assert isinstance(source, Node)
            name, value = str(source.target), layers.read(module, source).float()
            if not torch.isfinite(value).all():
                raise PlanishError(f"constant '{name}' has NaN or Inf values")
            scale, zero = affine_range(float(value.min().clamp_max(0)), float(value.max().clamp_min(0)))
            codes = affine.quantize(value, scale, zero, 0, 0, 255, torch.uint8)
            with module.graph.inserting_before(node):
                parts = zip(layers.STORED_AS, (codes, scale, zero), strict=True)
                restored = module.graph.call_function(
                    torch.ops.planish.dequantize.default,
                    (*(layers.add_buffer(module, name + s, t) for s, t in parts), 0),
                )
            restored.meta["val"] = value
            node.update_arg(index, restored)
            real = affine.dequantize(codes, scale, zero, 0)
            error = float((real - value).norm() / value.norm().clamp_min(1e-30))
            entries.append(Entry(name, "quantized", "uint8, one scale", 4 * value.numel(), value.numel() + 5, error))
    return entries


def affine_range(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32 scalar) and zero point (uint8 scalar) of a range that contains 0."""
    if high == low:
        return torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8)
    scale = torch.tensor((high - low) / 255, dtype=torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    zero = round(-low / float(scale))
    return scale, torch.tensor(min(max(zero, 0), 255), dtype=torch.uint8)
