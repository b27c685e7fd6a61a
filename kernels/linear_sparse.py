"""`planish::linear_sparse`: a linear layer with 2:4 semi-structured weights (Mishra et al. 2021, arXiv 2104.08378).

In every group of four consecutive columns of a row at most two weights are not zero. Stored are two values of each group and the columns
that they stand in:

    W[o, 4 g + position[o, g, i]] = values[o, 2 g + i] * scale[o]        i = 0, 1; zero in the other two columns

values           (out, in / 2) float16, or int8 with a scale; `in` is a multiple of 4
positions        (out, ceil(in / 8)) uint8: a group has 4 bits, the first position in the low two, the second, which is larger, above them;
                 the even group of a byte has the low bits, and the unused bits at the end of a row are zero
scale            (out,) float32, absent for float16 values
activation_bits  16: x stays in float; 8: symmetric per token as `planish::linear_dynamic` rounds it, so that int8 meets int8

That is 0.5625 of dense float16 and 0.625 of dense int8 in bytes. Half of the products are with zeros: GPUs from compute capability 8.0 on
skip them in hardware. ONNX Runtime has no sparse product on a CPU: there the dense weight is built in every call by a table over the bytes
of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto

from .fused import Builder, Call, Fused, linear_output, register
from .linear_dynamic import PER_TOKEN, quantized, signed
from .unfolded import at_run_time, look_up, shared

GROUP, KEPT = 4, 2
"""columns of a group, and how many of them are kept"""
TOP = 127
"""largest int8 magnitude that is used"""


def choose(score: torch.Tensor) -> torch.Tensor:
    """Positions (out, groups, 2) int64, ascending, of the two largest scores (out, in) >= 0 of each group; the first of equal ones."""
    order = torch.argsort(score.unflatten(1, (-1, GROUP)), stable=True, dim=-1, descending=True)  # (out, groups, 4)
    return order[..., :KEPT].sort(-1).values


def take(weight: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The weights (out, in / 2) at positions (out, groups, 2) of a dense one (out, in)."""
    return weight.unflatten(1, (-1, GROUP)).gather(-1, positions).flatten(1)


def place(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Dense (out, in) of values (out, in / 2) at positions (out, groups, 2): the inverse of `take`."""
    made = values.new_zeros(*positions.shape[:2], GROUP)
    return made.scatter_(-1, positions, values.unflatten(1, (-1, KEPT))).flatten(1)


def pack(positions: torch.Tensor) -> torch.Tensor:
    """(out, ceil(groups / 2)) uint8 of positions (out, groups, 2)."""
    codes = (positions[..., 0] | positions[..., 1] << 2).to(torch.uint8)  # (out, groups)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous()


def unpack(packed: torch.Tensor, groups: int) -> torch.Tensor:
    """Positions (out, groups, 2) int64: the inverse of `pack`."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :groups].long()
    return torch.stack([codes & 3, codes >> 2], -1)


def encode(weight: torch.Tensor, positions: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values (out, in / 2), scale (out,) or None) of the kept weights: float16 for 16 bits, int8 with the largest at 127 for 8."""
    kept = take(weight, positions)
    if bits == 16:
        return kept.half(), None
    largest = kept.abs().amax(1)
    scale = torch.where(largest > 0, largest / TOP, 1.0)
    return (kept / scale[:, None]).round().clamp(-TOP, TOP).to(torch.int8), scale


def decode(values: torch.Tensor, positions: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The dense weight (out, in) float32 of the stored tensors."""
    kept = values.float() if scale is None else values.float() * scale[:, None]
    return place(kept, unpack(positions, values.shape[1] // KEPT))


def linear_sparse(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation_bits: int,
) -> torch.Tensor:
    """The reference: (..., in) -> (..., out) float32."""
    x = x if activation_bits == 16 else quantized(x, activation_bits, PER_TOKEN)
    return torch.nn.functional.linear(x, decode(values, positions, scale), bias)


register(
    "linear_sparse(Tensor x, Tensor values, Tensor positions, Tensor? scale, Tensor? bias, int activation_bits) -> Tensor",
    linear_sparse,
    lambda x, values, *_: linear_output(x, values.shape[0]),
)


class LinearSparse(Fused):
    """The dense weight is built while the model runs; then a float product, or MatMulInteger for int8 activations."""

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """The name of y."""
        t, name = call.tensors, call.name
        whole = call.attributes["activation_bits"] == 8
        weight = self._weight(call, graph, whole)
        if whole:
            codes, step = signed(graph, name, t["x"], 8)  # (..., in), (..., 1)
            small = graph.one("Cast", [codes], f"{name}.int8", to=TensorProto.INT8)
            sums = graph.one("MatMulInteger", [small, weight], name)
            sums = graph.one("Cast", [sums], f"{name}.sums", to=TensorProto.FLOAT)
            y = graph.one("Mul", [sums, step], f"{name}.in_units")
        else:
            y = graph.one("MatMul", [t["x"], weight], name)
        if "scale" in t:
            y = graph.one("Mul", [y, t["scale"]], f"{name}.y")
        if "bias" in t:
            y = graph.one("Add", [y, t["bias"]], f"{name}.biased")
        return [y]

    def slow(self, call: Call) -> str | None:
        """Every call builds the dense weight."""
        return (
            "2:4 sparse: ONNX Runtime has no sparse product on a CPU and builds the dense weight in every call (it stays packed in "
            "memory); a GPU's sparse tensor cores are what the pattern is for"
        )

    @staticmethod
    def _weight(call: Call, graph: Builder, whole: bool) -> str:
        """(in, out): the dense values, int8 when `whole`, else float32."""
        t, name = call.tensors, f"{call.name}.weight"
        values, positions = graph.value(t["values"]), graph.value(t["positions"])
        (out, half), count = values.shape, positions.shape[1]
        fours = np.zeros((out, 4 * count), values.dtype)  # the last byte of a row may have one group only
        fours[:, :half] = values
        stored = graph.constant(f"{name}.values", fours.reshape(-1, 4))  # (bytes, 4)
        flat = graph.constant(f"{name}.positions", positions.reshape(-1))  # (bytes,)
        late = at_run_time(graph, flat, t["x"], name)
        shown, kept = _places()
        shown = look_up(graph, shared(graph, "planish.sparse_places", shown), late, f"{name}.places")  # (bytes, 8)
        kept = look_up(graph, shared(graph, "planish.sparse_kept", kept), late, f"{name}.kept")
        dense = graph.one("GatherElements", [stored, shown], f"{name}.shown", axis=1)
        dense = graph.one("Cast", [dense], f"{name}.float", to=TensorProto.FLOAT)
        dense = graph.one("Mul", [dense, kept], f"{name}.dense")
        shape = graph.constant(f"{name}.shape", np.array([out, 8 * count]))
        dense = graph.one("Reshape", [dense, shape], f"{name}.rows")
        if half != 4 * count:
            start, axis = (shared(graph, f"planish.integer_{v}", np.array([v])) for v in (0, 1))
            end = graph.constant(f"{name}.end", np.array([2 * half]))
            dense = graph.one("Slice", [dense, start, end, axis], f"{name}.cut")
        if whole:
            dense = graph.one("Cast", [dense], f"{name}.int8", to=TensorProto.INT8)
        return graph.one("Transpose", [dense], name, perm=[1, 0])


def _places() -> tuple[np.ndarray, np.ndarray]:
    """For each byte of positions, of its eight columns: which of the four values beside it stands there, and 1 or 0 for one or none.

    (256, 8) int32 and (256, 8) float32.
    """
    positions = unpack(torch.arange(256, dtype=torch.uint8)[:, None], 2)  # (256, 2, 2)
    kept = place(torch.ones(256, 4), positions)
    shown = place(torch.arange(4, dtype=torch.int32).repeat(256, 1), positions)
    return shown.numpy(), kept.numpy()
