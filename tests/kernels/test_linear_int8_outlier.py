"""LLM.int8() as an op: the figures of its card, exact equalities at the limits, the counter, and the ONNX form."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from planish.common.errors import PlanishError
from planish.kernels import linear_int8_outlier as op
from planish.kernels.fused import Builder, Call

OUTLIERS = 8


def layer(seed, out=512, inputs=512, rows=1024, factor=30.0):
    """The synthetic layer of the card: W normal(0, 0.02), x normal with eight channels times thirty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator) * 0.02
    x = torch.randn(rows, inputs, generator=generator)
    columns = torch.randperm(inputs, generator=generator)[:OUTLIERS].sort().values
    x[:, columns] *= factor
    return x, weight, columns


def run(x, weight, columns=None, exact=False, bias=None, threshold=6.0, dynamic=True, samples=-1):
    codes, scale = op.quantize_rows(weight)
    stored = weight[:, columns].half() if exact else None
    return torch.ops.planish.linear_int8_outlier(
        x, codes, scale, columns, stored, bias, threshold, dynamic, samples
    )  # fmt: skip


def error(y, x, weight):
    exact = x.double() @ weight.double().T
    return float((y - exact).norm() / exact.norm())


def per_tensor(x, weight):
    """Plain int8 with one scale for x and one for the weight."""
    a, b = x.abs().max() / 127, weight.abs().max() / 127
    return (torch.round(x / a) @ torch.round(weight / b).T) * a * b


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_decomposition_is_as_much_better_as_its_card_says(seed):
    """METHODS A2 (c): 0.072 to 0.079 per tensor, 0.033 to 0.034 vector-wise, 0.0027 with float and 0.0078 with int8 outlier weights."""
    x, weight, columns = layer(seed)
    tensor = error(per_tensor(x, weight), x, weight)
    vector = error(run(x, weight, threshold=float("inf"))[0], x, weight)
    paper = error(run(x, weight, columns, exact=True)[0], x, weight)
    restored = error(run(x, weight)[0], x, weight)
    assert 0.07 < tensor < 0.08
    assert 0.032 < vector < 0.035
    assert paper < 0.0033
    assert 0.0075 < restored < 0.0082
    assert paper <= vector / 8
    assert restored <= vector / 3
    hot = (x.abs() >= 6).any(0).nonzero().flatten()
    assert torch.equal(hot, columns)


def test_without_values_at_the_threshold_it_is_plain_vector_wise_int8_bit_for_bit():
    x, weight, _ = layer(3, out=48, inputs=1100, rows=33, factor=1.0)
    x = x.clamp(-5.9, 5.9)
    codes, scale = op.quantize_rows(weight)
    peak = x.abs().amax(1, keepdim=True)
    integer = torch.round(x * (127 / peak)).to(torch.int64)
    sums = (integer @ codes.long().T).float()  # int64 sums: nothing is lost
    plain = sums * (peak / 127) * scale
    y, beyond = run(x, weight)
    assert torch.equal(y, plain)
    assert beyond.tolist() == [0]
    x[5, 7] = 6.0  # the threshold itself counts
    assert not torch.equal(run(x, weight)[0], plain)
    assert run(x, weight)[1].tolist() == [1]


def test_frozen_columns_give_the_same_bits_as_the_dynamic_ones_when_the_sets_agree():
    x, weight, columns = layer(4, rows=64)
    for exact in (False, True):
        dynamic, _ = run(x, weight, columns, exact)
        frozen, beyond = run(x, weight, columns, exact, dynamic=False)
        assert torch.equal(dynamic, frozen)
        assert beyond.tolist() == [0]


def test_values_below_the_threshold_in_an_outlier_column_count_for_the_scale():
    weight = torch.eye(4)
    x = torch.tensor([[7.0, 1.0, 0.5, 0.25], [5.0, 1.0, 0.5, 0.25]])
    y, _ = run(x, weight)
    assert y[0].tolist() == pytest.approx([7.0, 1.0, 0.5, 0.25], abs=0.5 / 127)
    assert y[1, 1] == torch.round(torch.tensor(127 / 5.0)) * 5 / 127  # the 5 set the scale


def test_values_beyond_the_threshold_outside_of_the_frozen_columns_are_counted_and_not_clipped():
    x, weight, columns = layer(5, rows=16)
    x = x.reshape(4, 4, -1)
    other = next(k for k in range(512) if k not in columns)
    x[2, 1, other], x[3, 0, other], x[3, 3, other] = 40.0, -6.0, 5.99
    y, beyond = run(x, weight, columns, True, dynamic=False, samples=0)
    assert beyond.tolist() == [0, 0, 1, 1]
    assert run(x.transpose(0, 1), weight, columns, True, dynamic=False, samples=1)[1].tolist() == [0, 0, 1, 1]
    assert run(x, weight, columns, True, dynamic=False)[1].tolist() == [2]
    assert error(y.flatten(0, 1), x.flatten(0, 1), weight) < 0.02


def test_zero_rows_and_values_beyond_float16_stay_finite():
    x = torch.zeros(3, 6)
    x[1, 2], x[2, 2] = 1e5, -70000.0
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    for dynamic in (True, False):
        y, beyond = run(x, weight, torch.tensor([2]), True, torch.ones(5), dynamic=dynamic)
        assert torch.equal(y[0], torch.ones(5))
        assert torch.isfinite(y).all()
        assert torch.allclose(y, x @ weight.T + 1, rtol=1e-3)
        assert beyond.tolist() == [0]


def lowered(weight, columns, exact, bias, samples, rank, dynamic=False):
    graph = onnx.GraphProto(name="linear")
    shape = [f"d{i}" for i in range(rank - 1)]
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [*shape, weight.shape[1]]))
    builder = Builder(graph, {})
    codes, scale = op.quantize_rows(weight)
    given = {"codes": codes, "scale": scale, "columns": columns, "bias": bias}
    given["outlier_weight"] = weight[:, columns].half() if exact else None
    tensors = {"x": "x"} | {n: builder.constant(f"layer.{n}", t.numpy()) for n, t in given.items() if t is not None}
    call = Call("layer", tensors, {"threshold": 6.0, "dynamic": int(dynamic), "samples": samples})
    names = op.LinearInt8Outlier().lower(call, builder)
    graph.node.extend(builder.nodes)
    graph.output.append(helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [*shape, len(weight)]))
    graph.output.append(helper.make_tensor_value_info(names[1], TensorProto.INT64, ["n"]))
    used = {i for n in graph.node for i in n.input}
    for item in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(item)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (2, 1, 33), (4, 1100)])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [0, 3])
def test_the_onnx_form_equals_the_reference(shape, exact, count):
    generator = torch.Generator().manual_seed(len(shape) + count)
    x = torch.randn(shape, generator=generator)
    weight, bias = torch.randn(17, shape[-1], generator=generator), torch.randn(17, generator=generator)
    columns = torch.randperm(shape[-1], generator=generator)[:count].sort().values
    x[..., columns] *= 30
    x[..., 11] *= 5
    for samples in (-1, 0, len(shape) - 2):
        model = lowered(weight, columns, exact, bias if exact else None, samples, len(shape))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        y, beyond = session.run(None, {"x": x.numpy()})
        expected, counted = run(x, weight, columns, exact, bias if exact else None, dynamic=False, samples=samples)
        np.testing.assert_allclose(y, expected.numpy(), rtol=2e-6, atol=2e-5)
        assert beyond.tolist() == counted.tolist()


@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (2, 1, 33)])
@pytest.mark.parametrize("gain", [1, 30])
@pytest.mark.parametrize("stored", [True, False])
def test_the_onnx_form_with_columns_found_at_every_call_equals_the_reference(shape, gain, stored):
    """With no outlier at all the gathered product has no column: it must give zeros."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator).clamp(-5, 5)
    weight, bias = torch.randn(17, shape[-1], generator=generator), torch.randn(17, generator=generator)
    x[..., [2, 9, 11]] *= gain
    columns = torch.tensor([9, 20]) if stored else None
    for samples in (-1, 0):
        model = lowered(weight, columns, False, bias, samples, len(shape), True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        y, beyond = session.run(None, {"x": x.numpy()})
        expected, counted = run(x, weight, columns, False, bias, samples=samples)
        np.testing.assert_allclose(y, expected.numpy(), rtol=2e-6, atol=2e-5)
        assert beyond.tolist() == counted.tolist()


def test_onnx_runtime_keeps_the_weight_in_eight_bits(tmp_path):
    x, weight, columns = layer(0, rows=4)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = lowered(weight, columns, True, None, 0, 2)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": x.numpy()})
    optimized = onnx.load(options.optimized_model_filepath)
    floats = [i for i in optimized.graph.initializer if i.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    assert max(int(np.prod(i.dims)) for i in floats) == OUTLIERS * 512  # the thin branch, widened
    assert sum(len(i.raw_data) for i in optimized.graph.initializer) < weight.numel() * 1.2


def test_columns_found_at_run_time_beside_exact_ones_have_no_onnx_form():
    tensors = {"x": "x", "codes": "c", "scale": "s", "outlier_weight": "o"}
    call = Call("fc", tensors, {"threshold": 6.0, "dynamic": 1, "samples": 0})
    builder = Builder(onnx.GraphProto(), {"c": np.zeros((2, 2), np.int8), "s": np.ones(2, np.float32)})
    with pytest.raises(PlanishError, match=r"layer 'fc'.*found at run time"):
        op.LinearInt8Outlier().lower(call, builder)
