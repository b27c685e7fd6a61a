"""LLM.int8(), Dettmers et al. 2022, section 3: `planish::linear_int8_outlier`, int8 products with outlier columns in 16 bits.

A column k of x (..., in) is an outlier column, k in O, by the threshold t, over all tokens of the call:

    dynamic   O = {k : some |x_k| >= t}
    frozen    O = `columns` (k,) int64, found in calibration; nothing depends on the data, so this form is exported

    c   = max |x_i| over a token, without the values >= t in columns of O;   1 where that is 0          (activation scale)
    X_i = round(x_i * (127 / c)), half to even, 0 for columns of O                                      int8
    W   = codes (out, in) int8 in -127..127, scale (out,) float32:  weight = code * scale
    y   = (sum_i X_i code_oi) * (c / 127) * scale_o + sum_{k in O} x_k V_ok + bias

The first sum is taken in int32, the second in float32. V are the outlier columns of the weight: `outlier_weight` (out, k) float16
of the `columns`, which is the form of the paper, and codes * scale for columns that have none there, which is the form of the
bitsandbytes library. Activations stay in float32, so values beyond float16 do no harm.

The second result counts values |x| >= t outside of `columns`: they are not clipped, they widen their token's c. It is
(x.shape[samples],) int64 along the dimension `samples`, (1,) for the whole call when `samples` is -1; the dynamic form without
`columns` takes every such value into O and counts all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto

from ..common.errors import PlanishError
from .fused import Builder, Call, Fused, linear_output, register

TOP = 127
"""largest code"""
EXACT = 1040
"""columns up to which float32 sums of products of two codes are exact in the worst case: 127^2 * 1040 < 2^24"""


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) int8 and scale (out,) float32 of a weight (out, in); the scale of an all-zero row is 1."""
    scale = weight.abs().amax(1) / TOP
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round(weight / scale[:, None]).clamp(-TOP, TOP).to(torch.int8), scale


def integer_product(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """(rows, out) float32 of int8 codes x (rows, in) and (out, in): the int32 sums, exact, then rounded once to float32."""
    total = x.new_zeros((len(x), len(codes)), dtype=torch.int32)
    for part, other in zip(x.split(EXACT, 1), codes.split(EXACT, 1), strict=True):
        total += (part.float() @ other.float().T).to(torch.int32)
    return total.float()


def linear_int8_outlier(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    columns: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: float,
    dynamic: bool,
    samples: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output y (..., out) float32, and how many values are beyond the threshold outside of `columns`: the definition."""
    rows = x.reshape(-1, x.shape[-1])  # (rows, in)
    size = rows.abs()
    hot = size >= threshold  # (rows, in)
    stored = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)  # (in,)
    if columns is not None:
        stored[columns] = True
    outlier = hot.any(0) if dynamic else stored  # (in,)
    left_out = hot & outlier
    peak = torch.where(left_out, 0.0, size).amax(1, keepdim=True)  # (rows, 1)
    peak = torch.where(peak > 0, peak, 1.0)
    integer = torch.round(torch.where(outlier, 0.0, rows) * (TOP / peak)).to(torch.int8)
    y = integer_product(integer, codes) * (peak / TOP) * scale
    chosen = outlier.nonzero().flatten()  # (k,)
    thick = codes[:, chosen].float() * scale[:, None]  # (out, k)
    if outlier_weight is not None and columns is not None:
        place = torch.zeros(x.shape[-1], dtype=torch.int64, device=x.device)
        place[columns] = torch.arange(len(columns), device=x.device)
        exact = outlier_weight.float()[:, place[chosen]] if len(columns) else thick
        thick = torch.where(stored[chosen], exact, thick)
    y = y + rows[:, chosen] @ thick.T
    y = y.reshape(*x.shape[:-1], -1)
    beyond = (hot & ~stored).reshape(x.shape)
    return (y if bias is None else y + bias), _count(beyond, samples)


def _count(beyond: torch.Tensor, samples: int) -> torch.Tensor:
    """Number of true values for every index of the dimension `samples`; (1,) for all when it is -1."""
    others = [d for d in range(beyond.ndim) if d != samples]
    return beyond.sum(others) if samples >= 0 else beyond.sum().reshape(1)


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    columns: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: float,
    dynamic: bool,
    samples: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    count = x.new_empty((x.shape[samples] if samples >= 0 else 1,), dtype=torch.int64)
    return linear_output(x, codes.shape[0]), count


register(
    "linear_int8_outlier(Tensor x, Tensor codes, Tensor scale, Tensor? columns, Tensor? outlier_weight, Tensor? bias,"
    " float threshold, bool dynamic, int samples) -> (Tensor, Tensor)",
    linear_int8_outlier,
    _fake,
)


class LinearInt8Outlier(Fused):
    """ONNX: MatMulInteger with scales of tokens and rows in nodes of their own, and a thin float product of gathered columns.

    In the dynamic form the columns are those of NonZero, and the thin weight is gathered from the codes in every call.

    Activations are uint8 codes with the zero point 128, the type that MatMulInteger has the fastest kernels for; the integers are the
    same. The thin weight (k, out) is stored in float16 and ONNX Runtime widens it once; the rest of the weight stays int8.
    The rows of the codes that belong to outlier columns stay stored: a product with zero.
    """

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Equal to the reference within float32 rounding; the integers are equal.

        Raises PlanishError for the dynamic form when some columns are stored in 16 bits.
        """
        name, tensors = call.name, call.tensors
        x = tensors["x"]
        threshold = graph.constant(f"{name}.threshold", np.array(call.attributes["threshold"], np.float32))
        codes, scale = graph.value(tensors["codes"]), graph.value(tensors["scale"])
        columns = graph.value(tensors["columns"]) if "columns" in tensors else np.zeros(0, np.int64)
        dynamic = bool(call.attributes["dynamic"])
        if dynamic and "outlier_weight" in tensors:
            raise PlanishError(
                f"layer '{name}': outlier columns that are found at run time beside 16-bit ones have no ONNX form; frozen columns have"
            )
        regular = np.ones(codes.shape[1], bool)  # (in,)
        regular[columns] = False
        mask = graph.constant(f"{name}.regular", regular)
        zero = graph.constant(f"{name}.zero", np.array(0, np.float32))

        size = graph.one("Abs", [x], f"{name}.size")
        hot = graph.one("GreaterOrEqual", [size, threshold], f"{name}.hot")
        beyond = graph.one("And", [hot, mask], f"{name}.beyond")
        if dynamic:
            peak = self._largest(graph.one("Where", [hot, zero, size], f"{name}.inner"), zero, graph, name)
            outlier = self._found(hot, codes.shape[1], graph, name)
            kept = graph.one("Where", [outlier, zero, x], f"{name}.kept")
        else:
            peak, outlier = self._peak(size, hot, beyond, zero, columns, graph, name), ""
            kept = graph.one("Where", [mask, x, zero], f"{name}.kept") if len(columns) else x
        top = graph.constant(f"{name}.top", np.array(TOP, np.float32))
        factor = graph.one("Div", [top, peak], f"{name}.factor")
        rounded = graph.one("Round", [graph.one("Mul", [kept, factor], f"{name}.scaled")], f"{name}.rounded")
        offset = graph.constant(f"{name}.offset", np.array(128, np.float32))
        shifted = graph.one("Add", [rounded, offset], f"{name}.shifted")
        integer = graph.one("Cast", [shifted], f"{name}.codes", to=TensorProto.UINT8)
        middle = graph.constant(f"{name}.middle", np.array(128, np.uint8))
        weight = graph.constant(f"{name}.weight_codes", np.ascontiguousarray(codes.T))  # (in, out) int8
        product = graph.one("MatMulInteger", [integer, weight, middle], f"{name}.sums")
        y = graph.one("Cast", [product], f"{name}.product", to=TensorProto.FLOAT)
        token = graph.one("Div", [peak, top], f"{name}.token_scale")
        y = graph.one("Mul", [graph.one("Mul", [y, token], f"{name}.tokens"), graph.constant(f"{name}.scale", scale)], f"{name}.rows")  # fmt: skip
        if dynamic:
            y = graph.one("Add", [y, self._gathered(x, outlier, weight, scale, graph, name)], f"{name}.both")
        elif len(columns):
            y = graph.one("Add", [y, self._thin(call, graph, codes, scale, columns)], f"{name}.both")
        if "bias" in tensors:
            y = graph.one("Add", [y, tensors["bias"]], f"{name}.biased")
        return [y, self._counted(beyond, int(call.attributes["samples"]), graph, name)]

    def _peak(self, size: str, hot: str, beyond: str, zero: str, columns: np.ndarray, graph: Builder, name: str) -> str:
        """The scale c (..., 1): the largest value of a token that is not an outlier, 1 for none."""
        if len(columns):
            outlier = graph.one("Xor", [hot, beyond], f"{name}.outlier")  # beyond implies hot
            size = graph.one("Where", [outlier, zero, size], f"{name}.inner")
        return self._largest(size, zero, graph, name)

    @staticmethod
    def _largest(size: str, zero: str, graph: Builder, name: str) -> str:
        """The largest of each token (..., 1), 1 for 0."""
        axes = graph.constant(f"{name}.last", np.array([-1], np.int64))
        peak = graph.one("ReduceMax", [size, axes], f"{name}.largest", keepdims=1)
        empty = graph.one("Equal", [peak, zero], f"{name}.empty")
        return graph.one("Where", [empty, graph.constant(f"{name}.one", np.array(1, np.float32)), peak], f"{name}.peak")

    @staticmethod
    def _found(hot: str, inputs: int, graph: Builder, name: str) -> str:
        """(in,) bool: the columns in which some token of the call is `hot` (..., in)."""
        ones = graph.one("Cast", [hot], f"{name}.hot_ones", to=TensorProto.FLOAT)
        rows = graph.one("Reshape", [ones, graph.constant(f"{name}.rows_shape", np.array([-1, inputs]))], f"{name}.hot_rows")  # fmt: skip
        over = graph.one("ReduceMax", [rows, graph.constant(f"{name}.tokens_axis", np.array([0]))], f"{name}.hottest", keepdims=0)  # fmt: skip
        return graph.one("Greater", [over, graph.constant(f"{name}.none", np.array(0, np.float32))], f"{name}.outlier")

    @staticmethod
    def _gathered(x: str, outlier: str, weight: str, scale: np.ndarray, graph: Builder, name: str) -> str:
        """The product of the columns that are `outlier` (in,) with their codes in `weight` (in, out), (..., out) float32."""
        places = graph.one("NonZero", [outlier], f"{name}.places")  # (1, k)
        columns = graph.one("Reshape", [places, graph.constant(f"{name}.flat", np.array([-1]))], f"{name}.columns")
        codes = graph.one("Cast", [graph.one("Gather", [weight, columns], f"{name}.outlier_codes", axis=0)], f"{name}.outlier_wide", to=TensorProto.FLOAT)  # fmt: skip
        thick = graph.one("Mul", [codes, graph.constant(f"{name}.outlier_scale", scale)], f"{name}.outlier_weight")
        chosen = graph.one("Gather", [x, columns], f"{name}.outlier_x", axis=-1)  # (..., k)
        return graph.one("MatMul", [chosen, thick], f"{name}.outliers")

    def _thin(self, call: Call, graph: Builder, codes: np.ndarray, scale: np.ndarray, columns: np.ndarray) -> str:
        """The product of the outlier columns, (..., out) float32."""
        name = call.name
        if "outlier_weight" in call.tensors:
            thick = graph.value(call.tensors["outlier_weight"])  # (out, k) float16
        else:
            thick = codes[:, columns].astype(np.float32) * scale[:, None]
        stored = graph.constant(f"{name}.outlier_weight", np.ascontiguousarray(thick.T))  # (k, out)
        if thick.dtype == np.float16:
            stored = graph.one("Cast", [stored], f"{name}.outlier_wide", to=TensorProto.FLOAT)
        chosen = graph.one("Gather", [call.tensors["x"], graph.constant(f"{name}.columns", columns)], f"{name}.outlier_x", axis=-1)  # fmt: skip
        return graph.one("MatMul", [chosen, stored], f"{name}.outliers")

    def _counted(self, beyond: str, samples: int, graph: Builder, name: str) -> str:
        """int64, along the dimension `samples` or (1,)."""
        ones = graph.one("Cast", [beyond], f"{name}.ones", to=TensorProto.INT32)
        if samples > 0:
            before = graph.constant(f"{name}.before", np.arange(samples))
            ones = graph.one("ReduceSum", [ones, before], f"{name}.from_samples", keepdims=0)
        shape = graph.constant(f"{name}.per_sample", np.array([1 if samples < 0 else 0, -1], np.int64))
        flat = graph.one("Reshape", [ones, shape], f"{name}.flat")  # (samples, rest)
        rest = graph.constant(f"{name}.rest", np.array([1], np.int64))
        total = graph.one("ReduceSum", [flat, rest], f"{name}.total", keepdims=0)
        return graph.one("Cast", [total], f"{name}.values_beyond", to=TensorProto.INT64)
