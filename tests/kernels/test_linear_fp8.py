"""planish::linear_fp8: rounding by the format's grid, exactness where it must be, and the same in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planish.export.onnx import float_weight_bytes, optimized, weight_bytes
from planish.kernels.fused import Call
from planish.kernels.linear_fp8 import DTYPES, MAX, LinearFp8, decode, encode, linear_fp8, to_float8
from planish.runtimes import ort

FORMATS = ("e4m3", "e5m2")
STEP = {"e4m3": 2**-4, "e5m2": 2**-3}  # half a step of the mantissa


def grid(name: str) -> torch.Tensor:
    """All finite values, ascending."""
    values = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).float()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_to_nearest_even_and_saturates(name: str) -> None:
    values = grid(name)
    assert values[-1] == MAX[name] == {"e4m3": 448, "e5m2": 57344}[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * torch.logspace(-9, 6, 5000)
    best = (x.clamp(-MAX[name], MAX[name])[:, None] - values).abs().amin(1)
    found = to_float8(x, name).float()
    assert torch.equal((x.clamp(-MAX[name], MAX[name]) - found).abs(), best)
    middles = (values[:-1] + values[1:]) / 2  # ties: the neighbour with an even code
    assert not (to_float8(middles, name).view(torch.uint8) & 1).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_weights_err_by_half_a_step_at_most_whatever_their_size(name: Any, factor: float) -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * factor
    w[3] = 0
    w[:, 5] *= 1000  # rows keep their own scale; small weights stay relative to it
    codes, scale = encode(w, name)
    back = decode(codes, scale, name)
    assert codes.dtype == torch.uint8 and scale.shape == (16,)
    assert torch.equal(back[3], w[3]) and scale[3] == 1
    floor = scale[:, None] * grid(name)[grid(name) > 0][0]  # below the normal numbers the step is fixed
    assert ((back - w).abs() <= torch.maximum(w.abs() * STEP[name], floor)).all()


def test_e4m3_is_finer_and_e5m2_wider() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 256, generator=generator)
    wide = normal * torch.logspace(-6, 0, 256)
    error = {(n, i): float(((decode(*encode(w, n), n) - w) / w).abs().mean()) for n in FORMATS for i, w in enumerate((normal, wide))}  # fmt: skip
    assert error["e4m3", 0] < 0.6 * error["e5m2", 0]
    assert error["e5m2", 1] < 0.6 * error["e4m3", 1]


@pytest.mark.parametrize("activations", ["none", "e4m3", "e5m2"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("out", "inputs"), [(20, 64), (1, 7), (33, 130)])
def test_onnx_runtime_computes_the_reference(lowered: Any, name: Any, activations: str, out: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    codes, scale = encode(torch.randn(out, inputs, generator=generator), name)
    bias = None if out == 20 else torch.randn(out, generator=generator)
    proto = lowered(
        "linear_fp8", {"codes": codes, "scale": scale, "bias": bias}, {"format": name, "activations": activations}
    )
    session = ort.create(proto.SerializeToString(), 1)
    for batch in (1, 3):
        x = torch.randn(batch, 4, inputs, generator=generator) * torch.logspace(-3, 3, 4)[:, None]
        x[0, 2] = 0
        want = linear_fp8(x, codes, scale, bias, name, activations).numpy()
        got = ort.run(session, {"x": x.numpy()})["y"]
        assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()
        assert np.isfinite(want).all()


@pytest.mark.parametrize("name", FORMATS)
def test_activations_are_rounded_as_torch_rounds_them(lowered: Any, name: str) -> None:
    """A layer with the identity as weight shows the rounded activations: every value, ties and subnormals, equal bit for bit."""
    codes, scale = to_float8(torch.eye(512), name).view(torch.uint8), torch.ones(512)
    values = grid(name)
    ties = (values[:-1] + values[1:]) / 2
    x = torch.zeros(4, 512)
    for row, part in enumerate((values, ties, torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(-1e9)))):  # fmt: skip
        x[row, : len(part)] = part
    x[:, -1] = MAX[name]  # so that the scale is 1
    proto = lowered("linear_fp8", {"codes": codes, "scale": scale}, {"format": name, "activations": name}, rank=2)
    got = ort.run(ort.create(proto.SerializeToString(), 1), {"x": x.numpy()})["y"]
    assert np.array_equal(got, to_float8(x, name).float().numpy())
    assert torch.equal(linear_fp8(x, codes, scale, None, name, name), to_float8(x, name).float())


@pytest.mark.parametrize("activations", ["none", "e4m3"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_stays_eight_bits_in_the_graph_that_runs(
    lowered: Any, name: Any, activations: str, tmp_path: Any
) -> None:
    codes, scale = encode(torch.randn(128, 256, generator=torch.Generator().manual_seed(0)), name)
    attributes = {"format": name, "activations": activations}
    proto = lowered("linear_fp8", {"codes": codes, "scale": scale}, attributes)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    runs = optimized(tmp_path / "m.onnx")
    assert float_weight_bytes(runs) == 0
    assert 128 * 256 + 128 * 4 <= weight_bytes(runs) <= 128 * 256 + 128 * 4 + 32
    reason = LinearFp8().slow(Call("fc", {}, attributes))
    assert reason is not None and "in every call" in reason
