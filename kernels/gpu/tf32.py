"""TF32: float32 with 10 bits behind the point, what tensor cores make of float32 operands; they would cut, so planish rounds first."""

from __future__ import annotations

import torch


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Values x float32 rounded to TF32, ties away from zero: at most 2^-11 of the value away. 16-bit floats are exact in it."""
    return ((x.float().contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
