"""Layers of random codes for the GPU benchmark and the tuner: no checkpoint, no quantizer, any shape in seconds.

Weights are random codes with random scales (never zeros, never a quantized zero matrix). `Case.check` compares some tokens and some rows of
the output with the op's own definition in kernels/, in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from planish.kernels import fused, linear_sparse
from planish.kernels.gpu import op
from planish.kernels.gpu.core import Core
from planish.kernels.gpu.op import Layer

ROWS, TOKENS = 64, 8
"""of the output that are checked"""
PER_ROW = ("codes", "scale", "zero_point", "bias", "up", "outlier_weight", "values", "positions")
"""arguments whose first dimension is the output channel"""


def weight_only(out: int, channels: int, bits: int = 4, group: int = 128) -> Layer:
    """linear_wna16: symmetric, `group` columns a scale."""
    groups = channels // group
    codes = torch.randint(0, 256, (out, groups, group * bits // 8), dtype=torch.uint8)
    scale = torch.rand(out, groups) * 0.02 / (1 << bits - 1) + 0.01 / (1 << bits - 1)
    return Layer("linear_wna16", "bench", {"codes": codes, "scale": scale}, {"bits": bits, "group": group})


def nf4(out: int, channels: int, group: int = 64) -> Layer:
    """linear_codebook with bitsandbytes' blocks."""
    codes = torch.randint(0, 256, (out, channels // 2), dtype=torch.uint8)
    scale = torch.rand(out * channels // group) * 0.02 + 0.01
    return Layer("linear_codebook", "bench", {"codes": codes, "scale": scale}, {"format": "nf4", "group": group})


def w8a8(out: int, channels: int, bits: int = 8) -> Layer:
    """linear_dynamic per token, one scale a row."""
    codes = torch.randint(0, 256, (out, 1, channels * bits // 8), dtype=torch.uint8)
    scale = torch.rand(out, 1) * 2e-4 + 1e-4
    how = {"bits": bits, "group": channels, "activation_bits": 8, "activation_group": 0}
    return Layer("linear_dynamic", "bench", {"codes": codes, "scale": scale}, how)


def fp8(out: int, channels: int, activations: str = "e4m3") -> Layer:
    """linear_fp8, weights e4m3."""
    codes = torch.randn(out, channels).clamp(-4, 4).to(torch.float8_e4m3fn).view(torch.uint8)
    how = {"format": "e4m3", "activations": activations}
    return Layer("linear_fp8", "bench", {"codes": codes, "scale": torch.rand(out) * 0.01 + 0.01}, how)


def llm_int8(out: int, channels: int, share: float = 0.001) -> Layer:
    """linear_int8_outlier with a share of frozen outlier columns, their weights in 16 bits."""
    count = max(1, round(channels * share))
    columns = torch.randperm(channels)[:count].sort().values
    codes = torch.randint(-127, 128, (out, channels), dtype=torch.int8)
    scale = torch.rand(out) * 2e-4 + 1e-4
    thick = (codes[:, columns].float() * scale[:, None]).half()
    tensors = {"codes": codes, "scale": scale, "columns": columns, "outlier_weight": thick}
    return Layer("linear_int8_outlier", "bench", tensors, {"threshold": 6.0, "dynamic": False, "samples": -1})


def svd(out: int, channels: int, rank: int = 32, bits: int = 4, activation_bits: int = 8, group: int = 64) -> Layer:
    """linear_svd; rank 0 is the same product without its branch."""
    groups = channels // group
    tensors = {
        "codes": torch.randint(0, 256, (out, groups, group * bits // 8), dtype=torch.uint8),
        "scale": torch.rand(out, groups) * 0.002 + 0.001,
        "smooth": torch.rand(channels) + 0.5,
        "down": (torch.randn(rank, channels) * 0.02).half(),
        "up": (torch.randn(out, rank) * 0.1).half(),
    }
    how = {"bits": bits, "group": group, "activation_bits": activation_bits, "shift": 0.0, "unsigned": False}
    return Layer("linear_svd", "bench", tensors, how)


def ovp(out: int, channels: int) -> Layer:
    """linear_ovp, int4 pairs on both sides."""
    codes = torch.randint(0, 256, (out, channels // 2), dtype=torch.uint8)
    tensors = {"codes": codes, "scale": torch.rand(out) * 2e-3 + 1e-3, "x_scale": torch.tensor(0.2)}
    how = {"bits": 4, "grid": "int", "x_bits": 4, "x_grid": "int", "unpacked": False}
    return Layer("linear_ovp", "bench", tensors, how)


def sparse(out: int, channels: int, bits: int = 16) -> Layer:
    """linear_sparse: 2 of 4, float16 values or int8 on both sides."""
    first = torch.randint(0, 3, (out, channels // 4))
    second = torch.minimum(first + 1 + torch.randint(0, 3, first.shape), torch.tensor(3))
    tensors = {"positions": linear_sparse.pack(torch.stack([first, second], -1))}
    if bits == 16:
        tensors["values"] = (torch.randn(out, channels // 2) * 0.02).half()
    else:
        tensors["values"] = torch.randint(-127, 128, (out, channels // 2), dtype=torch.int8)
        tensors["scale"] = torch.rand(out) * 2e-4 + 1e-4
    return Layer("linear_sparse", "bench", tensors, {"activation_bits": bits})


KINDS = (weight_only, nf4, w8a8, fp8, llm_int8, svd, ovp, sparse)
"""one of each op"""


@dataclass(frozen=True)
class Case:
    """A layer on the device, packed for its core, in copies so that none of them stays in the cache."""

    layer: Layer
    calls: tuple[Callable[..., torch.Tensor], ...]
    """x, and parts of the epilogue by name -> y; one a copy"""
    stored_bytes: int
    """that one call reads besides x"""

    def truth(self, x: torch.Tensor) -> torch.Tensor:
        """The definition's answer for a few tokens and rows, float64 on the CPU."""
        return definition(self.layer, x[:TOKENS], ROWS)

    def check(self, x: torch.Tensor, truth: torch.Tensor | None = None) -> float:
        """Largest error of a few tokens and rows, relative to the largest true value there."""
        truth = self.truth(x) if truth is None else truth
        y = self.calls[0](x)[:TOKENS, :ROWS].double().cpu()
        return float((y - truth).abs().max() / truth.abs().max())


def case(
    layer: Layer, core: Core, device: torch.device, copies: Callable[[int], int] = lambda _: 1, launched: bool = False
) -> Case:
    """Pack a layer and bind its node, or the kernel itself when `launched`; `copies` says how many for the bytes of one.

    Raises ValueError where no kernel takes it.
    """
    kind = op.ops()[layer.op]
    reason = kind.refuses(layer, core)
    if reason is not None:
        raise ValueError(f"{layer.op}: {reason}")
    packed = kind.pack(layer, core)
    node = getattr(torch.ops.planish, f"gpu_{layer.op}").default
    size = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    placed = [{n: t.to(device, copy=True) for n, t in packed.tensors.items()} for _ in range(copies(size))]
    run = op.kernel(layer.op).run if launched else node
    return Case(layer, tuple(bound(node._schema, run, {**p, **packed.attributes}) for p in placed), size)


def bound(schema: Any, run: Callable[..., Any], given: Mapping[str, Any]) -> Callable[..., Any]:
    """A node with these arguments by name; what is left is None, '' or given in the call. The first argument is positional."""
    names = [a.name for a in schema.arguments]
    empty = {a.name: "" if str(a.type) == "str" else None for a in schema.arguments}

    def call(x: torch.Tensor, **more: Any) -> Any:
        arguments = {**empty, names[0]: x, **given, **more}
        y = run(*(arguments[n] for n in names))
        return y[0] if isinstance(y, tuple) else y

    return call


def definition(layer: Layer, x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` output channels by kernels/<op>.py, float64 where it computes in the type of x."""
    fused.ops()
    node = getattr(torch.ops.planish, layer.op).default
    tensors = {n: t[:rows] if n in PER_ROW and t.ndim else t for n, t in layer.tensors.items()}
    if layer.op == "linear_codebook":  # its blocks run along the flattened weight
        blocks = rows * layer.tensors["codes"].shape[1] * 2 // int(layer.attributes["group"])
        tensors["scale"] = layer.tensors["scale"][:blocks]
    y = bound(node._schema, node, {**tensors, **layer.attributes})(x.float().cpu())
    return y.double()
