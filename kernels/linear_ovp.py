"""`planish::linear_ovp`: a linear layer on outlier-victim pairs (outlier_victim.py), in weights and, where asked, in activations.

    y = (P V^T) * (x_scale * scale) + bias    V = integers that the codes mean, pairs along `in`; P = round trip of x / x_scale
    y = (x V^T) * scale + bias                without x_scale

codes     (out, in / 2) uint8 for 4 bits, (out, in) uint8 for 8; `in` is even
scale     (out,) float32, the step of each row
x_scale   () float32, the static step of x; absent: x stays in float
bits, grid, x_bits, x_grid   the formats of weights and activations: 4 with int or flint, 8 with int; x_bits 0 where x_scale is absent
unpacked  ONNX holds V as int8, twice the bytes, so that nothing is decoded while the model runs; int4 in both only

When both sides are int4, P and V fit int8: the product is MatMulInteger, exact. Every other mixture is a float product of the decoded
values, which are integers below 2^15. In ONNX the packed weight is decoded in every call by a table (unfolded.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto

from ..common.errors import PlanishError
from .fused import Builder, Call, Fused, linear_output, register
from .outlier_victim import Codec, codec
from .unfolded import at_run_time, look_up, shared


def linear_ovp(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    grid: str,
    x_bits: int,
    x_grid: str,
    unpacked: bool,
) -> torch.Tensor:
    """The reference: (..., in) -> (..., out) float32. Products of integers are summed in float64, which is exact."""
    form = codec(bits, grid)
    values = form.decode(form.read(codes))  # (out, in)
    if x_scale is None:
        y = torch.nn.functional.linear(x, values) * scale
    else:
        rounded = codec(x_bits, x_grid).round_trip(x / x_scale)
        y = torch.nn.functional.linear(rounded.double(), values.double()).float() * (x_scale * scale)
    return y if bias is None else y + bias


register(
    "linear_ovp(Tensor x, Tensor codes, Tensor scale, Tensor? x_scale, Tensor? bias, int bits, str grid, int x_bits, str x_grid,"
    " bool unpacked) -> Tensor",
    linear_ovp,
    lambda x, codes, *_: linear_output(x, codes.shape[0]),
)


def integer(attributes: dict[str, object]) -> bool:
    """Whether both sides are int4, so that int8 holds every value."""
    return all((attributes[f"{side}bits"], attributes[f"{side}grid"]) == (4, "int") for side in ("", "x_"))


class LinearOvp(Fused):
    """MatMulInteger for int4 pairs on both sides, else a float product of decoded values."""

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """The name of y."""
        t, a, name = call.tensors, call.attributes, call.name
        whole = integer(dict(a))
        x, scale = t["x"], graph.value(t["scale"])
        if "x_scale" in t:
            x = self._activations(call, graph, codec(int(a["x_bits"]), str(a["x_grid"])))
            scale = graph.value(t["x_scale"]) * scale
        weight = self._weight(call, graph, codec(int(a["bits"]), str(a["grid"])), whole)
        if whole:
            small = graph.one("Cast", [x], f"{name}.int8", to=TensorProto.INT8)
            sums = graph.one("MatMulInteger", [small, weight], name)
            y = graph.one("Cast", [sums], f"{name}.sums", to=TensorProto.FLOAT)
        else:
            y = graph.one("MatMul", [x, weight], name)
        y = graph.one("Mul", [y, graph.constant(f"{name}.scale", scale.astype(np.float32))], f"{name}.y")
        if "bias" in t:
            y = graph.one("Add", [y, t["bias"]], f"{name}.biased")
        return [y]

    def slow(self, call: Call) -> str | None:
        """All but the unpacked form decode the weight."""
        if call.attributes["unpacked"]:
            return None
        more = "; unpacked weights (twice the bytes) are not" if integer(dict(call.attributes)) else ""
        return f"outlier-victim pairs: the whole weight is decoded in every call (it stays packed in memory){more}"

    @staticmethod
    def _weight(call: Call, graph: Builder, form: Codec, whole: bool) -> str:
        """(in, out): the integers that the codes mean, int8 when `whole`, else float32."""
        t, name = call.tensors, f"{call.name}.weight"
        codes = form.read(
            torch.from_numpy(np.array(graph.value(t["codes"])))
        )  # (out, in); a copy, for torch wants to write
        if call.attributes["unpacked"]:
            if not whole:
                raise PlanishError(
                    f"layer '{call.name}': outlier-victim pairs are stored unpacked where both sides are int4 only"
                )
            values = form.decode(codes).to(torch.int8).T.contiguous()
            return graph.constant(f"{name}_values", values.numpy())
        late = at_run_time(graph, t["codes"], t["x"], name)
        if form.bits == 4:
            kind = np.int8 if whole else np.float32
            table = shared(graph, f"planish.ovp_{form.kind}4_{kind.__name__}", form.pairs().numpy().astype(kind))
            values = look_up(graph, table, late, f"{name}.pairs")  # (out, in / 2, 2)
        else:
            values = _decode_bytes(graph, late, form, name)
        shape = graph.constant(f"{name}.shape", np.array(codes.shape))
        rows = graph.one("Reshape", [values, shape], f"{name}.rows")
        return graph.one("Transpose", [rows], name, perm=[1, 0])

    @staticmethod
    def _activations(call: Call, graph: Builder, form: Codec) -> str:
        """The round trip of x in steps: integers as float32, in the shape of x."""
        t, name = call.tensors, f"{call.name}.x"

        def number(value: float) -> str:
            return shared(graph, f"planish.number_{value:g}", np.array(value, np.float32))

        def table(what: str, values: torch.Tensor) -> str:
            return shared(graph, f"planish.ovp_{form.kind}{form.bits}_{what}", values.numpy())

        def nearest(what: str, step: float, values: torch.Tensor) -> str:
            """Look |q| up in the values of 0, step, 2 step, ...; beyond them, and NaN, the last."""
            places = graph.one("Mul", [size, number(1 / step)], f"{name}.{what}_place")
            below = graph.one("Less", [places, number(len(values) - 1)], f"{name}.{what}_below")
            bounded = graph.one("Where", [below, places, number(len(values) - 1)], f"{name}.{what}_bounded")
            index = graph.one("Cast", [bounded], f"{name}.{what}_index", to=TensorProto.INT32)  # rounds down
            return graph.one("Gather", [table(what, values), index], f"{name}.{what}", axis=0)

        q = graph.one("Div", [t["x"], t["x_scale"]], f"{name}.steps")
        size = graph.one("Abs", [q], f"{name}.size")
        inside = graph.one("Less", [size, number(form.threshold)], f"{name}.inside")
        split = int(
            2 * form.threshold
        )  # below it |q| counts in halves, beyond in half the least distance of two outliers
        step = float(form.outliers.diff().min()) / 2
        normal = nearest("normal", 0.5, form.magnitude[: split + 1])
        outlier = nearest("outlier", step, form.magnitude[:: int(2 * step)].clamp_min(float(form.outliers[0])))
        value = graph.one("Where", [inside, normal, outlier], f"{name}.magnitude")
        negative = graph.one("Less", [q, number(0)], f"{name}.negative")
        value = graph.one("Where", [negative, graph.one("Neg", [value], f"{name}.turned"), value], f"{name}.signed")
        pair = shared(graph, "planish.pairs_shape", np.array([-1, 2]))
        inside = graph.one("Reshape", [inside, pair], f"{name}.inside_pairs")
        beside = graph.one(
            "Gather", [inside, shared(graph, "planish.swap", np.array([1, 0]))], f"{name}.beside", axis=1
        )
        left = shared(graph, "planish.left", np.array([True, False]))
        own = graph.one("And", [graph.one("Not", [inside], f"{name}.outlier"), left], f"{name}.first")
        kept = graph.one("Or", [beside, own], f"{name}.kept")
        rounded = graph.one(
            "Where", [kept, graph.one("Reshape", [value, pair], f"{name}.pairs"), number(0)], f"{name}.rounded"
        )
        shape = graph.one("Shape", [t["x"]], f"{name}.shape")
        return graph.one("Reshape", [rounded, shape], name, allowzero=1)


def _decode_bytes(graph: Builder, codes: str, form: Codec, name: str) -> str:
    """float32 values of 8-bit codes (out, in): a table of normal meanings, and behind it one of meanings beside the identifier."""
    index = graph.one("Cast", [codes], f"{name}.index", to=TensorProto.INT32)
    pairs = graph.one(
        "Reshape", [index, shared(graph, "planish.pairs_shape", np.array([-1, 2]))], f"{name}.index_pairs"
    )
    beside = graph.one("Gather", [pairs, shared(graph, "planish.swap", np.array([1, 0]))], f"{name}.beside", axis=1)
    mark = shared(graph, "planish.ovp_identifier", np.array(form.identifier, np.int32))
    second = graph.one(
        "Cast", [graph.one("Equal", [beside, mark], f"{name}.marked")], f"{name}.second", to=TensorProto.INT32
    )
    offset = graph.one(
        "Mul", [second, shared(graph, "planish.ovp_second_table", np.array(256, np.int32))], f"{name}.offset"
    )
    place = graph.one("Add", [pairs, offset], f"{name}.place")
    table = torch.cat([form.normal_value, form.outlier_value]).numpy()
    return graph.one("Gather", [shared(graph, "planish.ovp_int8_meanings", table), place], f"{name}.values", axis=0)
