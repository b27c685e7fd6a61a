"""`planish::linear_codebook`: a linear layer whose weights are 4-bit codes into a table, with block scales. NF4, FP4, MXFP4, NVFP4.

    y = x W^T + bias        W as in codebooks.py

codes         (out, in / 2) uint8
scale         (blocks,) float32 or, nested, uint8; (out, in / group) uint8 for mxfp4 and nvfp4
second_scale  nested: (blocks / 256, rounded up) float32; nvfp4: () float32; else absent
offset        nested: () float32; else absent
format        nf4, fp4, mxfp4 or nvfp4
group         elements of a block

In ONNX Runtime, nf4 and fp4 are MatMulBnb4, which decodes the whole weight into a scratch matrix in every call. There is no CPU
operator for E2M1: a byte is looked up in a table of 256 pairs, in every call (see unfolded.py). Both keep four bits a weight
in memory and cost time: a format for storage there, and for devices with float4 units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from . import codebooks
from .fused import Builder, Call, Fused, linear_output, register
from .unfolded import at_run_time, look_up, shared


def linear_codebook(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    second_scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group: int,
) -> torch.Tensor:
    """The reference: (..., in) -> (..., out) float32."""
    return torch.nn.functional.linear(x, codebooks.decode(codes, scale, second_scale, offset, format, group), bias)


register(
    "linear_codebook(Tensor x, Tensor codes, Tensor scale, Tensor? second_scale, Tensor? offset, Tensor? bias, str format,"
    " int group) -> Tensor",
    linear_codebook,
    lambda x, codes, *_: linear_output(x, codes.shape[0]),
)


class LinearCodebook(Fused):
    """MatMulBnb4 for the two formats of bitsandbytes, else a decode in every call."""

    domains: ClassVar[tuple[str, ...]] = ("", "com.microsoft")

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """The name of y."""
        form = str(call.attributes["format"])
        y = self._bitsandbytes(call, graph, form) if form in ("nf4", "fp4") else self._e2m1(call, graph, form)
        if "bias" in call.tensors:
            y = graph.one("Add", [y, call.tensors["bias"]], f"{call.name}.biased")
        return [y]

    def slow(self, call: Call) -> str | None:
        """Every call decodes the weight."""
        return (
            f"{call.attributes['format']}: ONNX Runtime decodes the whole weight to float in every call (it stays 4-bit in memory); "
            "integer codes (w4a16) are as small and fast"
        )

    def _bitsandbytes(self, call: Call, graph: Builder, form: str) -> str:
        t = call.tensors
        codes = graph.value(t["codes"])
        out, pairs = codes.shape
        flat = graph.constant(f"{call.name}.weight_codes_flat", codes.reshape(-1))
        return graph.one(
            "MatMulBnb4",
            [t["x"], flat, self._largest(call, graph)],
            call.name,
            domain="com.microsoft",
            N=out,
            K=pairs * 2,
            block_size=int(call.attributes["group"]),
            quant_type=1 if form == "nf4" else 0,
        )

    @staticmethod
    def _largest(call: Call, graph: Builder) -> str:
        """(blocks,) float32: as stored, or from nested bytes in every call."""
        t = call.tensors
        if "offset" not in t:
            return t["scale"]
        codes, second = graph.value(t["scale"]), graph.value(t["second_scale"])
        padded = np.zeros(len(second) * codebooks.NESTED, np.uint8)
        padded[: len(codes)] = codes
        name = f"{call.name}.largest"
        stored = graph.constant(f"{call.name}.weight_scale_rows", padded.reshape(-1, codebooks.NESTED))
        late = at_run_time(graph, stored, t["x"], name)
        values = look_up(
            graph, shared(graph, "planish.dynamic_map", codebooks.dynamic_map().numpy()), late, f"{name}.first"
        )
        rows = graph.constant(f"{call.name}.weight_second_scale_rows", second.reshape(-1, 1))
        whole = graph.one("Add", [graph.one("Mul", [values, rows], f"{name}.scaled"), t["offset"]], f"{name}.rows")
        flat = graph.one("Reshape", [whole, shared(graph, "planish.flat", np.array([-1]))], f"{name}.flat")
        ends = [graph.constant(f"{name}.{n}", np.array([v])) for n, v in (("from", 0), ("to", len(codes)))]
        return graph.one("Slice", [flat, *ends], name)

    @staticmethod
    def _e2m1(call: Call, graph: Builder, form: str) -> str:
        t, name = call.tensors, f"{call.name}.weight"
        out, blocks = graph.value(t["scale"]).shape
        inputs = graph.value(t["codes"]).shape[1] * 2
        late = at_run_time(graph, t["codes"], t["x"], name)
        pairs = codebooks.table(form)[codebooks.unpack(torch.arange(256, dtype=torch.uint8)[:, None], False).long()]
        values = look_up(
            graph, shared(graph, "planish.e2m1_pairs", pairs.numpy()), late, f"{name}.pairs"
        )  # (out, in/2, 2)
        split = graph.constant(f"{name}.blocks_shape", np.array([out, blocks, inputs // blocks]))
        values = graph.one("Reshape", [values, split], f"{name}.blocks")
        scales = at_run_time(
            graph, graph.constant(f"{name}_scale_column", graph.value(t["scale"])[..., None]), t["x"], f"{name}.scale"
        )
        table = shared(
            graph, "planish.e8m0" if form == "mxfp4" else "planish.e4m3", codebooks.scale_table(form).numpy()
        )
        scale = look_up(graph, table, scales, f"{name}.first_scale")  # (out, in / group, 1)
        if "second_scale" in t:
            scale = graph.one("Mul", [scale, t["second_scale"]], f"{name}.block_scale")
        scaled = graph.one("Mul", [values, scale], f"{name}.scaled")
        whole = graph.one("Reshape", [scaled, graph.constant(f"{name}.shape", np.array([out, inputs]))], f"{name}.rows")
        turned = graph.one("Transpose", [whole], name, perm=[1, 0])
        return graph.one("MatMul", [t["x"], turned], call.name)
