"""OliVe: the figures of the method's card, the pass on a network with outliers, and its faults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import recipe
from planish.compress.data import Data
from planish.compress.model import Model, trace
from planish.compress.passes import Context
from planish.compress.quantize.ovp import Ovp
from planish.export.lowering import to_onnx
from planish.export.onnx import float_weight_bytes, optimized
from planish.kernels.outlier_victim import codec, outlier_pairs, search, victims
from planish.runtimes import ort
from planish.targets import target
from torch import nn

COUNT = 16_384
TABLE = {(0.0, 0): (15.0, 18.8, 18.8), (0.001, 15): (3.5, 9.2, 18.9), (0.003, 20): (4.3, 6.8, 18.2), (0.01, 20): (8.0, 9.0, 16.4)}  # fmt: skip
"""share and size (in sigma) of the outliers: dB of absmax int4, best-clip int4 and OVP int4, as the card gives them"""


def decibel(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


def drawn(share: float, size: float) -> torch.Tensor:
    """(16384,) normal values, a share of them replaced by outliers of about `size` sigma."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, generator=generator)
    count = round(share * COUNT)
    places = torch.randperm(COUNT, generator=generator)[:count]
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    x[places] = size * sign * (1 + 0.1 * torch.randn(count, generator=generator))
    return x


def int4(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (x / step).round().clamp(-7, 7) * step


def best_clip(x: torch.Tensor) -> float:
    whole = x.abs().max() / 7
    return max(decibel(x, int4(x, whole * part)) for part in torch.linspace(0.01, 1, 200))


@pytest.mark.parametrize(("share", "size"), list(TABLE))
def test_the_cards_table(share: float, size: float) -> None:
    x, form = drawn(share, size), codec(4, "int")
    step, _ = search(x[None], form, by_row=False)
    q = x / step
    ovp, clip, whole = decibel(x, form.round_trip(q) * step), best_clip(x), decibel(x, int4(x, x.abs().max() / 7))
    expected = TABLE[share, size]
    assert whole == pytest.approx(expected[0], abs=1)
    assert clip == pytest.approx(expected[1], abs=1)
    assert ovp >= expected[2] - 0.5  # our search tries steps that the card's does not
    assert ovp >= clip + (7 if share else -0.2)
    codes = form.encode(q)
    assert form.store(codes).numel() == 4 * COUNT // 8
    assert int(victims(form.is_outlier(q)).sum()) == int(outlier_pairs(q, form).sum())
    assert torch.equal(form.encode(form.decode(codes)), codes)


def network(inputs: int = 96, outputs: int = 24) -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))
    return trace(module, {"x": torch.zeros(2, inputs)}, "mlp")


def samples(outliers: bool, rows: int = 256, inputs: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, generator=generator)
    if outliers:
        places = torch.rand(rows, inputs, generator=generator) < 0.005
        x = torch.where(places, x.sign() * 20, x)
    return x


def run(step: Ovp, model: Model, x: torch.Tensor | None) -> Model:
    data = None if x is None else Data({"x": x.numpy()}, None, "data")
    return step.apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))


def error(model: Model, original: Model, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - original(x)).norm() / original(x).norm())  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]


@pytest.mark.parametrize("grid", ["int", "flint", "auto"])
def test_w4a4_with_outliers_errs_little_more_than_without(grid: Any) -> None:
    model = network()
    found = [error(run(Ovp(grid=grid), model, x), model, x) for x in (samples(False), samples(True))]
    assert found[0] < 0.25 and found[1] < 0.25
    with_outliers = samples(True)
    first = dict(model.graph.named_parameters())["0.weight"].detach()
    step = with_outliers.abs().max() / 7
    plain = [int4(with_outliers, step * part) @ first.T for part in torch.linspace(0.05, 1, 40)]
    want = with_outliers @ first.T
    best = min(float((p - want).norm() / want.norm()) for p in plain)
    assert found[1] < 0.6 * best  # one step for the tensor, without pairs: worse in the first layer alone


def test_more_bits_and_float_activations_err_less() -> None:
    model, x = network(), samples(True)
    w4a4, w4a8, w4, w8a8, w8 = (
        error(run(Ovp(bits=b, activations=a), model, x), model, x) for b, a in ((4, 4), (4, 8), (4, None), (8, 8), (8, None))
    )  # fmt: skip
    assert w8 < w8a8 < 0.06 < w4a8 < w4a4
    assert w4 < w4a4 and w8 < w4


def test_the_criterion_of_outputs_serves_channels_that_the_weights_make_small() -> None:
    """Channels scaled up and the weights' columns divided: the function is the same, and their error counts less than it looks."""
    model, x = network(), samples(False)
    factor = torch.ones(96)
    factor[[5, 40, 77]] = 40
    weight = dict(model.graph.named_parameters())["0.weight"]
    weight.data = weight.data / factor
    found = {c: error(run(Ovp(criterion=c, layers=("0",), bits=8), model, x * factor), model, x * factor) for c in ("values", "outputs")}  # fmt: skip
    assert found["outputs"] < 0.7 * found["values"]


def test_weights_alone_need_no_data_and_the_receipt_says_what_was_done() -> None:
    model = network()
    made = run(Ovp(activations=None, grid="flint"), model, None)
    entry = made.receipt[0]
    assert entry.action == "quantized" and entry.error is not None and entry.error < 0.15
    assert entry.reason.startswith("outlier-victim pairs, flint4; ") and "% of pairs hold an outlier" in entry.reason
    assert entry.after_bytes == 96 * 64 // 2 + 64 * 4
    with pytest.raises(PlanishError, match=r"quantize\.ovp as configured calibrates on data"):
        run(Ovp(), model, None)


def test_the_same_input_gives_the_same_codes_and_zero_rows_stay_zero() -> None:
    model, x = network(), samples(True)
    weight = dict(model.graph.named_parameters())["0.weight"]
    weight.data[3] = 0
    first, second = (dict(run(Ovp(), model, x).graph.named_buffers()) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert first["0.weight_scale"][3] == 1 and not first["0.weight_codes"][3].any()


def test_a_layer_with_odd_inputs_is_named() -> None:
    with pytest.raises(
        PlanishError, match="layer '0': outlier-victim pairs need an even number of input columns; it has 7"
    ):
        run(Ovp(), network(7), samples(False, inputs=7))


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 8, "grid": "flint", "activations": None},
        {"unpacked": True, "grid": "flint"},
        {"unpacked": True, "bits": 8},
    ],
)
def test_fields_that_contradict_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"flint grid has 4 bits|unpacked weights take"):
        Ovp(**fields)


@pytest.mark.parametrize("unpacked", [False, True])
def test_the_recipe_runs_in_integers_in_onnx_runtime(unpacked: bool, tmp_path: Any) -> None:
    (step,) = [s for _, s in recipe.load("ovp-w4a4").passes]
    assert isinstance(step, Ovp)
    made = run(step.model_copy(update={"unpacked": unpacked}), network(), samples(True))
    proto = to_onnx(made)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    runs = optimized(tmp_path / "m.onnx")
    assert float_weight_bytes(runs) == 0
    assert sum("MatMulInteger" in n.op_type for n in runs.graph.node) == 2
    x = samples(True)
    with torch.no_grad():
        want = made(x)
    got = ort.run(ort.create(proto.SerializeToString(), 1), {"x": x.numpy()})["output"]
    assert np.array_equal(got, np.asarray(want))
