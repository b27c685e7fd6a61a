"""`selective_scan` in TVM: one kernel with the loop over time inside. The state stands as (states, channels), so that channels are vectors.

Without quantization the rotations cancel: sum_s (R3^T h R4)_s C_s = R3^T (h (R4 C)), and R3 takes the front one back. So only a quantized
operand is rotated step by step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .lowering import Lowering, Use

LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
"""ln 2 in two parts, the first with few bits, so that its product with a small whole number is exact"""
TERMS = 8
"""of the series of exp on [-ln 2 / 2, ln 2 / 2]: the next one is 2e-9 of the sum"""
LEAST = -87.0
"""exp of less is taken for exp of this, 1.6e-38"""


class SelectiveScan(Lowering):
    """Equal to the reference within float32 rounding, which may move a code of the quantized operand by one."""

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether activations are rounded."""
        return float(attributes.get("state_scale", 0.0)) > 0

    def lower(self, use: Use) -> Sequence[Any]:
        """The expressions of y (batch, time, channels) and of the last state (batch, channels, states)."""
        op, tensors = use.ir.relax.op, use.tensors
        scale = float(use.attributes.get("state_scale", 0.0))
        a = -np.exp(use.array("a_log").astype(np.float64)).astype(np.float32)  # (channels, states)
        rotation, outer, inner = (use.optional(n) for n in ("rotation", "outer", "inner"))
        weights = tensors["c"]
        if rotation is not None and not scale:
            weights = use.emit(op.matmul(weights, _constant(use, rotation.T)))
        mixing = [m for m in (rotation, outer, inner) if m is not None] if scale else []
        batch, time, channels = use.shape("x")
        states = a.shape[1]
        operands = [tensors["x"], tensors["delta"], tensors["b"], weights, tensors["state"], use.constant(a.T)]
        operands += [_constant(use, m) for m in mixing]
        shapes = [(batch, time, channels), (batch, channels, states)]
        kernel = _Kernel(use, shapes, scale, rotation is not None, None if outer is None or inner is None else (len(outer), len(inner)))  # fmt: skip
        y, last = use.call(kernel.build(), operands, shapes, 2 * batch * time * channels * states)
        if scale and outer is not None and inner is not None:
            p, q = len(outer), len(inner)
            y = use.reshape(y, (batch * time, p, q))
            y = use.emit(op.matmul(_constant(use, outer), op.matmul(y, _constant(use, inner.T))))
            y = use.reshape(y, (batch, time, channels))
        return [use.emit(op.add(y, op.multiply(tensors["x"], tensors["d"]))), last]


def exponential(tirx: Any, value: Any) -> Any:
    """Exp of a float32 expression of at most 88, in operations that have vector instructions: 2^n times a series, error below 2e-7."""

    def number(x: float) -> Any:
        return tirx.const(x, "float32")

    value = tirx.max(value, number(LEAST))
    whole = tirx.nearbyint(value * number(LOG2_E))
    rest = value - whole * number(LN2_HIGH) - whole * number(LN2_LOW)
    series = number(1 / math.factorial(TERMS - 1))
    for i in reversed(range(TERMS - 1)):
        series = series * rest + number(1 / math.factorial(i))
    power = (whole.astype("int32") + tirx.const(127, "int32")) << tirx.const(23, "int32")
    return series * tirx.reinterpret("float32", power)


class _Kernel:
    """Writes the kernel. `parts` is (p, q) of the channel rotation; both rotations apply to a quantized operand only."""

    def __init__(
        self, use: Use, shapes: Sequence[tuple[int, ...]], scale: float, rotated: bool, parts: tuple[int, int] | None
    ) -> None:
        (self.batch, self.time, self.channels), (_, _, self.states) = shapes
        self.script, self.tirx, self.ir = use.ir.script, use.ir.tirx, use.ir
        self.scale, self.rotated, self.parts = scale, rotated and scale > 0, parts if scale else None
        self.lanes = math.gcd(self.channels, use.unit.lanes)
        self.unit = use.unit

    def build(self) -> Any:
        """The PrimFunc of x, delta, b, c, state, a (states, channels), then R4, outer, inner as there are, y, last."""
        t, channels, states = self.script, self.channels, self.states
        long, short = (self.batch, self.time, channels), (self.batch, self.time, states)
        whole = (self.batch, channels, states)
        shapes = {"x": long, "delta": long, "b": short, "c": short, "state": whole, "a": (states, channels)}
        if self.rotated:
            shapes["rotation"] = (states, states)
        if self.parts:
            shapes |= {"outer": (self.parts[0],) * 2, "inner": (self.parts[1],) * 2}
        shapes |= {"y": long, "last": whole}
        with self.ir.IRBuilder() as builder:
            with t.prim_func(s_tir=True):
                t.func_name("selective_scan")
                self.at = {name: t.arg(name, t.buffer(shape, "float32")) for name, shape in shapes.items()}
                self.h = t.alloc_buffer((states, channels), "float32")
                self.spare = [t.alloc_buffer((states, channels), "float32") for _ in range(2 if self._mixes else 0)]
                with t.serial(0, self.batch) as n:
                    with t.serial(0, states) as s, t.serial(0, channels) as c:
                        t.buffer_store(self.h, self.at["state"][n, c, s], [s, c])
                    with t.serial(0, self.time) as step:
                        self._step(n, step)
                    with t.serial(0, channels) as c, t.serial(0, states) as s:
                        t.buffer_store(self.at["last"], self.h[s, c], [n, c, s])
            return builder.get()

    @property
    def _mixes(self) -> bool:
        return self.rotated or self.parts is not None

    def _step(self, n: Any, step: Any) -> None:
        """The state after one more step, and y of it."""
        t, at, y = self.script, self.at, self.at["y"]
        zero, blocks = self.tirx.const(0.0, "float32"), self.channels // self.lanes
        with t.serial(0, blocks) as block, t.vectorized(0, self.lanes) as lane:
            t.buffer_store(y, zero, [n, step, block * self.lanes + lane])
        with t.serial(0, blocks) as block, t.serial(0, self.states) as s, t.vectorized(0, self.lanes) as lane:
            c = block * self.lanes + lane
            delta = at["delta"][n, step, c]
            decay = exponential(self.tirx, delta * at["a"][s, c])
            t.buffer_store(self.h, decay * self.h[s, c] + delta * at["x"][n, step, c] * at["b"][n, step, s], [s, c])
            if not self._mixes:
                self._add(self.h, n, step, s, c)
        if self._mixes:
            operand = self._mix()
            with t.serial(0, blocks) as block, t.serial(0, self.states) as s, t.vectorized(0, self.lanes) as lane:
                self._add(operand, n, step, s, block * self.lanes + lane)

    def _add(self, operand: Any, n: Any, step: Any, s: Any, c: Any) -> None:
        """Y += q(operand) C."""
        tirx, value, y = self.tirx, operand[s, c], self.at["y"]
        if self.scale:
            grid = tirx.const(self.scale, "float32")
            code = tirx.nearbyint(value / grid)
            code = tirx.max(tirx.min(code, tirx.const(127.0, "float32")), tirx.const(-128.0, "float32"))
            value = code * grid
        self.script.buffer_store(y, y[n, step, c] + value * self.at["c"][n, step, s], [n, step, c])

    def _mix(self) -> Any:
        """R3^T h R4 in one of the spare buffers."""
        at, source, target = self.at, self.h, 0
        if self.rotated:
            self._sum(self.spare[target], self.states, self.lanes, lambda s, k, c: at["rotation"][k, s] * self.h[k, c])
            source, target = self.spare[target], 1 - target
        if self.parts is not None:
            p, q = self.parts
            first = source
            lanes = math.gcd(q, self.unit.lanes)
            self._sum(self.spare[target], p, lanes, lambda s, k, c: at["outer"][k, c // q] * first[s, k * q + c % q])
            second, target = self.spare[target], 1 - target
            self._sum(self.spare[target], q, lanes, lambda s, k, c: second[s, c // q * q + k] * at["inner"][k, c % q])
            target = 1 - target
        return self.spare[1 - target]

    def _sum(self, target: Any, count: int, lanes: int, term: Any) -> None:
        """target[s, c] = the sum of term(s, k, c) over k below `count`; `lanes` divides the channels."""
        t, zero = self.script, self.tirx.const(0.0, "float32")
        with t.serial(0, self.states) as s, t.serial(0, self.channels // lanes) as block:
            with t.vectorized(0, lanes) as lane:
                t.buffer_store(target, zero, [s, block * lanes + lane])
            with t.serial(0, count) as k, t.vectorized(0, lanes) as lane:
                c = block * lanes + lane
                t.buffer_store(target, target[s, c] + term(s, k, c), [s, c])


def _constant(use: Use, values: np.ndarray) -> Any:
    return use.ir.relax.const(np.ascontiguousarray(values, np.float32))
