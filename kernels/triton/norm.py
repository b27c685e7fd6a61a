"""The kernel of `planish::gpu_norm` (kernels/gpu/norm.py), and the steps that quantize_tokens.py shares: a program holds whole tokens in registers.

A tile is (ROWS, GROUPS, GROUP): tokens, groups of channels that share a scale, channels of a group. Without groups the middle is 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu.core import Core
from ..gpu.norm import check
from .ahead import Variant
from .config import Config, core_of, launch, tuned

VALUES = 16
"""of a thread: two loads of 16 bytes"""


@triton.jit
def loaded(x_ptr, residual_ptr, sum_ptr, row, channel, rows, channels, inside):
    """The tile at `row` and `channel` (index tensors) as float32, 0 outside; x + residual, rounded to the type of x, is written to `sum`."""
    at = row.to(tl.int64) * channels + channel
    h = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if residual_ptr is not None:
        total = (h + tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, inside)
        h = total.to(tl.float32)
    return h


@triton.jit
def mean(x, channels):
    """(ROWS, 1, 1): the mean over the channels of a tile that is 0 outside."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True) / channels


@triton.jit
def normed(h, weight_ptr, bias_ptr, channel, channels, inside, eps, NORM: tl.constexpr):
    """The normalized tile, 0 outside."""
    if NORM == "layer":
        h = tl.where(inside, h - mean(h, channels), 0.0)
    h *= 1.0 / tl.sqrt_rn(mean(h * h, channels) + eps)
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + channel, channel < channels, 0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + channel, channel < channels, 0.0).to(tl.float32)
    return h


@triton.jit
def norm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, rows, channels, eps,
    NORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes y (rows, channels) of ROWS tokens."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    channel = tl.arange(0, WIDTH)[None, None, :]
    inside = (row < rows) & (channel < channels)
    h = loaded(x_ptr, residual_ptr, sum_ptr, row, channel, rows, channels, inside)
    h = normed(h, weight_ptr, bias_ptr, channel, channels, inside, eps, NORM)
    tl.store(y_ptr + row.to(tl.int64) * channels + channel, h.to(y_ptr.dtype.element_ty), inside)


def default(core: Core, m: int, n: int, k: int) -> Config:
    """One token a program, more where they are short; VALUES values of a thread."""
    width = triton.next_power_of_2(max(k, 16))
    rows = max(1, min(512 // width, triton.next_power_of_2(m)))
    warps = max(1, min(16 if width < WIDE else 32, rows * width // (32 * VALUES)))
    return Config("rows", {"ROWS": rows, "WIDTH": width}, warps, 1)


WIDE = 1 << 15
"""channels of a token that take 32 warps"""


def choose(core: Core, m: int, n: int, k: int) -> Config:
    """The specialization for m tokens of k channels (n is k)."""
    return tuned("norm", core, m, n, k) or default(core, m, n, k)


def candidates(core: Core, m: int, n: int, k: int) -> list[Config]:
    """What a tuning script tries."""
    width = triton.next_power_of_2(max(k, 16))
    return [
        Config("rows", {"ROWS": rows, "WIDTH": width}, warps, 1)
        for rows in (1, 2, 4)
        for warps in (1, 2, 4, 8, 16, 32)
        if 4 <= rows * width // (32 * warps) <= 64
    ]


def run(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_name: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, sum) of x (..., n)."""
    check(x, norm_name)
    x = x.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // max(channels, 1)
    y = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    if x.numel():
        config = choose(core_of(x), rows, channels, channels)
        launch(
            norm, (triton.cdiv(rows, config.constants["ROWS"]),), config,
            x, None if residual is None else residual.contiguous(), weight, bias, y, total, rows, channels, eps,
            NORM=norm_name, **config.constants,
        )  # fmt: skip
    return y, total


def variants(core: Core) -> list[Variant]:
    """RMSNorm with a residual, LayerNorm without."""
    rms = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16", "sum_ptr": "*bf16"}
    layer = {"x_ptr": "*fp16", "weight_ptr": "*fp16", "bias_ptr": "*fp16", "y_ptr": "*fp16", "sum_ptr": "*fp16"}
    sizes = {"rows": "i32", "channels": "i32", "eps": "fp32"}
    made = []
    for kind, types, absent in (("rms", rms, "bias_ptr"), ("layer", layer, "residual_ptr")):
        config = default(core, 1024, 4096, 4096)
        constants = {absent: None, "NORM": kind, **config.constants}
        made.append(Variant("norm", "norm", types | sizes, constants, config.warps, config.stages, False, f"{kind}, 4096", ("rows",)))  # fmt: skip
    return made
