"""Recovery training: soft labels bring a damaged model back, deterministically, and leave an eval graph behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import layers
from planish.compress.data import Data
from planish.compress.distill import Distill, augment, set_training
from planish.compress.model import Model, trace
from planish.compress.passes import Context
from planish.kernels import affine  # noqa: F401  (defines the quantize op)
from planish.targets import target
from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self, softmax: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.1)
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x))).mean((2, 3))
        x = self.head(self.drop(x))
        return x.softmax(1) if self.softmax else x


def images(n: int = 320, labels: bool = True) -> Data:
    """Stripes of four directions in noise."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, n)
    row, column = np.mgrid[0:8, 0:8]
    kinds = np.stack([row % 2, column % 2, (row + column) % 3 == 0, (row - column) % 3 == 0]).astype(np.float32)
    x = kinds[y][:, None] + 0.3 * rng.normal(size=(n, 1, 8, 8)).astype(np.float32)
    return Data({"x": x.astype(np.float32)}, y if labels else None, "stripes")


@pytest.fixture(scope="module")
def trained() -> Model:
    """A teacher that knows the stripes."""
    torch.manual_seed(0)
    net, data = Net(), images()
    x, y = torch.from_numpy(data.inputs["x"]), torch.from_numpy(data.labels).long()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(net.train()(x), y).backward()
        optimizer.step()
    return trace(net, {"x": x[:2]}, "teacher")


def damaged(model: Model) -> Model:
    """The model with half of its filters wiped out."""
    broken = model.copy()
    layers.tensor(broken.graph, "conv.weight").data[::2] = 0
    layers.tensor(broken.graph, "head.weight").data.normal_(generator=torch.Generator().manual_seed(1))
    return broken


def context(original: Model, data: Data | None, seed: int = 0) -> Context:
    return Context(original, data, target.load("x86-avx512-vnni"), torch.Generator().manual_seed(seed))


def accuracy(model: Model, data: Data) -> float:
    with torch.no_grad():
        found = model(torch.from_numpy(data.inputs["x"]))
    assert isinstance(found, Tensor) and data.labels is not None
    return float((found.argmax(1).numpy() == data.labels).mean())


METHOD = Distill(epochs=8, batch=16, learning_rate=0.1, precision="float32")


def test_soft_labels_alone_recover_the_model(trained: Model) -> None:
    broken, data = damaged(trained), images(labels=False)
    before = {k: v.clone() for k, v in broken.graph.state_dict().items()}
    result = METHOD.apply(broken, context(trained, data))
    assert accuracy(trained, images()) > 0.95
    assert accuracy(broken, images()) < 0.7
    assert accuracy(result, images()) > 0.9
    for name, value in broken.graph.state_dict().items():
        assert torch.equal(value, before[name])  # the model given is not changed


def test_the_result_is_in_eval_mode_and_traces_again(trained: Model) -> None:
    result = METHOD.model_copy(update={"epochs": 1}).apply(damaged(trained), context(trained, images()))
    flags = {
        layers.op(n): layers.argument(n, "training" if layers.op(n) == "aten.batch_norm" else "train")
        for n in result.graph.graph.nodes
        if layers.op(n) in ("aten.batch_norm", "aten.dropout")
    }
    assert flags and not any(flags.values())
    x = torch.from_numpy(images().inputs["x"][:3])
    with torch.no_grad():
        assert torch.equal(result.program().module()(x), result(x))
        single = torch.cat([result(x[i : i + 1]) for i in range(3)])  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(single, result(x), rtol=1e-5, atol=1e-5)
    assert result.receipt[-1].action == "trained"


def test_same_seed_same_bytes_and_another_seed_another_result(trained: Model) -> None:
    method = Distill(epochs=2, batch=32, crop=1, flip=True)
    results = [method.apply(damaged(trained), context(trained, images(), seed)) for seed in (3, 3, 4)]
    states = [torch.cat([v.flatten().double() for v in r.graph.state_dict().values()]) for r in results]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_global_generator_is_left_alone(trained: Model) -> None:
    state = torch.get_rng_state()
    METHOD.model_copy(update={"epochs": 1}).apply(damaged(trained), context(trained, images()))
    assert torch.equal(state, torch.get_rng_state())


def test_a_perfect_student_keeps_its_state(trained: Model) -> None:
    """The loss is a divergence: 0 for the teacher itself; no epoch can beat that, so the first state is kept."""
    result = METHOD.model_copy(update={"epochs": 3, "patience": 1}).apply(trained, context(trained, images()))
    for a, b in zip(result.graph.state_dict().values(), trained.graph.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "0.0000 -> 0.0000" in result.receipt[-1].reason


def test_hard_labels_and_other_losses(trained: Model) -> None:
    data = images()
    for change in ({"hard": 0.5}, {"loss": "mse"}, {"temperature": 3.0}, {"optimizer": "adamw", "learning_rate": 0.02}):
        result = METHOD.model_copy(update=change).apply(damaged(trained), context(trained, data))
        assert accuracy(result, data) > 0.85, change


def test_a_final_softmax_counts_as_probabilities(trained: Model) -> None:
    net = Net(softmax=True)
    net.load_state_dict(trained.graph.state_dict())
    teacher = trace(net, {"x": torch.zeros(2, 1, 8, 8)}, "probabilities")
    plain = METHOD.apply(damaged(trained), context(trained, images()))
    ended = METHOD.apply(damaged(teacher), context(teacher, images()))
    x = torch.from_numpy(images().inputs["x"])
    with torch.no_grad():
        torch.testing.assert_close(ended(x), plain(x).softmax(1), rtol=0.02, atol=0.02)  # pyright: ignore[reportAttributeAccessIssue]


def test_augment_moves_and_mirrors_whole_images() -> None:
    x = torch.arange(36.0).view(1, 1, 6, 6).repeat(64, 2, 1, 1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(x, 0, False, generator), x)
    mirrored = augment(x, 0, True, generator)
    kinds = {"same": (mirrored == x).flatten(1).all(1), "mirror": (mirrored == x.flip(3)).flatten(1).all(1)}
    assert (kinds["same"] ^ kinds["mirror"]).all()
    assert 16 < int(kinds["mirror"].sum()) < 48
    moved = augment(x + 1, 2, False, generator)
    padded = functional.pad(x + 1, (2, 2, 2, 2))
    places = {
        (i, j)
        for image in moved
        for i in range(5)
        for j in range(5)
        if torch.equal(image, padded[0, :, i : i + 6, j : j + 6])
    }
    assert len(places) > 10
    assert all(any(torch.equal(m, padded[0, :, i : i + 6, j : j + 6]) for i, j in places) for m in moved)


def test_rate_rises_then_falls_to_zero() -> None:
    method = Distill(learning_rate=0.4, warmup=2.0)
    assert method.rate(1.0, 10) == pytest.approx(0.2)
    assert method.rate(2.0, 10) == pytest.approx(0.4)
    assert method.rate(6.0, 10) == pytest.approx(0.2)
    assert method.rate(10.0, 10) == pytest.approx(0.0)


def test_training_mode_updates_the_running_statistics(trained: Model) -> None:
    model = trained.copy()
    before = layers.tensor(model.graph, "norm.running_mean").clone()
    set_training(model, True)
    model(torch.randn(8, 1, 8, 8))
    assert not torch.equal(before, layers.tensor(model.graph, "norm.running_mean"))


class Quantized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.planish.quantize(x, torch.ones(()), torch.zeros(()), 0, -128, 127, torch.int8).float()


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_bad_input_is_named(trained: Model) -> None:
    codes = trace(Quantized(), {"x": torch.zeros(2, 4)}, "codes")
    flat = trace(Flat(), {"x": torch.zeros(2, 4)}, "flat")
    vectors = Data({"x": np.ones((64, 4), np.float32)}, None, "vectors")
    cases = [
        (Distill(), codes, vectors, "is quantized already"),
        (Distill(), trained, None, "needs data"),
        (Distill(hard=0.5), flat, vectors, "needs 'labels'"),
        (Distill(flip=True), flat, vectors, "need an input of images"),
        (Distill(), flat, vectors, "use loss 'mse'"),
        (Distill(), trained, images(2), "needs more"),
        (Distill(learning_rate=1e9, epochs=3, batch=16), damaged(trained), images(), "a lower learning_rate"),
    ]
    for method, model, data, message in cases:
        with pytest.raises(PlanishError, match=message):
            method.apply(model, context(model, data))
