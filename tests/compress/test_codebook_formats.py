"""The passes nf4, fp4, mxfp4, nvfp4 and fp8: what is stored, how much it errs, and their faults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import recipe
from planish.compress.model import Model, trace
from planish.compress.passes import Context, Pass
from planish.compress.quantize.fp8 import Fp8
from planish.compress.quantize.mxfp4 import Mxfp4
from planish.compress.quantize.nf4 import Nf4
from planish.compress.quantize.nvfp4 import Nvfp4
from planish.export.lowering import to_onnx
from planish.runtimes import ort
from planish.targets import target
from torch import nn

WEIGHTS = 96 * 64
BYTES = {
    "nf4": WEIGHTS // 2 + WEIGHTS // 64 * 4,
    "fp4": WEIGHTS // 2 + WEIGHTS // 64 * 4,
    "mxfp4": WEIGHTS // 2 + WEIGHTS // 32,
    "nvfp4": WEIGHTS // 2 + WEIGHTS // 16 + 4,
    "fp8": WEIGHTS + 64 * 4,
}
ERROR = {"nf4": 0.11, "fp4": 0.14, "mxfp4": 0.14, "nvfp4": 0.11, "fp8": 0.03}


def network(inputs: int = 96) -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    return trace(module, {"x": torch.zeros(2, inputs)}, "mlp")


def run(step: Pass, model: Model) -> Model:
    return step.apply(model, Context(model, None, target.load("host"), torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", list(BYTES))
def test_the_recipe_stores_what_the_format_says_and_computes_it_in_onnx_runtime(name: str) -> None:
    (step,) = [s for _, s in recipe.load(name).passes]
    model = network()
    made = run(step, model)
    entry = made.receipt[0]
    assert (entry.tensor, entry.action, entry.after_bytes) == ("0.weight", "quantized", BYTES[name])
    assert entry.reason.startswith(name) and entry.error is not None and 0 < entry.error < ERROR[name]
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, original = made(x), model(x)
    assert isinstance(want, torch.Tensor) and isinstance(original, torch.Tensor)
    assert (want - original).norm() / original.norm() < 2 * ERROR[name]
    got = ort.run(ort.create(to_onnx(made).SerializeToString(), 1), {"x": x.numpy()})["output"]
    assert np.abs(got - want.numpy()).max() < 1e-5 * np.abs(want.numpy()).max()


def test_fields_change_what_is_stored() -> None:
    model = network()
    nested = run(Nf4(nested=True), model).receipt[0]
    assert nested.after_bytes == WEIGHTS // 2 + WEIGHTS // 64 + 4 + 4 and "scales in 8 bits" in nested.reason
    coarse, fine = (run(Nf4(block=b), model).receipt[0].error for b in (1024, 32))
    assert coarse is not None and fine is not None and fine < coarse
    e4m3, e5m2 = (run(Fp8(format=f), model).receipt[0].error for f in ("e4m3", "e5m2"))
    assert e4m3 is not None and e5m2 is not None and e4m3 < 0.6 * e5m2


@pytest.mark.parametrize(("step", "block"), [(Mxfp4(), 32), (Nvfp4(), 16)])
def test_a_row_that_does_not_fill_blocks_is_named(step: Pass, block: int) -> None:
    with pytest.raises(PlanishError, match=f"layer '0': .* scales {block} inputs together; it has 40 inputs") as caught:
        run(step, network(40))
    assert "\n" not in str(caught.value)
    left = run(type(step)(skip=("0",)), network(40))
    assert [e.action for e in left.receipt] == ["left", "quantized"]


@pytest.mark.parametrize("name", list(BYTES))
def test_bad_weights_are_named_and_zero_rows_stay_zero(name: str) -> None:
    (step,) = [s for _, s in recipe.load(name).passes]
    model = network()
    weight: Any = dict(model.graph.named_parameters())["0.weight"]
    weight.data[:] = 0
    with torch.no_grad():
        made, bias = run(step, model), dict(model.graph.named_parameters())["0.bias"]
        want = torch.relu(bias) @ dict(model.graph.named_parameters())["2.weight"].T
        got = made(torch.ones(2, 96))
    assert isinstance(got, torch.Tensor) and got.isfinite().all()
    assert (got - want).norm() < 0.2 * want.norm() * 2**0.5
    weight.data[3, 5] = float("nan")
    with pytest.raises(PlanishError, match="layer '0': its weight has 1 NaN or Inf values"):
        run(step, model)
