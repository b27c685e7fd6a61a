"""Outlier-victim pairs: every code has a meaning, encoding and decoding agree, and planish::linear_ovp is the same in ONNX Runtime."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress.model import trace
from planish.compress.program_file import load, save
from planish.export.lowering import to_onnx
from planish.export.onnx import float_weight_bytes, optimized, weight_bytes
from planish.kernels.fused import Call
from planish.kernels.linear_ovp import LinearOvp, linear_ovp
from planish.kernels.outlier_victim import codec, outlier_pairs, search, swapped, victims
from planish.runtimes import ort

FORMATS = [(4, "int"), (4, "flint"), (8, "int")]


def values_with_outliers(format: Any, *shape: int, seed: int = 0) -> torch.Tensor:
    """In steps of the format: most within the normal values, some far beyond, some saturating, in neighbouring places too."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(shape, generator=generator) * format.limit / 3
    q[torch.rand(shape, generator=generator) < 0.1] *= 12
    return q


# ---- the format


def test_values_of_the_published_grids() -> None:
    found = {f: (codec(*f).normals.tolist(), codec(*f).outliers.tolist()) for f in FORMATS}
    assert found[4, "int"] == ([*range(8)], [12, 16, 24, 32, 48, 64, 96])
    assert found[4, "flint"] == ([0, 1, 2, 3, 4, 6, 8, 16], [24, 32, 48, 64, 96, 128, 192])
    normals, outliers = found[8, "int"]
    assert normals == [*range(128)]
    assert outliers[:3] == [144, 160, 176] and outliers[-1] == 2**15
    assert outliers[-1] ** 2 < 2**31


@pytest.mark.parametrize("kind", ["int", "flint"])
def test_every_byte_has_a_meaning_and_what_can_be_written_is_read_back(kind: str) -> None:
    format = codec(4, kind)
    pairs = format.pairs()  # (256, 2)
    assert pairs.shape == (256, 2) and pairs.isfinite().all()
    written = format.store(format.encode(pairs))[:, 0]  # encode(decode(byte)), in steps
    same = written == torch.arange(256, dtype=torch.uint8)
    assert sorted(torch.arange(256)[~same].tolist()) == [
        0x08,
        0x80,
        0x88,
    ]  # nothing beside an identifier, or two of them
    assert not pairs[~same].any()
    grid = [*format.normals.tolist(), *format.outliers.tolist()]
    for left, right in itertools.product([s * v for v in grid for s in (1, -1)], repeat=2):
        q = torch.tensor([left, right])
        byte = format.store(format.encode(q))
        assert same[int(byte)]
        assert torch.equal(format.decode(format.read(byte)), format.round_trip(q))


def test_every_pair_of_8_bit_codes_has_a_meaning() -> None:
    format = codec(8, "int")
    every = torch.cartesian_prod(*[torch.arange(256, dtype=torch.uint8)] * 2)  # (65536, 2)
    values = format.decode(every)
    again = format.encode(values)
    assert values.isfinite().all() and values.abs().max() == 2**15
    assert torch.equal(format.decode(again), values)
    abfloat = every[:, 0] & 0x7F
    left_marked = (every[:, 0] == 0x80) & (every[:, 1] != 0x80)
    right_marked = (every[:, 1] == 0x80) & (every[:, 0] != 0x80)
    plain = ~(left_marked | right_marked | (every == 0x80).all(1))
    assert torch.equal(again[plain], every[plain])
    reachable = right_marked & (abfloat > 0) & (abfloat <= 0x40)  # beyond 2^15 codes repeat the largest
    assert torch.equal(again[reachable], every[reachable])
    assert not values[right_marked & (abfloat == 0)].any()


@pytest.mark.parametrize("form", FORMATS)
def test_pairs_keep_one_outlier_and_lose_one_neighbour(form: tuple[int, str]) -> None:
    format = codec(*form)
    q = values_with_outliers(format, 64, 128)
    codes = format.encode(q)
    back = format.decode(codes)
    assert torch.equal(back, format.round_trip(q))
    assert codes.shape == q.shape
    assert format.store(codes).numel() * 8 == format.bits * q.numel()
    assert torch.equal(format.read(format.store(codes)), codes)
    outlier, victim = format.is_outlier(q), victims(format.is_outlier(q))
    assert int(victim.sum()) == int((codes == format.identifier).sum()) == int(outlier_pairs(q, format).sum()) > 0
    assert not back[victim].any()
    both = outlier[:, 0::2] & outlier[:, 1::2]
    assert both.any() and (back[:, 0::2][both] != 0).all() and not back[:, 1::2][both].any()  # the left one wins
    levels = torch.cat([format.normals, format.outliers])
    best = (q.abs().clamp_max(levels[-1])[..., None] - levels).abs().amin(-1)
    assert torch.equal((q.abs().clamp_max(levels[-1]) - back.abs()).abs()[~victim], best[~victim])
    assert (back[~victim] * q[~victim] >= 0).all()


@pytest.mark.parametrize("form", FORMATS)
def test_ties_go_to_the_larger_magnitude_and_what_lies_beyond_saturates(form: tuple[int, str]) -> None:
    format = codec(*form)
    levels = torch.cat([format.normals, format.outliers])
    middles = (levels[:-1] + levels[1:]) / 2
    q = torch.stack([middles, torch.zeros_like(middles)], 1)
    assert torch.equal(format.round_trip(q)[:, 0], levels[1:])
    assert torch.equal(format.round_trip(torch.nextafter(q, torch.tensor(0.0)))[:, 0], levels[:-1])
    beyond = torch.tensor([[float("inf"), 1.0], [-1e30, 2.0], [3.0, float("nan")]])
    top = levels[-1].item()
    assert format.round_trip(beyond).tolist() == [[top, 0], [-top, 0], [0, top]]


def test_gaussian_pairs_hold_outliers_as_often_as_the_normal_distribution_says() -> None:
    """Beyond 3 sigma: 0.27 % of values, so 0.54 % of pairs hold one and 0.0007 % two."""
    format = codec(4, "int")
    x = torch.randn(2, 2_000_000, generator=torch.Generator().manual_seed(0))
    q = x / 3 * format.threshold
    outlier = format.is_outlier(q)
    one = outlier_pairs(q, format).float().mean().item()
    assert one == pytest.approx(0.0054, rel=0.05)
    assert (outlier & swapped(outlier)).float().mean().item() < 2e-5


@pytest.mark.parametrize("form", FORMATS)
def test_the_search_returns_the_error_of_the_round_trip_it_chose(form: tuple[int, str]) -> None:
    format = codec(*form)
    x = values_with_outliers(format, 300, 512) * torch.logspace(-20, 10, 300)[:, None]
    x[7] = 0
    steps, errors = search(x, format, by_row=True)
    assert steps.shape == errors.shape == (300,) and steps[7] == 1 and errors[7] == 0
    off = (x.double() - format.round_trip(x / steps[:, None]).double() * steps[:, None].double()).square().sum(1)
    assert torch.allclose(off, errors, rtol=1e-3, atol=0)
    for factor in (0.9, 1.1):
        other = steps * factor
        worse = (x.double() - format.round_trip(x / other[:, None]).double() * other[:, None].double()).square().sum(1)
        ratio = (off / worse)[errors > 0]  # the steps tried are 1 to 3 % apart, and a row's error is rugged in its step
        assert ratio.mean() < 0.9 and (ratio <= 1.02).float().mean() > 0.85
    step, error = search(x[200:], format, by_row=False)
    assert step.ndim == error.ndim == 0
    assert error == pytest.approx((x[200:].double() - format.round_trip(x[200:] / step).double() * step).square().sum().item(), rel=1e-3)  # fmt: skip


def test_other_formats_are_refused() -> None:
    with pytest.raises(PlanishError, match="8 bits, grid 'flint'; 4 with int or flint, 8 with int"):
        codec(8, "flint")


# ---- the op


def layer(bits: int, grid: str, out: int, inputs: int, x_bits: int, bias: bool) -> dict[str, Any]:
    format = codec(bits, grid)
    w = values_with_outliers(format, out, inputs, seed=inputs)
    return {
        "codes": format.store(format.encode(w)),
        "scale": torch.rand(out, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.001,
        "x_scale": torch.tensor(0.37) if x_bits else None,
        "bias": torch.arange(out) * 0.1 if bias else None,
    }


SIDES = [(w, x, False) for w in FORMATS for x in [*FORMATS, (0, "int")]] + [((4, "int"), (4, "int"), True)]


@pytest.mark.parametrize(("weights", "activations", "unpacked"), SIDES)
@pytest.mark.parametrize(("out", "inputs"), [(20, 64), (1, 2), (33, 130)])
def test_onnx_runtime_computes_the_reference(
    lowered: Any, weights: tuple[int, str], activations: tuple[int, str], unpacked: bool, out: int, inputs: int
) -> None:
    tensors = layer(*weights, out, inputs, activations[0], bias=out != 20)
    attributes = {
        "bits": weights[0], "grid": weights[1], "x_bits": activations[0], "x_grid": activations[1], "unpacked": unpacked
    }  # fmt: skip
    session = ort.create(lowered("linear_ovp", tensors, attributes).SerializeToString(), 1)
    spread = values_with_outliers(codec(*(activations if activations[0] else (4, "int"))), 12, inputs) * 0.37
    for x in (spread.reshape(3, 4, inputs), spread[:1].reshape(1, 1, inputs), spread[:0].reshape(0, 2, inputs)):
        want = linear_ovp(x, **tensors, **attributes).numpy()
        got = ort.run(session, {"x": x.numpy()})["y"] if len(x) else session.run(None, {"x": x.numpy()})[0]
        if weights == activations == (4, "int"):
            assert np.array_equal(got, want)
        else:
            assert got.shape == want.shape
            assert not len(x) or np.abs(got - want).max() <= 3e-6 * np.abs(want).max()


@pytest.mark.parametrize("form", FORMATS)
def test_activations_are_rounded_bit_for_bit(lowered: Any, form: tuple[int, str]) -> None:
    """A layer with the identity as weight shows the round trip: boundaries, their float neighbours, values that saturate, NaN."""
    format, plain = codec(*form), codec(4, "int")
    levels = torch.cat([format.normals, format.outliers])
    middles = (levels[:-1] + levels[1:]) / 2
    every = torch.cat(
        [levels, middles, torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(1e9))]
    )
    every = torch.cat([every, -every, torch.tensor([1e30, -1e30, float("nan"), 0.0])])
    x = torch.stack([every, every.roll(5)], 1).flatten()
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).reshape(1, -1, 64)
    tensors = {"codes": plain.store(plain.encode(torch.eye(64))), "scale": torch.ones(64), "x_scale": torch.tensor(1.0)}
    attributes = {"bits": 4, "grid": "int", "x_bits": form[0], "x_grid": form[1], "unpacked": False}
    got = ort.run(ort.create(lowered("linear_ovp", tensors, attributes).SerializeToString(), 1), {"x": x.numpy()})["y"]
    assert np.array_equal(got, format.round_trip(x).numpy())


@pytest.mark.parametrize(
    ("weights", "x_bits", "unpacked", "held", "floats"),
    [
        ((4, "int"), 4, False, 128 * 128, 0),
        ((4, "int"), 4, True, 128 * 256, 0),
        ((4, "flint"), 4, False, 128 * 128, 2048),
        ((4, "int"), 0, False, 128 * 128, 2048),
        ((8, "int"), 0, False, 128 * 256, 0),
    ],
)
def test_the_weight_stays_packed_in_the_graph_that_runs(
    lowered: Any, weights: tuple[int, str], x_bits: int, unpacked: bool, held: int, floats: int, tmp_path: Any
) -> None:
    """`held` bytes of codes, four a row for its step, and tables that all layers share: less than 4 KB."""
    tensors = layer(*weights, 128, 256, x_bits, bias=False)
    attributes = {"bits": weights[0], "grid": weights[1], "x_bits": x_bits, "x_grid": "int", "unpacked": unpacked}
    (tmp_path / "m.onnx").write_bytes(lowered("linear_ovp", tensors, attributes).SerializeToString())
    runs = optimized(tmp_path / "m.onnx")
    assert float_weight_bytes(runs) == floats
    assert held + 128 * 4 <= weight_bytes(runs) <= held + 128 * 4 + 4096
    reason = LinearOvp().slow(Call("fc", {}, attributes))
    assert (reason is None) == unpacked


def test_unpacked_is_for_int4_on_both_sides(lowered: Any) -> None:
    attributes = {"bits": 4, "grid": "flint", "x_bits": 4, "x_grid": "int", "unpacked": True}
    with pytest.raises(PlanishError, match=r"layer 'fc': .* int4 only"):
        lowered("linear_ovp", layer(4, "flint", 4, 8, 4, False), attributes)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Module()
        for name, value in layer(4, "int", 24, 64, 4, True).items():
            self.fc.register_buffer(name if name == "bias" else f"weight_{name}", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.fc
        return torch.ops.planish.linear_ovp(
            x, f.weight_codes, f.weight_scale, f.weight_x_scale, f.bias, 4, "int", 4, "int", False
        )


def test_a_model_goes_to_a_file_and_to_onnx(tmp_path: Any) -> None:
    module = Layer()
    traced = trace(module, {"x": torch.zeros(1, 3, 64)}, "layer")
    save(traced.program(), tmp_path / "m.pt2")
    x = values_with_outliers(codec(4, "int"), 2, 3, 64) * 0.37
    assert torch.equal(load(tmp_path / "m.pt2").module()(x), module(x))
    got = ort.run(ort.create(to_onnx(traced).SerializeToString(), 1), {"x": x.numpy()})["output"]
    assert np.array_equal(got, module(x).numpy())
