"""LLM.int8() on a GPU (kernels/linear_int8_outlier.py has the definition): two launches, and the thin product of outlier columns rides in the second.

    1  one pass over each token: c without the outliers, codes with outlier columns at 0, a copy of those columns of x, the count
    2  y = int8 product, scaled; then a short second loop adds the outlier columns (TF32 of the type of x); then the epilogue

Columns that are found at run time take two small launches before these (which columns; their list), nothing waits for the host, and the
second loop is as long as the list.

Stored, with `wide` = in filled up with zeros to a multiple of 128:

    codes    (out, wide) int8;  scale (out,) float32
    stored   (in,) int8: 1 for a column of `columns`
    columns  (thick,) int32, filled up with `in` to 16 or a multiple of 32: these columns have their weights in `thick`
    thick    (out, thick) float16: the exact weights (`exact`), else the codes, to be multiplied by scale too

All of them are absent where there are no frozen columns; the last two also for a dynamic layer without exact weights, which reads codes.

Numbers. Codes are round(x (127 / c)) in float32, one code beside the definition's only where the quotient lies within 2^-15 of a tie. int8 sums
are int32 and exact. In the second loop x, thick and codes are exact in TF32 (float32 x is rounded to it), sums float32. So y is within

    2^-22 S + (k + 2) 2^-24 B + (one step of each code near a tie) + half a unit of y's type

of the float64 value, S = the sums of |products| of the int8 part, B = those of the k outlier columns; for float32 x a further 2^-11 B.

Cost of k outlier columns beside K: each of 16, 32, 64, ... costs four int8 columns' time, as TF32 runs at a quarter of int8's rate. 0.1 % of
4096 are 4, filled up to 16: 1.6 % of the product, and 16 x 2 bytes beside 4096 of weights a row (0.8 %).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from ..linear_int8_outlier import TOP, integer_product
from .core import Core
from .op import EPILOGUE, GpuOp, Layer, Packed, epilogue, linear_output, register
from .tf32 import rounded

STEP = 128
"""columns that rows of codes are filled up to a multiple of: the kernel's step"""
WIDEST = 1 << 17
"""columns up to which a sum of products of codes fits int32"""


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    stored: torch.Tensor | None,
    columns: torch.Tensor | None,
    thick: torch.Tensor | None,
    threshold: float,
    dynamic: bool,
    samples: int,
    exact: bool,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., in) -> (..., out) in the type of x, and the count (x.shape[samples],) or (1,) int64."""
    k = x.shape[-1]
    rows = x.reshape(-1, k).float()
    hot = rows.abs() >= threshold
    known = torch.zeros(k, dtype=torch.bool) if stored is None else stored.bool()
    outlier = hot.any(0) if dynamic else known  # (in,)
    peak = torch.where(hot & outlier, 0.0, rows.abs()).amax(1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    integer = torch.round(torch.where(outlier, 0.0, rows) * (TOP / peak)).to(torch.int8)
    y = integer_product(integer, codes[:, :k]) * (peak * (1 / TOP))
    number = rounded(torch.where(outlier, rows, 0.0))
    by_code = outlier if not exact else outlier & ~known
    y = (y + number[:, by_code] @ codes[:, :k][:, by_code].float().T) * scale
    if exact and columns is not None and thick is not None:
        y = y + F.pad(number, (0, 1))[:, columns.long()] @ thick.float().T
    beyond = (hot & ~known).reshape(x.shape)
    others = [d for d in range(x.ndim) if d != samples]
    count = beyond.sum(others) if samples >= 0 else beyond.sum().reshape(1)
    return epilogue(y.reshape(*x.shape[:-1], -1), bias, factor, residual, activation, x.dtype), count


def _fake(x: torch.Tensor, codes: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    samples = rest[6]
    return linear_output(x, codes.shape[0]), x.new_empty((x.shape[samples] if samples >= 0 else 1,), dtype=torch.int64)


register(
    "gpu_linear_int8_outlier(Tensor x, Tensor codes, Tensor scale, Tensor? stored, Tensor? columns, Tensor? thick,"
    f" float threshold, bool dynamic, int samples, bool exact, {EPILOGUE}) -> (Tensor, Tensor)",
    reference,
    _fake,
)


class LinearInt8Outlier(GpuOp):
    """Codes as they are, rows filled up; outlier columns once more beside them, in a matrix of their own."""

    def refuses(self, layer: Layer, core: Core) -> str | None:
        """Rows whose sums could leave int32."""
        k = layer.tensors["codes"].shape[1]
        return f"{k} input columns; up to {WIDEST} are multiplied" if k > WIDEST else None

    def pack(self, layer: Layer, core: Core) -> Packed:
        """The layout above."""
        t, a = layer.tensors, layer.attributes
        codes = t["codes"]
        k = codes.shape[1]
        tensors = {"codes": F.pad(codes, (0, -k % STEP)).contiguous(), "scale": t["scale"].float().contiguous()}
        columns = t.get("columns")
        exact = columns is not None and "outlier_weight" in t and len(columns) > 0
        if columns is not None and len(columns):
            mark = torch.zeros(k, dtype=torch.int8)
            mark[columns] = 1
            tensors["stored"] = mark
            if exact or not a["dynamic"]:
                thick = t["outlier_weight"].half() if exact else codes[:, columns].half()  # (out, k)
                more = filled(len(columns)) - len(columns)
                tensors["columns"] = F.pad(columns.to(torch.int32), (0, more), value=k)
                tensors["thick"] = F.pad(thick, (0, more)).contiguous()
        attributes = {n: a[n] for n in ("threshold", "dynamic", "samples")}
        return Packed(tensors, attributes | {"exact": exact})


def filled(columns: int) -> int:
    """Columns of the thin product: 16, or the next multiple of 32."""
    return 16 if columns <= 16 else 32 * math.ceil(columns / 32)
