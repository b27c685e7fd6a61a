"""planish::selective_scan: against a second formula, cut anywhere, rotated exactly, and the same in ONNX Runtime."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from planish.compress.model import Input, trace
from planish.export import metadata
from planish.export.lowering import to_onnx
from planish.kernels import fused
from planish.kernels.selective_scan import selective_scan, states

fused.ops()
CHANNELS, STATES = 24, 8


def operands(time: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, time, CHANNELS),
        "delta": torch.nn.functional.softplus(normal(batch, time, CHANNELS)),
        "a_log": normal(CHANNELS, STATES),
        "b": normal(batch, time, STATES),
        "c": normal(batch, time, STATES),
        "d": normal(CHANNELS),
        "state": normal(batch, CHANNELS, STATES),
    }


def orthogonal(n: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q.to(dtype)


def plain(o: dict[str, torch.Tensor], *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return selective_scan(*o.values(), *(rest or (None, None, None, 0.0)))


def test_closed_form() -> None:
    """h_t is a sum over all earlier steps of what they added, decayed by the total step size since."""
    o = operands(7, dtype=torch.float64)
    total = torch.cumsum(o["delta"], 1)  # (batch, time, channels)
    since = total[:, :, None] - total[:, None]  # (batch, t, s, channels)
    a = -torch.exp(o["a_log"])
    decay = torch.exp(since[..., None] * a) * torch.ones(7, 7).tril()[None, :, :, None, None]
    added = (o["delta"] * o["x"])[..., None] * o["b"][:, :, None]  # (batch, s, channels, states)
    h = torch.einsum("btscn,bscn->btcn", decay, added) + torch.exp(total[..., None] * a) * o["state"][:, None]
    expected = torch.einsum("btcn,btn->btc", h, o["c"]) + o["d"] * o["x"]
    y, last = plain(o)
    assert (y - expected).abs().max() < 1e-12
    assert (last - h[:, -1]).abs().max() < 1e-12


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_a_sequence_may_be_cut_anywhere(cut: int) -> None:
    o = operands(9)
    whole, last = plain(o)
    timed = ("x", "delta", "b", "c")
    first, state = plain(o | {n: o[n][:, :cut] for n in timed})
    second, state = plain(o | {n: o[n][:, cut:] for n in timed} | {"state": state})
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(state, last)


def test_rotations_of_the_state_are_exact() -> None:
    o = operands(9, dtype=torch.float64)
    y, last = plain(o)
    r4, outer, inner = (orthogonal(n, s, torch.float64) for s, n in enumerate((STATES, 4, 6)))
    turned, state = plain(o | {"c": o["c"] @ r4}, r4, outer, inner, 0.0)
    assert (turned - y).abs().max() < 1e-12
    assert torch.equal(state, last)


def test_quantized_state_errs_by_at_most_half_a_step_per_term_and_does_not_accumulate() -> None:
    o = operands(40)
    y, last = plain(o)
    scale = max(float(h.abs().max()) for h in states(o["x"], o["delta"], o["a_log"], o["b"], o["state"])) / 127
    rough, state = plain(o, None, None, None, scale)
    assert torch.equal(state, last)
    bound = scale / 2 * o["c"].abs().sum(-1, keepdim=True) + 1e-4  # (batch, time, 1)
    assert ((rough - y).abs() <= bound).all()
    assert not torch.equal(rough, y)


class Scan(torch.nn.Module):
    def __init__(self, o: dict[str, torch.Tensor], rest: tuple[torch.Tensor | None, ...], scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, value in zip(("a_log", "d", "rotation", "outer", "inner"), (o["a_log"], o["d"], *rest), strict=True):
            self.register_buffer(name, value)

    def forward(self, x, delta, b, c, state):
        return torch.ops.planish.selective_scan(
            x, delta, self.a_log, b, c, self.d, state, self.rotation, self.outer, self.inner, self.scale
        )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_onnx_runtime_computes_the_reference(turned: bool, scale: float) -> None:
    """Any length and batch; with the quantizer, values on a rounding boundary may fall to the other side: within one step."""
    rest = tuple(orthogonal(n, n, torch.float32) if turned else None for n in (STATES, 4, 6))
    o = operands(5)
    dynamic = ("x", "delta", "b", "c")
    inputs = {n: o[n] for n in (*dynamic, "state")}
    declared = [
        Input(n, tuple(v.shape), v.dtype, (None, "time", None) if n in dynamic else ()) for n, v in inputs.items()
    ]
    proto = to_onnx(trace(Scan(o, rest, scale), inputs, "scan", declared))
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, time in ((2, 5), (1, 1), (3, 17)):
        o = operands(time, batch) | {n: o[n] for n in ("a_log", "d")}
        y, last = plain(o, *rest, scale)
        found, state = session.run(None, {n: o[n].numpy() for n in inputs})
        assert (torch.from_numpy(state) - last).abs().max() < 1e-5
        error = (torch.from_numpy(found) - y).abs()
        assert (error <= (scale * o["c"].abs().amax(-1, keepdim=True) if scale else 0) + 2e-5).all()
        assert error.median() < 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_only_a_scan_with_an_int8_product_is_a_low_bit_op(scale: float) -> None:
    """Then, and only then, the user hears that ONNX Runtime is slower with it than in float."""
    o = operands(5)
    inputs = {n: o[n] for n in ("x", "delta", "b", "c", "state")}
    rest = tuple(orthogonal(n, n, torch.float32) for n in (STATES, 4, 6))
    proto = to_onnx(trace(Scan(o, rest, scale), inputs, "scan"))
    notes = metadata.get(proto, metadata.NOTES)
    assert metadata.get(proto, metadata.LOW_BIT) == (["selective_scan"] if scale else [])
    assert len(notes) == (1 if scale else 0)
    assert all("slower than in float" in n for n in notes)


class Turned(torch.nn.Module):
    def forward(self, x):
        return torch.ops.planish.hadamard(x, None, 8, False)


def test_a_rotation_in_float_is_no_low_bit_op() -> None:
    proto = to_onnx(trace(Turned(), {"x": torch.zeros(2, 8)}, "turned"))
    assert metadata.get(proto, metadata.LOW_BIT) == metadata.get(proto, metadata.NOTES) == []
