"""Channel pruning removes what belongs together, computes the same as the masked original, and meets its goal."""

from __future__ import annotations

import numpy as np
import pydantic
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import cost, layers
from planish.compress.data import Data
from planish.compress.model import Model, trace
from planish.compress.passes import Context
from planish.compress.prune.channels import Channels, remove, renewed
from planish.compress.prune.dependency import analyse
from planish.kernels import affine  # noqa: F401  (defines the quantize op)
from planish.targets import target
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(inputs: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two stages, the second entered by every second pixel and channels of zeros (ResNet's option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.first = nn.Sequential(conv_bn(8, 8), conv_bn(8, 8))
        self.second = nn.Sequential(conv_bn(8, 16, 2), conv_bn(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.second(x)
        return self.head(functional.avg_pool2d(x, x.shape[3]).view(x.shape[0], -1))


class Dense(nn.Module):
    """Concatenations, and a flatten that repeats every channel 16 times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 8), conv_bn(8, 8), conv_bn(16, 8)
        self.head = nn.Linear(24 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(x)], 1)
        x = functional.max_pool2d(torch.cat([self.c(x), x], dim=1), 2)
        return self.head(x.reshape(-1, 24 * 16))


class Mobile(nn.Module):
    """Depthwise convolution with a squeeze-and-excite gate, a multiplier of two, and a slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise, self.wide = (
            conv_bn(3, 16, kernel=1),
            conv_bn(16, 16, groups=16),
            conv_bn(16, 32, groups=16),
        )
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.slope = conv_bn(32, 8, kernel=1), nn.PReLU(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1))))
        x = self.wide(x * torch.sigmoid(gate))
        return self.head(self.slope(self.project(x)).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolution (ResNeXt), its groups stay equal; then a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 16), conv_bn(16, 24, groups=4), conv_bn(24, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.relu(self.up(self.c(self.b(self.a(x))))))


class Split(nn.Module):
    """Halves of one convolution take different ways; a gated unit; a slice of channels; channels last in a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.gated = conv_bn(3, 16), conv_bn(8, 8), conv_bn(16, 16)
        self.head = nn.Linear(12 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        u, v = torch.split(self.gated(torch.cat([self.left(a), b], 1)), [8, 8], dim=1)
        x = torch.cat([u * v, b[:, 2:6]], 1)
        return self.head(x.permute(0, 2, 3, 1).flatten(1))


class Mlp(nn.Module):
    """A transformer's feed-forward part: the hidden features may go, what a layer norm sees may not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(functional.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Shared(nn.Module):
    """One convolution called twice: its outputs become its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same, self.head = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.same(functional.relu(self.same(self.stem(x)))))
        return self.head(x.amax((2, 3)))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 8, 8)),
    "dense": (Dense, (3, 8, 8)),
    "mobile": (Mobile, (3, 8, 8)),
    "grouped": (Grouped, (3, 8, 8)),
    "split": (Split, (3, 8, 8)),
    "mlp": (Mlp, (5, 8)),
    "shared": (Shared, (3, 8, 8)),
}


def network(name: str) -> Model:
    kind, shape = NETS[name]
    torch.manual_seed(0)
    module = kind()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(part.running_var, 0.5, 1.5)  # pyright: ignore[reportArgumentType]
    return trace(module, {"x": torch.zeros(2, *shape)}, name)


def context(model: Model, data: Data | None = None) -> Context:
    return Context(model, data, target.load("x86-avx512-vnni"), torch.Generator().manual_seed(0))


def samples(model: Model, n: int = 24) -> Data:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, *model.inputs[0].shape[1:])).astype(np.float32)
    return Data({"x": x}, rng.integers(0, 3, n), "random")


@pytest.mark.parametrize("name", NETS)
def test_removal_equals_zeroed_producers(name: str) -> None:
    """Whatever half of the groups goes: the smaller network answers as the old one whose removed channels are zero."""
    model = network(name)
    pruned = model.copy()
    found = analyse(pruned)
    free = sorted({found.group(u) for units in found.axes.values() for u in units} - set(found.protected()))
    removed = set(free[::2])
    assert len(free) > 3
    masked = model.copy()
    for (tensor, axis), units in found.axes.items():
        if (tensor, axis) not in found.consumers:
            gone = torch.tensor([i for i, u in enumerate(units) if found.group(u) in removed], dtype=torch.long)
            layers.tensor(masked.graph, tensor).data.index_fill_(axis, gone, 0)
    remove(found, removed)
    result = renewed(pruned)
    assert result.parameters() < model.parameters()
    for batch in (1, 4):
        x = torch.randn(batch, *model.inputs[0].shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(result(x), masked(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_goal_is_met_and_counts_are_multiples(name: str, ranking: str) -> None:
    model = network(name)
    result = Channels(macs=0.7, criterion="l2", ranking=ranking, multiple=2).apply(model, context(model))  # pyright: ignore[reportArgumentType]
    assert cost.total_macs(result) <= 0.7 * cost.total_macs(model)
    old = dict(model.graph.named_parameters())
    for parameter, value in result.graph.named_parameters():
        channels = 1 if parameter == "up.weight" and name == "grouped" else 0  # of the result; transposed convolution
        assert value.shape[channels] in (old[parameter].shape[channels], value.shape[channels] // 2 * 2)
    assert result.program() is not None


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_gain", "taylor"])
def test_channels_without_effect_go_first(criterion: str) -> None:
    """A channel whose filter, gain and readers are zero costs nothing: removing those leaves the function as it was."""
    model = network("residual")
    for tensor in ("first.0.0.weight", "first.0.1.weight", "first.0.1.bias"):
        layers.tensor(model.graph, tensor).data[::2] = 0
    layers.tensor(model.graph, "first.1.0.weight").data[:, ::2] = 0
    half = model.copy()
    found = analyse(half)
    dead = {found.group(u) for u in found.axes["first.0.0.weight", 0][::2]}
    remove(found, dead)
    share = cost.total_macs(renewed(half)) / cost.total_macs(model)
    skip = () if criterion == "taylor" else ("stem.*", "second.*", "first.1.*")
    method = Channels(macs=share + 1e-6, criterion=criterion, multiple=4, skip=skip)  # pyright: ignore[reportArgumentType]
    result = method.apply(model, context(model, samples(model)))
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)
    assert layers.tensor(result.graph, "first.0.0.weight").shape[0] == 4


def test_residual_sums_and_padding_shrink_together() -> None:
    model = network("residual")
    result = Channels(params=0.5, criterion="l2", multiple=2).apply(model, context(model))
    shapes = {n: tuple(p.shape) for n, p in result.graph.named_parameters()}
    assert result.parameters() <= 0.5 * model.parameters()
    assert shapes["stem.0.weight"][0] == shapes["first.1.0.weight"][0] == shapes["second.0.0.weight"][1]
    assert shapes["second.1.0.weight"][0] == shapes["head.weight"][1]
    assert shapes["head.weight"][0] == 4


def test_groups_of_a_grouped_convolution_stay_equal() -> None:
    model = network("grouped")
    result = Channels(macs=0.5, criterion="l1", multiple=8).apply(model, context(model))
    weight = layers.tensor(result.graph, "b.0.weight")  # (out, in of one group, 3, 3)
    assert weight.shape[0] % 8 == 0
    assert layers.tensor(result.graph, "a.0.weight").shape[0] == 4 * weight.shape[1]


def test_receipt_says_why_a_parameter_stays() -> None:
    model = network("mlp")
    result = Channels(macs=0.6, criterion="l2", multiple=4).apply(model, context(model))
    entries = {e.tensor: e for e in result.receipt}
    assert set(entries) == {n for n, _ in model.graph.named_parameters()}
    assert entries["up.weight"].action == "pruned"
    assert entries["up.weight"].after_bytes == layers.tensor(result.graph, "up.weight").numel() * 4
    assert entries["head.weight"].action == "left"
    assert "layer_norm" in entries["norm.weight"].reason or "followed" in entries["norm.weight"].reason
    assert "output" in entries["head.bias"].reason


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv_bn(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(torch.sort(x, dim=1).values)
        return self.head(x.mean((2, 3)))


def test_an_op_without_a_rule_protects_what_reaches_it() -> None:
    torch.manual_seed(0)
    model = trace(Unknown(), {"x": torch.zeros(2, 3, 8, 8)}, "unknown")
    result = Channels(macs=0.8, criterion="l2", multiple=2).apply(model, context(model))
    assert layers.tensor(result.graph, "a.0.weight").shape[0] == 8
    assert layers.tensor(result.graph, "b.0.weight").shape[0] < 8
    assert "sort" in next(e.reason for e in result.receipt if e.tensor == "a.0.weight")


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.relu(self.a(x))) + self.a.weight.sum()


def test_a_weight_that_another_op_reads_stays() -> None:
    model = trace(ReadTwice(), {"x": torch.zeros(2, 4)}, "twice")
    with pytest.raises(PlanishError, match=r"reaches 1\.000 of the multiply-accumulates at best"):
        Channels(macs=0.9, criterion="l2", multiple=1).apply(model, context(model))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.b(functional.relu(self.a(x)))))


def test_tensors_under_two_names_stay_tied() -> None:
    """Whether the tracer keeps two names or one, the shared weight's input is the model's, so nothing of it may go."""
    torch.manual_seed(0)
    model = trace(Tied(), {"x": torch.zeros(2, 4)}, "tied")
    with pytest.raises(PlanishError, match="at best"):
        Channels(macs=0.9, criterion="l2", multiple=1).apply(model, context(model))


def test_planned_cost_is_the_cost_of_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    model = network("mobile")
    result = Channels(macs=0.6, criterion="l2", multiple=2).apply(model, context(model))
    assert f"-> {cost.total_macs(result):,} multiply" in capsys.readouterr().err


def test_same_seed_same_bytes() -> None:
    model = network("mobile")
    method = Channels(macs=0.6, multiple=4)
    first, second = (method.apply(model, context(model, samples(model))) for _ in range(2))
    for a, b in zip(first.graph.state_dict().values(), second.graph.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert model.parameters() == network("mobile").parameters()


def test_taylor_without_labels_scores_the_outputs() -> None:
    model = network("dense")
    data = samples(model)
    unlabelled = Data(data.inputs, None, "random")
    result = Channels(macs=0.6, multiple=4, batch=4).apply(model, context(model, unlabelled))
    assert cost.total_macs(result) <= 0.6 * cost.total_macs(model)


def test_skipped_layers_keep_their_outputs() -> None:
    model = network("dense")
    result = Channels(macs=0.7, criterion="l2", multiple=2, skip=("c.*",)).apply(model, context(model))
    assert layers.tensor(result.graph, "c.0.weight").shape[0] == 8
    with pytest.raises(PlanishError, match="skip 'nothing' matches no layer"):
        Channels(macs=0.7, criterion="l2", skip=("nothing",)).apply(model, context(model))


def test_bad_goals() -> None:
    for fields in ({}, {"macs": 0.5, "params": 0.5}):
        with pytest.raises(pydantic.ValidationError, match="exactly one of"):
            Channels(**fields)
    model = network("residual")
    with pytest.raises(PlanishError, match=r"at best; 0\.010 was asked"):
        Channels(macs=0.01, criterion="l2", multiple=8).apply(model, context(model))
    with pytest.raises(PlanishError, match="needs data"):
        Channels(macs=0.5).apply(model, context(model))


class Quantized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.planish.quantize(x, torch.ones(()), torch.zeros(()), 0, -128, 127, torch.int8).float()


def test_a_quantized_model_is_refused() -> None:
    model = trace(Quantized(), {"x": torch.zeros(2, 3)}, "codes")
    with pytest.raises(PlanishError, match="quantized already"):
        Channels(macs=0.5, criterion="l2").apply(model, context(model))
