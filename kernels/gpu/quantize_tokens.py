"""Activations to codes in one pass over each token: `planish::gpu_quantize_tokens`.

What stands before a quantized layer is computed on the way, in float32 from the first addition to the code:

    h = x + residual, rounded to the type of x              returned as `sum`
    h = norm(h) with weight, bias, eps                      as norm.py has it; returned as `y` in the type of x where `keep`
    h = h smooth                                            (n,)
    h = (h signs) H in blocks of `block`                    kernels/hadamard.py, not transposed; a power of two; 0: none
    codes and scale of h

    format  int8, int4      scale s = max |h| / (127 or 7), codes round(h / s), half to even; s = 1 where max |h| is below LEAST
            e4m3, e5m2      s = max(max |h| / (448 or 57344), 2^-126), codes the nearest 8-bit float of h / s, ties to even
    group   0: s of a token; > 0: of each `group` columns of one, the last may be short; -1: of the tensor, int8 only and asymmetric as
            kernels/linear_dynamic.py has it, code = clamp(round(h / s) + zero, -128, 127), value (code - zero) s

`codes` (..., columns) int8, for 8-bit floats uint8, are filled up with zeros behind n. `scale` (..., groups) float32; per tensor every token
has the same one, and `zero` (..., 1) float32 beside it. Outputs that do not apply are empty, (0,).

Against these formulas in real arithmetic h errs by (n + 8) 2^-24 of its parts' magnitudes (norm), and the rotation by 2^-16 of a block's
norm, as a GPU multiplies h in two parts of 8 bits by H. s errs as max |h| does, and a code is one off only where h / s lies so near a tie.
Without norm and rotation codes and scale are exact.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ...common.errors import PlanishError
from ..hadamard import hadamard
from ..linear_fp8 import DTYPES, MAX, to_float8
from ..linear_fp8 import LEAST as LEAST_FLOAT8
from .norm import NORMS, WIDEST, normed, summed
from .op import register

TOPS = {"int8": 127.0, "int4": 7.0, **MAX}
"""what the largest magnitude becomes, by format"""
LEAST = 1e-30
"""a largest magnitude below which integer codes are 0 and their scale 1: the reciprocal of the scale stays a float32"""
PER_TENSOR = -1
LARGEST_BLOCK = 1 << 14
"""of a rotation: what the registers of a multiprocessor hold"""


def takes_rotation(block: int) -> bool:
    """Whether blocks of this order can be rotated on the way."""
    return 2 <= block <= LARGEST_BLOCK and block & (block - 1) == 0


def groups_of(channels: int, group: int) -> int:
    """Scales of a token."""
    return math.ceil(channels / group) if group > 0 else 1


def check(x: torch.Tensor, norm: str, block: int, format: str, group: int, columns: int) -> None:
    """Raises PlanishError for what no kernel takes."""
    channels = x.shape[-1]
    if norm not in NORMS:
        raise PlanishError(f"norm '{norm}' of quantized tokens; accepted: {', '.join(map(repr, NORMS))}")
    if format not in TOPS:
        raise PlanishError(f"tokens quantized to '{format}'; accepted: {', '.join(TOPS)}")
    if channels > WIDEST:
        raise PlanishError(f"tokens of {channels} channels are quantized; at most {WIDEST} are accepted")
    if columns < channels:
        raise PlanishError(f"codes of {channels} channels in rows of {columns}; a row is as wide or wider")
    if block and (not takes_rotation(block) or channels % block):
        raise PlanishError(f"{channels} channels rotated in blocks of {block}; a power of two up to {LARGEST_BLOCK} that divides them")  # fmt: skip
    if block and group > 0 and group & (group - 1):
        raise PlanishError(f"groups of {group} columns after a rotation; a power of two is accepted")
    if group == PER_TENSOR and format != "int8":
        raise PlanishError(f"one scale for a tensor of {format}; it is for int8")


def tensor_scale(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of a tensor whose least and largest values are low and high, all 0-d float32; zero is for codes from -128."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    wide = high - low > LEAST
    scale = torch.where(wide, (high - low) / 255, 1.0)
    zero = torch.round((-low / scale).clamp(0, 255))
    return scale, torch.where(wide, zero, 0.0) - 128


def quantized(h: torch.Tensor, format: str, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes (..., n) int8 or uint8, scale (..., groups), zero (..., 1) or (0,)) of h (..., n) float32."""
    channels = h.shape[-1]
    if group == PER_TENSOR:
        empty = h.new_zeros(())
        scale, zero = tensor_scale(h.amin() if h.numel() else empty, h.amax() if h.numel() else empty)
        codes = (torch.round(h / scale) + zero).clamp(-128, 127).to(torch.int8)
        tokens = (*h.shape[:-1], 1)
        return codes, scale.expand(tokens).contiguous(), zero.expand(tokens).contiguous()
    size = group or channels
    split = F.pad(h, (0, -channels % size)).unflatten(-1, (-1, size))  # (..., groups, size)
    largest = split.abs().amax(-1)
    if format in DTYPES:
        scale = (largest / TOPS[format]).clamp_min(LEAST_FLOAT8)
        codes = to_float8(split / scale[..., None], format).view(torch.uint8)
    else:
        known = largest > LEAST
        scale = torch.where(known, largest / TOPS[format], 1.0)
        codes = (torch.round(split / scale[..., None]) * known[..., None]).to(torch.int8)
    return codes.flatten(-2)[..., :channels], scale, h.new_empty(0)


def gpu_quantize_tokens(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    smooth: torch.Tensor | None,
    signs: torch.Tensor | None,
    norm: str,
    eps: float,
    block: int,
    keep: bool,
    format: str,
    group: int,
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, zero, y, sum) of x (..., n): see the docstring of this file."""
    check(x, norm, block, format, group, columns)
    h, total = summed(x, residual)
    h = normed(h, weight, bias, norm, eps)
    y = h.to(x.dtype).clone() if keep else x.new_empty(0)
    h = h if smooth is None else h * smooth.float()
    h = hadamard(h, signs, block, False) if block else h
    codes, scale, zero = quantized(h, format, group)
    return F.pad(codes, (0, columns - x.shape[-1])).contiguous(), scale, zero, y, total


def _fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    smooth: torch.Tensor | None,
    signs: torch.Tensor | None,
    norm: str,
    eps: float,
    block: int,
    keep: bool,
    format: str,
    group: int,
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, groups = x.shape[:-1], groups_of(x.shape[-1], group)
    codes = x.new_empty((*tokens, columns), dtype=torch.uint8 if format in DTYPES else torch.int8)
    scale = x.new_empty((*tokens, groups), dtype=torch.float32)
    zero = x.new_empty((*tokens, 1) if group == PER_TENSOR else (0,), dtype=torch.float32)
    y = torch.empty_like(x) if keep else x.new_empty(0)
    return codes, scale, zero, y, x.new_empty(0) if residual is None else torch.empty_like(x)


register(
    "gpu_quantize_tokens(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? smooth, Tensor? signs, str norm,"
    " float eps, int block, bool keep, str format, int group, int columns)"
    " -> (Tensor codes, Tensor scale, Tensor zero, Tensor y, Tensor sum)",
    gpu_quantize_tokens,
    _fake,
)
