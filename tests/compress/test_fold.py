import torch
from planish.compress.fold import canonicalize, fold_batch_norm
from planish.compress.model import trace
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


def test_a_batch_norm_without_a_layer_of_its_own_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(self.bn(x))

    model = trace(Net(), {"x": torch.zeros(1, 3, 4, 4)}, "net")
    assert any("batch_norm" in t for t in targets(fold_batch_norm(model)))


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
