"""y = x W^T for weights from a table of 16 values: the kernels of linear_wna16.py, where codes go through codebook.py."""

from __future__ import annotations

import torch

from ..gpu.core import Core
from . import linear_wna16
from .ahead import Variant
from .config import Config, core_of, tuned
from .linear_wna16 import DEQUANTIZE, FUSED, Stored, product, recorded, variant


def run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
    row: torch.Tensor,
    format: str,
    group: int,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """(..., in) -> (..., out) in the type of x; the arguments as kernels/gpu/linear_codebook.py stores them."""
    n, k = len(row), x.shape[-1]
    core = core_of(x)
    m = x.numel() // k
    config = DEQUANTIZE if x.dtype == torch.float32 else choose(core, m, n, k, format, group)
    if config.form == "dequantize" and recorded():
        config = default(core, min(m, FUSED), n, k, format, group)
    stored = Stored(codes, scale, None, row, 4, group, format=format, table=table)
    return product(config, core, x, stored, (bias, factor, residual), activation)


def choose(core: Core, m: int, n: int, k: int, format: str, group: int) -> Config:
    """The tuned choice, else `default`."""
    return tuned(f"linear_codebook.{format}", core, m, n, k) or default(core, m, n, k, format, group)


def default(core: Core, m: int, n: int, k: int, format: str = "nf4", group: int = 64) -> Config:
    """As for codes of four bits."""
    return linear_wna16.default(core, m, n, k, 4, group)


def candidates(core: Core, m: int, n: int, k: int, format: str = "nf4", group: int = 64) -> list[Config]:
    """As for codes of four bits."""
    return linear_wna16.candidates(core, m, n, k, 4, group)


def variants(core: Core) -> list[Variant]:
    """NF4 and NVFP4 at one token of 4096 x 4096."""
    found = []
    for format, group in (("nf4", 64), ("nvfp4", 16)):
        config = default(core, 1, 4096, 4096, format, group)
        found.append(variant(core, config, f"{format}, 1 token", 4, group, format=format))
    return found
