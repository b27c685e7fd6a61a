"""QuantMCU: classes of patches, widths of maps by score and memory, and the packed codes that run."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export import c, memory, narrow_maps, patches, qdq, quant_mcu
from planish.export.lowering import to_onnx
from planish.kernels.op import Tensor, Unsupported
from planish.targets import target as targets
from torch import nn

SIZE, CLASSES = 32, 8


def block(inputs, outputs, stride):
    """A depthwise separable convolution."""
    return [
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    ]


class Shortcut(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(*block(channels, channels, 1))

    def forward(self, x):
        return x + self.body(x)


def gratings(count, seed):
    """Images (n, 3, 32, 32) of gratings in noise, and their classes: four directions, two frequencies."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, count)
    angle = (label % 4) * np.pi / 4 + rng.normal(0, 0.08, count)
    frequency = np.where(label < 4, 0.5, 1.1) * rng.uniform(0.9, 1.1, count)
    y, x = np.mgrid[:SIZE, :SIZE]
    along = x * np.cos(angle)[:, None, None] + y * np.sin(angle)[:, None, None]
    wave = np.sin(along * frequency[:, None, None] + rng.uniform(0, 6.3, count)[:, None, None])
    images = wave[:, None] * rng.uniform(0.4, 1.0, (count, 3, 1, 1)) + rng.normal(0, 1.6, (count, 3, SIZE, SIZE))
    return images.astype(np.float32), label


@pytest.fixture(scope="module")
def trained():
    """A small MobileNet after a few epochs: its int8 graph, calibration images, test images and their classes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        *block(8, 32, 1), Shortcut(32), *block(32, 32, 2), Shortcut(32), *block(32, 48, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES),
    )  # fmt: skip
    images, label = gratings(1536, 0)
    x, y = torch.from_numpy(images), torch.from_numpy(label)
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for part in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    net.eval()
    model = trace(net, {"x": x[:2]}, "gratings")
    context = Context(model, Data({"x": images}, None, "c"), targets.load("host"), torch.Generator().manual_seed(0))
    graph = qdq.read(to_onnx(Static(samples=64).apply(model, context)))
    test, classes = gratings(400, 1)
    return graph, images[:32], test, classes


def accuracy(graph, images, classes):
    (scores,) = graph.reference({graph.inputs[0].name: images}).values()
    return float((scores.argmax(1) == classes).mean())


def stage_of(graph, layers):
    return next(s for s in patches.stages(graph) if len(s.nodes) == layers)


def found(trained, **options):
    graph, images, *_ = trained
    images = options.pop("images", images)
    given = {"ram": 1 << 20, "stage": stage_of(graph, 6), "grid": (3, 3)} | options
    return quant_mcu.search(graph, {graph.inputs[0].name: images}, **given)


def test_less_work_at_the_same_accuracy(trained):
    graph, images, test, classes = trained
    plain = accuracy(graph, test, classes)
    assert plain > 0.95
    searched = quant_mcu.search_for_work(
        graph, {graph.inputs[0].name: images}, 1 << 20, 0.6, stage_of(graph, 6), (3, 3), phi=1.0, widths=(8, 4)
    )
    assert searched.bitops <= 0.6 * searched.bitops_int8
    assert accuracy(searched.graph, test, classes) >= plain - 0.01


def test_the_highest_weight_that_keeps_the_work(trained):
    graph, images, *_ = trained
    inputs = {graph.inputs[0].name: images}
    space = quant_mcu.space(graph, inputs)
    searched = quant_mcu.search_for_work(graph, inputs, 1 << 20, 0.7)
    assert searched.bitops <= 0.7 * searched.bitops_int8
    more = [w for w in space.weights() if w > searched.weight]
    assert space.at(more[0] + 1e-9, 1 << 20).bitops > 0.7 * searched.bitops_int8
    with pytest.raises(PlanishError, match="fewest bits they are"):
        quant_mcu.search_for_work(graph, inputs, 1 << 20, 0.1)


def test_bitops_by_hand(trained):
    searched = found(trained, phi=1.0, weight=0.515)
    total = 0
    for node in searched.graph.nodes:
        if "weight" in node.constants:
            taps = int(np.prod(node.constants["weight"].shape[1:]))
            total += node.output.size * taps * 8 * node.inputs[0].bits
    assert searched.bitops == total
    assert found(trained, weight=1.0).bitops == searched.bitops_int8


def test_classes_of_patches(trained):
    """phi to 1: no outliers. phi to 0: every patch holds one. Between: more outliers with a lower phi."""
    counts = [sum(found(trained, phi=phi).outliers) for phi in (1.0, 0.9999, 0.999, 0.0)]
    assert counts[0] == 0
    assert counts[-1] == 9
    assert counts == sorted(counts)


def test_one_outlier_marks_the_patches_that_read_it(trained):
    graph, *_ = trained
    stage = stage_of(graph, 1)  # a convolution 3 x 3
    values = {graph.inputs[0].tensor.name: np.zeros((4, 3, SIZE, SIZE), np.int8)}
    x = values[graph.inputs[0].tensor.name]
    x[:, :, ::2] = 1
    x[2, 1, 3, 15] = 100
    marked = quant_mcu.classify(stage, (4, 2), values, 0.999)
    assert marked == (True, True, *[False] * 6)  # column 15 is the right patch's halo
    x[2, 1, 3, 15] = 1
    x[2, 1, 3, 20] = 100
    assert quant_mcu.classify(stage, (4, 2), values, 0.999) == (False, True, *[False] * 6)


def test_outlier_patches_keep_8_bits(trained):
    searched = found(trained, phi=0.9999, weight=0.3)
    assert 0 < sum(searched.outliers) < 9
    by_patch = {}
    stage = stage_of(trained[0], 6)
    _, origins = patches.split_with_origins(stage, (3, 3))
    for node in searched.graph.nodes:
        origin = origins.get(node.output.name)
        if origin is not None and origin.patch is not None:
            by_patch.setdefault(origin.patch, set()).add(node.output.bits)
    for patch, out in enumerate(searched.outliers):
        assert (by_patch[patch] == {8}) == out
    stitched = {n.output.bits for n in searched.graph.nodes if n.op == "paste"}
    assert len(stitched) == 1


def test_a_higher_weight_of_entropy_never_lowers_the_mean_width(trained):
    graph, images, *_ = trained
    space = quant_mcu.space(graph, {graph.inputs[0].name: images}, stage_of(graph, 6), (3, 3), phi=1.0)
    searched = [space.at(w, 1 << 20) for w in (0, *space.weights(), 1)]
    means = [f.mean_bits for f in searched]
    assert means == sorted(means)
    assert [f.bitops for f in searched] == sorted(f.bitops for f in searched)
    assert means[0] < 4 < means[-1] == 8


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_every_step_keeps_the_memory(trained, share):
    graph, images, *_ = trained
    plain = quant_mcu.search(graph, {graph.inputs[0].name: images}, 1 << 20, weight=1.0)
    ram = int(plain.alive * share)
    searched = quant_mcu.search(graph, {graph.inputs[0].name: images}, ram, weight=1.0)
    assert searched.alive <= ram < plain.alive
    assert searched.alive == memory.bound(searched.graph)
    for node in searched.graph.nodes:  # also each layer's input and output alone
        assert sum(t.bytes for t in {*node.inputs, node.output}) <= ram


def test_memory_that_cannot_be_kept(trained):
    graph, images, *_ = trained
    with pytest.raises(PlanishError, match=r"needs \d+, \d+ more, with every map in its fewest bits"):
        quant_mcu.search(graph, {graph.inputs[0].name: images}, 2000)


@pytest.mark.parametrize("options", [{"phi": 1.5}, {"weight": -0.1}, {"widths": (8, 3)}, {"widths": (4, 2)}])
def test_bad_settings(trained, options):
    with pytest.raises(PlanishError, match="accepted"):
        found(trained, **options)


def test_saturation_is_counted(trained):
    graph, images, *_ = trained
    searched = found(trained, phi=1.0, weight=0.2)
    name = graph.inputs[0].name
    usual = quant_mcu.saturated(searched.graph, {name: images})
    loud = quant_mcu.saturated(searched.graph, {name: images * 4})
    assert set(usual) == {n.output.name for n in searched.graph.nodes if n.output.bits < 8}
    assert sum(loud.values()) > sum(usual.values())


@pytest.mark.parametrize("options", [["-O2"], ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]])
@pytest.mark.parametrize("weight", [0.0, 0.515])
def test_generated_c_gives_the_same_codes(trained, weight, options, tmp_path):
    """Maps of 8, 4 and 2 bits in patches, packed, through every kernel that takes them."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    graph, images, *_ = trained
    searched = found(trained, phi=0.9999, weight=weight)
    bits = {t.bits for n in searched.graph.nodes for t in n.inputs}
    assert bits == ({8, 2} if weight == 0 else {8, 4, 2})
    c.write_project(searched.graph, "tiny", targets.load("host"), {graph.inputs[0].name: images[:1]}, tmp_path, [])
    sources = [str(p.relative_to(tmp_path)) for p in sorted([*tmp_path.glob("*.c"), *tmp_path.glob("kernels/*.c")])]
    strict = ["-std=c99", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I.", "-Ikernels"]
    built = subprocess.run(
        ["gcc", *strict, *options, *sources, "-o", "t"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[:2000]
    done = subprocess.run(["./t"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:1000]


def test_arena_shrinks_with_the_maps(trained):
    from planish.export import c_project

    graph, *_ = trained
    searched = found(trained, stage=None, weight=0.515)
    arenas = [memory.of(g, c_project.calls_of(g, ())).plan.arena for g in (graph, searched.graph)]
    assert arenas[1] < 0.8 * arenas[0]


def test_fitted_quantization_keeps_zero_and_beats_the_full_range():
    x = Tensor("x", (1, 8, 4, 4), np.float32(0.1), -128)
    counts = np.zeros(256)
    counts[:40] = np.linspace(100, 1, 40)
    counts[250] = 1  # one outlier
    for bits in (4, 2):
        made = narrow_maps.fit(x, counts, bits)
        assert made.zero_point == -(1 << bits - 1)
        assert made.bits == bits
        full = replace(made, scale=np.float32(0.1 * 250 / ((1 << bits) - 1)))
        value = 0.1 * np.arange(256)
        errors = [
            float(
                (counts * ((narrow_maps.codes(x, t).astype(float) - t.zero_point) * float(t.scale) - value) ** 2).sum()
            )
            for t in (made, full)
        ]
        assert errors[0] < errors[1]


def test_borders_and_other_ops_keep_8_bits(trained):
    graph, *_ = trained
    name = graph.outputs[0].tensor.name
    with pytest.raises(Unsupported, match="input or output"):
        narrow_maps.apply(graph, {name: replace(graph.tensors[name], bits=4)})
    pooled = next(n for n in graph.nodes if n.op == "global_average_pool").inputs[0]
    with pytest.raises(Unsupported, match="8 bits"):
        narrow_maps.apply(graph, {pooled.name: replace(pooled, bits=4, zero_point=-8)})


@pytest.mark.parametrize("name", ["stm32f446", "rp2040"])
def test_same_codes_on_cores(trained, name, tmp_path):
    """Versions of kernels for a core take narrow maps right, or leave them to the portable ones."""
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    from planish.export.artifact import Artifact
    from planish.runtimes.emulator import Emulator

    graph, images, *_ = trained
    x = {graph.inputs[0].name: images[:1]}
    searched = found(trained, phi=0.9999, weight=0.515)
    c.write_project(searched.graph, "tiny", targets.load(name), x, tmp_path, [])
    with Emulator().open(Artifact(tmp_path, {"format": "c", "target": name}), 1) as session:
        got = session.run(x)
    for output, expected in searched.graph.reference(x).items():
        np.testing.assert_array_equal(got[output], expected)
