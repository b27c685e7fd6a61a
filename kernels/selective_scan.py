"""`planish::selective_scan`: the recurrence of a Mamba block (Gu and Dao 2023, algorithm 2), with or without an int8 product.

    h_t = exp(delta_t * A) * h_{t-1} + (delta_t * x_t) * B_t        A = -exp(a_log)
    y_t = sum over states of q(R3^T h_t R4) * C_t,  rotated back:  y_t = R3 y_t,  and y_t + D * x_t

x, delta     (batch, time, channels) float32; delta is the step size, positive (softplus is applied already)
a_log        (channels, states)
B, C         (batch, time, states); where R4 is given, C is expected to be rotated by it already (C R4)
D            (channels,)
state        (batch, channels, states): h before the first step; zeros to start
rotation     R4 (states, states), orthogonal, or absent
outer, inner (p, p) and (q, q) with p * q = channels: R3 = outer (x) inner, orthogonal, or absent; a product of two small
             matrices, because a full one would cost more than all else in the block
state_scale  0: q does nothing. Positive: q(v) = state_scale * clamp(round_half_even(v / state_scale), -128, 127), which
             makes the product with C one of int8 operands when C holds int8 codes too (MambaQuant, arXiv 2501.13484,
             section 4). The state itself accumulates in float32.

Returns y (batch, time, channels) and h after the last step, so that a sequence may be cut anywhere.

ONNX Runtime has no operator for it: the lowering is ONNX's Scan over time, one step a run of its body, any length. An int8
product inside costs time there; the quantized operands are for kernels that have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from onnx import GraphProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ..common.errors import PlanishError
from .fused import Builder, Call, Fused, register

TOGETHER = 8
"""sequences that the reference takes at once, so that their states stay in the cache from step to step"""


def states(
    x: torch.Tensor, delta: torch.Tensor, a_log: torch.Tensor, b: torch.Tensor, state: torch.Tensor
) -> Iterator[torch.Tensor]:
    """h_t (batch, channels, states) of every step in order; shapes as in the module's text."""
    a = -torch.exp(a_log)  # (channels, states)
    into = delta * x  # (batch, time, channels)
    for t in range(x.shape[1]):
        state = torch.exp(delta[:, t, :, None] * a) * state + into[:, t, :, None] * b[:, t, None, :]
        yield state


def rotated(
    h: torch.Tensor, rotation: torch.Tensor | None, outer: torch.Tensor | None, inner: torch.Tensor | None
) -> torch.Tensor:
    """R3^T h R4 for h (batch, channels, states)."""
    if rotation is not None:
        h = h @ rotation
    if outer is not None and inner is not None:
        h = _mixed(outer.T, inner.T, h)
    return h


def selective_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    a_log: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor,
    rotation: torch.Tensor | None,
    outer: torch.Tensor | None,
    inner: torch.Tensor | None,
    state_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: y (batch, time, channels) and the last state; arguments as in the module's text."""
    parts = [
        _scan(x[s], delta[s], b[s], c[s], state[s], a_log, d, rotation, outer, inner, state_scale)
        for s in (slice(k, k + TOGETHER) for k in range(0, len(x), TOGETHER))
    ]
    return torch.cat([y for y, _ in parts]), torch.cat([last for _, last in parts])


def _scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    rotation: torch.Tensor | None,
    outer: torch.Tensor | None,
    inner: torch.Tensor | None,
    state_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    found: list[torch.Tensor] = []
    last = state
    for t, last in enumerate(states(x, delta, a_log, b, state)):
        operand = rotated(last, rotation, outer, inner)  # (batch, channels, states)
        if state_scale > 0:
            operand = torch.clamp(torch.round(operand / state_scale), -128, 127) * state_scale
        found.append((operand @ c[:, t, :, None]).squeeze(-1))
    y = torch.stack(found, 1) if found else torch.zeros_like(x)
    if outer is not None and inner is not None:
        y = _mixed(outer, inner, y.transpose(1, 2)).transpose(1, 2)
    return y + d * x, last


def _mixed(outer: torch.Tensor, inner: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """(outer (x) inner) h for h (batch, channels, n)."""
    batch, channels, n = h.shape
    p, q = len(outer), len(inner)
    h = (outer @ h.reshape(batch, p, q * n)).reshape(batch * p, q, n)
    return (inner @ h).reshape(batch, channels, n)


def _fake(
    x: torch.Tensor,
    delta: torch.Tensor,
    a_log: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    state: torch.Tensor,
    rotation: torch.Tensor | None,
    outer: torch.Tensor | None,
    inner: torch.Tensor | None,
    state_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


register(
    "selective_scan(Tensor x, Tensor delta, Tensor a_log, Tensor b, Tensor c, Tensor d, Tensor state, Tensor? rotation,"
    " Tensor? outer, Tensor? inner, float state_scale) -> (Tensor, Tensor)",
    selective_scan,
    _fake,
)


class SelectiveScan(Fused):
    """Mamba's recurrence as ONNX Scan."""

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """The names of y and of the last state. a_log and the rotations must be constants of the model."""
        t = call.tensors
        fixed = {n: _constant(call, graph, n) for n in ("a_log", "rotation", "outer", "inner") if n in t}
        outer, inner = fixed.get("outer"), fixed.get("inner")
        scale = float(call.attributes.get("state_scale", 0.0))
        body = _body(fixed["a_log"], fixed.get("rotation"), outer, inner, scale)
        into = graph.one("Mul", [t["delta"], t["x"]], f"{call.name}.into")
        last, y = graph.add(
            "Scan",
            [t["state"], t["delta"], into, t["b"], t["c"]],
            f"{call.name}.scan",
            outputs=2,
            body=body,
            num_scan_inputs=4,
            scan_input_axes=[1] * 4,
            scan_output_axes=[1],
        )
        if outer is not None and inner is not None:
            y = self._rotate_back(call.name, graph, y, outer, inner)
        skip = graph.one("Mul", [t["x"], t["d"]], f"{call.name}.skip")
        return [graph.one("Add", [y, skip], f"{call.name}.y"), last]

    @staticmethod
    def _rotate_back(name: str, graph: Builder, y: str, outer: np.ndarray, inner: np.ndarray) -> str:
        """R3 y for y (batch, time, channels): as rows, y inner^T within and outer y across the p groups of q channels."""
        p, q = len(outer), len(inner)
        grouped = graph.constant(f"{name}.groups", np.array([0, 0, p, q], np.int64))
        flat = graph.constant(f"{name}.channels", np.array([0, 0, p * q], np.int64))
        y = graph.one("Reshape", [y, grouped], f"{name}.grouped")
        y = graph.one("MatMul", [y, graph.constant(f"{name}.inner", inner.T.copy())], f"{name}.within")
        y = graph.one("MatMul", [graph.constant(f"{name}.outer", outer), y], f"{name}.across")
        return graph.one("Reshape", [y, flat], f"{name}.back")

    def low_bit(self, call: Call) -> bool:
        """Only with an int8 product."""
        return float(call.attributes.get("state_scale", 0.0)) > 0

    def slow(self, call: Call) -> str | None:
        """The int8 product inside: every step rounds its operand, and then multiplies in float as before."""
        if not self.low_bit(call):
            return None
        return "ONNX Runtime multiplies the int8 codes of the scan's states in float, and rounds them before"


def _constant(call: Call, graph: Builder, argument: str) -> np.ndarray:
    """The float32 array of an argument that the body of the scan holds itself; 16-bit parameters are converted."""
    name = call.tensors[argument]
    makers = {o: n for n in graph.nodes for o in n.output}
    while name in makers and makers[name].op_type in ("Cast", "Identity"):
        name = makers[name].input[0]
    if name not in graph.constants:
        raise PlanishError(f"'{call.name}': '{argument}' of selective_scan is computed; a constant is expected")
    return graph.value(name).astype(np.float32)


def _body(
    a_log: np.ndarray, rotation: np.ndarray | None, outer: np.ndarray | None, inner: np.ndarray | None, scale: float
) -> GraphProto:
    """One step: (h, delta_t, delta_t x_t, B_t, C_t) to (h, y_t); h (batch, channels, states), the rest two-dimensional."""
    channels, count = a_log.shape
    constants = {
        "a": (-np.exp(a_log.astype(np.float64))).astype(np.float32),
        "last": np.array([-1]),
        "one": np.array([1]),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["delta", "last"], ["step"]),
        helper.make_node("Mul", ["step", "a"], ["rate"]),
        helper.make_node("Exp", ["rate"], ["decay"]),
        helper.make_node("Mul", ["decay", "before"], ["kept"]),
        helper.make_node("Unsqueeze", ["into", "last"], ["column"]),
        helper.make_node("Unsqueeze", ["b", "one"], ["row"]),
        helper.make_node("Mul", ["column", "row"], ["added"]),
        helper.make_node("Add", ["kept", "added"], ["after"]),
    ]
    operand = "after"
    if rotation is not None:
        constants["rotation"] = rotation
        nodes.append(helper.make_node("MatMul", [operand, "rotation"], ["turned"]))
        operand = "turned"
    if outer is not None and inner is not None:
        p, q = len(outer), len(inner)
        constants |= {"outer": outer.T.copy(), "inner": inner.T.copy()}
        constants |= {"groups": np.array([-1, p, q * count]), "group": np.array([-1, q, count])}
        constants |= {"whole": np.array([-1, channels, count])}
        nodes += [
            helper.make_node("Reshape", [operand, "groups"], ["grouped"]),
            helper.make_node("MatMul", ["outer", "grouped"], ["across"]),
            helper.make_node("Reshape", ["across", "group"], ["regrouped"]),
            helper.make_node("MatMul", ["inner", "regrouped"], ["within"]),
            helper.make_node("Reshape", ["within", "whole"], ["mixed"]),
        ]
        operand = "mixed"
    if scale > 0:
        constants |= {"scale": np.array(scale, np.float32), "zero": np.array(0, np.int8)}
        nodes += [
            helper.make_node("QuantizeLinear", [operand, "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["restored"]),
        ]
        operand = "restored"
    nodes += [
        helper.make_node("Unsqueeze", ["c", "last"], ["weights"]),
        helper.make_node("MatMul", [operand, "weights"], ["product"]),
        helper.make_node("Squeeze", ["product", "last"], ["y"]),
    ]

    def value(name: str, *shape: int | str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    return helper.make_graph(
        nodes,
        "step",
        [
            value("before", "batch", channels, count),
            value("delta", "batch", channels),
            value("into", "batch", channels),
            value("b", "batch", count),
            value("c", "batch", count),
        ],
        [value("after", "batch", channels, count), value("y", "batch", channels)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
