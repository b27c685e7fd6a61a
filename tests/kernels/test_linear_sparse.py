"""planish::linear_sparse: exactly two of four, the stored bytes, and the same numbers in ONNX Runtime and TVM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from planish.export.onnx import float_weight_bytes, optimized, weight_bytes
from planish.kernels.fused import Call
from planish.kernels.linear_sparse import (
    LinearSparse,
    choose,
    decode,
    encode,
    linear_sparse,
    pack,
    place,
    take,
    unpack,
)
from planish.runtimes import ort

FORMS = [(16, 16), (8, 16), (8, 8)]
SHAPES = [(20, 64), (1, 4), (33, 132), (5, 12)]


def layer(out: int, inputs: int, bits: int, biased: bool = True) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(out, inputs, generator=generator)
    positions = choose(weight.abs())
    values, scale = encode(weight, positions, bits)
    bias = torch.randn(out, generator=generator) if biased else None
    return {"values": values, "positions": pack(positions), "scale": scale, "bias": bias}


def reference(x: torch.Tensor, t: dict[str, Any], activation_bits: int) -> torch.Tensor:
    return linear_sparse(x, t["values"], t["positions"], t["scale"], t["bias"], activation_bits)


def test_the_two_largest_of_each_group_stay_and_the_first_of_equal_ones() -> None:
    weight = torch.tensor([[3.0, -1, 2, -4, 0, 0, 0, 0], [1, 1, 1, 1, 0, 5, 0, -5]])
    positions = choose(weight.abs())
    assert positions.tolist() == [[[0, 3], [0, 1]], [[0, 1], [1, 3]]]
    assert place(take(weight, positions), positions).tolist() == [[3, 0, 0, -4, 0, 0, 0, 0], [1, 1, 0, 0, 0, 5, 0, -5]]


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_positions_come_back_and_take_four_bits_a_group(out: int, inputs: int) -> None:
    score = torch.rand(out, inputs, generator=torch.Generator().manual_seed(0))
    positions = choose(score)
    packed = pack(positions)
    assert packed.shape == (out, math.ceil(inputs / 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, inputs // 4), positions)
    kept = place(torch.ones(out, inputs // 2), positions)
    assert torch.equal(kept.unflatten(1, (-1, 4)).sum(-1), torch.full((out, inputs // 4), 2.0))
    dropped = score[kept == 0].view(out, -1, 2).amax(-1)
    assert (dropped <= score[kept == 1].view(out, -1, 2).amin(-1)).all()


def test_bytes_are_nine_sixteenths_of_float16_and_five_eighths_of_int8() -> None:
    for bits, share in ((16, 9 / 16), (8, 5 / 8)):
        t = layer(32, 256, bits, biased=False)
        size = sum(t[n].numel() * t[n].element_size() for n in ("values", "positions"))
        assert size == 32 * 256 * bits / 8 * share


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_kept_is_rounded_and_the_rest_is_zero(bits: int) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 24)[:, None]
    weight[3] = 0
    positions = choose(weight.abs())
    values, scale = encode(weight, positions, bits)
    back = decode(values, pack(positions), scale)
    kept = place(torch.ones(24, 32), positions) == 1
    step = weight.abs().amax(1, keepdim=True) / 127 if bits == 8 else weight.abs() * 2.0**-10
    assert ((back - weight).abs()[kept] <= (step.expand_as(weight)[kept] * 0.501)).all()
    assert not back[~kept].any() and not back[3].any()


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
@pytest.mark.parametrize(("bits", "activation_bits"), FORMS)
def test_onnx_runtime_computes_the_reference(
    lowered: Any, bits: int, activation_bits: int, out: int, inputs: int
) -> None:
    t = layer(out, inputs, bits, biased=out != 20)
    proto = lowered("linear_sparse", t, {"activation_bits": activation_bits})
    session = ort.create(proto.SerializeToString(), 1)
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3):
        x = torch.randn(batch, 4, inputs, generator=generator) * torch.logspace(-3, 3, 4)[:, None]
        x[0, 2] = 0
        want = reference(x, t, activation_bits).numpy()
        got = ort.run(session, {"x": x.numpy()})["y"]
        assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()


@pytest.mark.parametrize(("bits", "activation_bits"), FORMS)
def test_the_weight_stays_sparse_in_the_graph_that_runs(
    lowered: Any, bits: int, activation_bits: int, tmp_path: Any
) -> None:
    t = layer(128, 256, bits, biased=False)
    attributes = {"activation_bits": activation_bits}
    (tmp_path / "m.onnx").write_bytes(lowered("linear_sparse", t, attributes).SerializeToString())
    runs = optimized(tmp_path / "m.onnx")
    tables = 2 * 256 * 8 * 4
    stored = 128 * 128 * bits // 8 + 128 * 32 + (128 * 4 if bits == 8 else 0)
    assert float_weight_bytes(runs) <= tables
    assert stored <= weight_bytes(runs) <= stored + tables + 64
    reason = LinearSparse().slow(Call("fc", {}, attributes))
    assert reason is not None and "in every call" in reason


@pytest.mark.parametrize(("bits", "activation_bits"), FORMS)
def test_tvm_computes_the_reference(bits: int, activation_bits: int) -> None:
    tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from onnx import TensorProto, helper, numpy_helper
    from planish.export import tvm_import
    from planish.export.tvm import compile_model
    from planish.runtimes.tvm import bound_main
    from planish.targets import target

    t = layer(13, 68, bits)
    x = torch.randn(2, 5, 68, generator=torch.Generator().manual_seed(2))
    names = ("values", "positions", "scale", "bias")
    given = ["x", *(n if t[n] is not None else "" for n in names)]
    node = helper.make_node(
        "linear_sparse", given, ["y"], name="layer", domain="planish", activation_bits=activation_bits
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 68])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(v.numpy(), n) for n, v in t.items() if v is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("planish", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    compiled = compile_model(tvm_import.fix_batch(proto), target.load("host"), {})
    machine = tvm.relax.VirtualMachine(compiled.executable, tvm.cpu())
    got = bound_main(machine)(tvm.runtime.tensor(x.numpy())).numpy()
    want = reference(x, t, activation_bits).numpy()
    assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()
