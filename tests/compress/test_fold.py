import numpy as np
import onnx
import pytest
import torch
from planish.compress.fold import canonicalize, fold_batch_norm
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export import qdq
from planish.export.lowering import to_onnx
from planish.export.onnx import HEAVY, optimized
from planish.runtimes import ort
from planish.targets import target
from torch import nn


def targets(model):
    return [str(n.target) for n in model.graph.graph.nodes if n.op == "call_function"]


def test_folding_changes_no_output(residual):
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norm(canonicalize(residual))
    assert not any("batch_norm" in t for t in targets(folded))
    torch.testing.assert_close(folded(x), residual(x), rtol=1e-5, atol=1e-5)


def test_the_model_given_is_not_changed(residual):
    before = targets(residual)
    fold_batch_norm(canonicalize(residual))
    assert targets(residual) == before


class PreActivation(nn.Module):
    """Batch norm in front of its convolution, as in pre-activation residual networks and DenseNet."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, image):
        x = self.first(image)
        return x + self.second(torch.relu(self.bn(x)))


def pre_activation():
    torch.manual_seed(0)
    net = PreActivation()
    with torch.no_grad():
        net(torch.randn(64, 3, 16, 16))  # running statistics
        net.bn.weight.uniform_(0.5, 1.5)
        net.bn.bias.normal_()
    return trace(net.eval(), {"image": torch.zeros(1, 3, 16, 16)}, "net")


def test_a_batch_norm_of_its_own_becomes_a_depthwise_convolution():
    model = pre_activation()
    folded = fold_batch_norm(model)
    assert not any("batch_norm" in t for t in targets(folded))
    assert targets(folded).count("aten.conv2d.default") == 3
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_pre_activation_networks_run_in_integers(images, tmp_path):
    model = pre_activation()
    result = Static().apply(model, Context(model, images, target.load("host"), torch.Generator().manual_seed(0)))
    proto = to_onnx(result)
    onnx.save(proto, tmp_path / "m.onnx")
    assert not {n.op_type for n in optimized(tmp_path / "m.onnx").graph.node} & set(HEAVY)
    x = images.inputs["image"]
    got = ort.run(ort.create(proto.SerializeToString(), 1), {"image": x})["output"]
    assert np.array_equal(qdq.read(proto).reference({"image": x})["output"], got)


@pytest.mark.parametrize("shape", [(4,), (4, 6)])
def test_a_batch_norm_on_features_or_a_sequence_becomes_one_too(shape):
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Sigmoid())
    net(torch.randn(64, *shape))
    model = trace(net.eval(), {"input": torch.zeros(1, *shape)}, "net")
    folded = fold_batch_norm(model)
    assert not any("batch_norm" in t for t in targets(folded))
    x = torch.randn(4, *shape)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_equal_meanings_get_one_spelling():
    class Net(nn.Module):
        def forward(self, x):
            a = x.mean((2, 3), keepdim=True)
            b = nn.functional.avg_pool2d(x, 4)
            return nn.functional.silu(a + b)

    model = canonicalize(trace(Net(), {"x": torch.zeros(1, 3, 4, 4)}, "net"))
    found = targets(model)
    assert found.count("aten.adaptive_avg_pool2d.default") == 2
    assert "aten.sigmoid.default" in found and "aten.silu.default" not in found
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), Net()(x))
