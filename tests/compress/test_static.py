"""Static quantization: where the pairs go, what stays float and says so, and how close the result is."""

import dataclasses

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.observers import BINS, Statistics, choose
from planish.compress.quantize.static import Static
from planish.targets import target
from torch import nn


def error_db(model, reference, images):
    x = torch.from_numpy(images.inputs["image"])
    with torch.no_grad():
        want, got = reference(x), model(x)
    return float(10 * torch.log10((want**2).sum() / ((got - want) ** 2).sum()))


def test_quantized_model_is_close_and_small(residual, quantized, images):
    assert error_db(quantized, residual, images) > 30
    assert quantized.bytes() < 0.35 * residual.bytes()


def test_every_weight_is_integer_and_in_the_receipt(quantized):
    assert not dict(quantized.graph.named_parameters())
    assert {b.dtype for n, b in quantized.graph.named_buffers() if n.endswith("weight_codes")} == {torch.int8}
    assert {b.dtype for n, b in quantized.graph.named_buffers() if n.endswith("bias_codes")} == {torch.int32}
    done = {e.tensor for e in quantized.receipt if e.action == "quantized"}
    assert {"stem.weight", "depthwise.weight", "head.bias", "image"} <= done


def test_no_float_arithmetic_is_left_between_the_pairs(quantized):
    """Every arithmetic op reads dequantized tensors only, and a quantize reads its result, a clip apart."""
    arithmetic = ("conv2d", "linear", "add", "cat", "adaptive_avg_pool2d")
    for node in quantized.graph.graph.nodes:
        if node.op == "call_function" and node.target._opname in arithmetic:
            assert all(a.target is torch.ops.planish.dequantize.default for a in node.all_input_nodes), node
            reader = next(iter(node.users))
            if reader.target._opname in ("relu", "hardtanh", "relu6"):
                reader = next(iter(reader.users))
            assert reader.target is torch.ops.planish.quantize.default, node


def test_moved_tensors_keep_the_codes_of_their_source(quantized):
    """Slice, pad and max pool read and write with one scale and zero point."""
    for node in quantized.graph.graph.nodes:
        if node.op == "call_function" and node.target._opname in ("slice", "pad", "max_pool2d"):
            source = node.args[0]
            while source.target is not torch.ops.planish.dequantize.default:
                source = source.args[0]
            reader = next(iter(node.users))
            while reader.target is not torch.ops.planish.quantize.default:
                reader = next(iter(reader.users))
            assert [str(a.target) for a in source.args[1:3]] == [str(a.target) for a in reader.args[1:3]]


class Twice(nn.Module):
    """One layer called on two inputs of very different scale."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, image):
        return self.conv(image) + self.conv(image * 0 + torch.sigmoid(image))


def quantized_by(model, data, **fields):
    return Static(**fields).apply(model, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))


def test_bias_correction_restores_the_mean_output(images):
    """All weights a little above a code: rounding shifts every output one way, and correction takes that back."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.fill_(0.4 / 127)
            layer.weight[:, 0, 0, 0] = 1.0
    model = trace(net, {"input": torch.zeros(1, 3, 16, 16)}, "net")
    data = Data({"input": images.inputs["image"] + 1}, None, "images")
    x = torch.from_numpy(data.inputs["input"])
    with torch.no_grad():
        want = model(x).mean((0, 2, 3))
        shifts = [
            float((quantized_by(model, data, bias_correction=b)(x).mean((0, 2, 3)) - want).abs().mean())
            for b in (False, True)
        ]
    assert shifts[1] < 0.5 * shifts[0]


def test_a_layer_used_twice_keeps_both_biases(images):
    """Each use has its own bias at its own scale: the result is as close as for any other layer, and fuses."""
    model = trace(trained_net(Twice()), {"image": torch.zeros(1, 3, 16, 16)}, "twice")
    result = quantized_by(model, images)
    assert error_db(result, model, images) > 30
    scales = {n: b for n, b in result.graph.named_buffers() if "bias" in n and n.endswith("_scale")}
    assert len(scales) == 2


def trained_net(net, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn_like(value) * 0.2)
    return net.eval()


def test_probabilities_have_the_scale_that_runtimes_can_carry(images):
    """Small probabilities must not shrink the scale of softmax: ONNX Runtime overflows below about 1 / (148 n)."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10), nn.Softmax(1))
    with torch.no_grad():
        net[3].weight *= 0.01
    model = trace(net, {"input": torch.zeros(1, 3, 16, 16)}, "net")
    data = Data({"input": images.inputs["image"]}, None, "images")
    result = quantized_by(model, data)
    x = data.inputs["input"]
    from planish.export.lowering import to_onnx
    from planish.runtimes import ort

    got = ort.run(ort.create(to_onnx(result).SerializeToString(), 1), {"input": x})["output"]
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()
    assert np.abs(got - want).max() < 2 / 256


@pytest.mark.parametrize("padding, kernel", [("same", 3), ("same", 4), ("valid", 3)])
def test_padding_by_name_is_quantized_like_any_other(images, padding, kernel):
    net = nn.Sequential(nn.Conv2d(3, 8, kernel, padding=padding, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model = trace(net, {"input": torch.zeros(1, 3, 16, 16)}, "net")
    data = Data({"input": images.inputs["image"]}, None, "images")
    result = quantized_by(model, data)
    assert not dict(result.graph.named_parameters())
    x = torch.from_numpy(images.inputs["image"])
    with torch.no_grad():
        assert float((result(x) - model(x)).norm() / model(x).norm()) < 0.02


def test_what_it_cannot_quantize_is_refused_in_one_line(residual, quantized, images):
    cases = [
        (quantized, images, {}, "quantized already"),
        (residual, images, {"skip": ("nothing.*",)}, "matches no layer"),
        (trace(nn.Conv2d(3, 4, 1).double(), {"input": torch.zeros(1, 3, 4, 4).double()}, "net"), images, {}, "float64"),
        (trace(Root(), {"image": torch.zeros(1, 3, 16, 16)}, "net"), images, {}, "NaN or Inf"),
    ]
    for model, data, fields, message in cases:
        with pytest.raises(PlanishError, match=message):
            quantized_by(model, data, **fields)


class Root(nn.Module):
    """NaN for finite inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, image):
        return self.conv(torch.log(image))


def test_skipped_and_unknown_layers_stay_float_with_a_reason(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.second = nn.Conv2d(8, 8, 3)

        def forward(self, image):
            return torch.cumsum(self.second(torch.relu(self.first(image))), 1)

    model = trace(Net(), {"image": torch.zeros(1, 3, 16, 16)}, "net")
    context = Context(model, images, target.load("host"), torch.Generator())
    result = Static(skip=("first",)).apply(model, context)
    left = {e.tensor: e.reason for e in result.receipt if e.action == "left"}
    assert "skipped by the recipe" in left["first.weight"]
    assert any("cumsum" in reason for reason in left.values())
    assert "first.weight" in dict(result.graph.named_parameters())


def test_same_seed_same_bytes(residual, images, context):
    results = [
        Static(samples=32).apply(residual, dataclasses.replace(context, generator=torch.Generator().manual_seed(3)))
        for _ in range(2)
    ]
    first, second = (dict(r.graph.named_buffers()) for r in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def statistics(values):
    low, high = float(values.min()), float(values.max())
    return Statistics(low, high, torch.histc(values, BINS, low, high).double())


def test_observers_order_on_a_tensor_with_outliers():
    """A few large values: min-max keeps them, percentile and least error cut; least error has the least error."""
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[:5] = 100.0
    stats = statistics(values)
    ranges = {name: choose(stats, name, 99.9, 256) for name in ("minmax", "percentile", "mse")}
    assert ranges["minmax"][1] == 100.0
    assert ranges["percentile"][1] < 5
    errors = {}
    for name, (low, high) in ranges.items():
        scale = (high - low) / 255
        zero = round(-low / scale)
        codes = torch.clamp(torch.round(values / scale) + zero, 0, 255)
        errors[name] = float((((codes - zero) * scale - values) ** 2).mean())
    assert errors["mse"] <= min(errors.values()) * 1.001


@pytest.mark.parametrize("values", [torch.zeros(10), torch.full((10,), 3.0), torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_a_range_always_contains_zero(values, observer):
    low, high = choose(statistics(values), observer, 99.99, 256)
    assert low <= 0 <= high


def test_constant_activations_are_quantized_without_failure(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

        def forward(self, image):
            return self.conv(image)

    model = trace(Net(), {"image": torch.zeros(1, 3, 16, 16)}, "net")
    data = Data({"image": np.zeros((4, 3, 16, 16), np.float32)}, None, "zeros")
    result = Static().apply(model, Context(model, data, target.load("host"), torch.Generator()))
    assert torch.equal(result(torch.zeros(2, 3, 16, 16)), torch.zeros(2, 4, 16, 16))


def test_an_almost_dead_channel_leaves_room_for_its_bias(images):
    """Tiny weights beside a large bias: the bias keeps its value instead of saturating in 32 bits."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        net[0].weight[0] *= 1e-9
        net[0].bias[0] = 5.0
    model = trace(net, {"input": torch.zeros(1, 3, 16, 16)}, "net")
    data = Data({"input": images.inputs["image"]}, None, "images")
    result = Static().apply(model, Context(model, data, target.load("host"), torch.Generator()))
    codes = dict(result.graph.named_buffers())["0.bias_codes"]
    assert codes.abs().max() <= 2**30 + 1
    x = torch.from_numpy(images.inputs["image"][:4])
    assert float((result(x)[:, 0] - 5.0).abs().max()) < 0.05
