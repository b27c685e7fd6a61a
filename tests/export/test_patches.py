"""Patch-based execution gives the codes of whole maps, costs what is said, and lowers the peak."""

import shutil
import subprocess

import numpy as np
import pytest
from planish.common.errors import PlanishError
from planish.export import c, c_project, firmware, memory, patches, planner, qdq
from planish.kernels.op import Node, Tensor
from planish.targets import target as targets
from planish.targets.target import Memory

NETWORKS = ("residual", "branches", "flatten", "channels_last", "padded")


@pytest.fixture(scope="module")
def networks(tiny):
    return {name: (qdq.read(tiny(name)[0]), tiny(name)[1][:3]) for name in NETWORKS}


def calls(graph):
    return c_project.calls_of(graph, ())


def grids(stage):
    _, _, height, width = stage.output.shape
    return sorted(
        {(min(r, height), min(k, width)) for r, k in ((2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (4, 4), (8, 8))}
    )


def splits(graph):
    """Every stage in several grids; those whose patches would lie in the padding are left out."""
    for stage in patches.stages(graph):
        for grid in grids(stage):
            try:
                yield stage, grid, patches.split(stage, grid)
            except PlanishError as error:
                assert "padding" in str(error)


@pytest.mark.parametrize("name", NETWORKS)
def test_same_codes_as_whole_maps(name, networks):
    graph, x = networks[name]
    inputs = {graph.inputs[0].name: x}
    expected = graph.codes(inputs)
    count = 0
    for stage, grid, made in splits(graph):
        got = made.codes(inputs)
        for tensor in (stage.output.name, graph.outputs[0].tensor.name):
            np.testing.assert_array_equal(got[tensor], expected[tensor], err_msg=f"{tensor} in {grid}")
        assert [p.tensor for p in made.outputs] == [p.tensor for p in graph.outputs]
        count += 1
    assert count >= 3


@pytest.mark.parametrize("name", NETWORKS)
def test_additional_macs_are_counted_alike_from_boxes_and_from_layers(name, networks):
    graph, _ = networks[name]
    for stage, grid, made in splits(graph):
        base = sum(graph.ops[n.op].macs(n) for n in stage.nodes)
        done = sum(
            n.output.size * int(np.prod(n.constants["weight"].shape[1:])) for n in made.nodes if "weight" in n.constants
        )  # as run: every code of every patch times the taps of its layer
        assert made.macs - graph.macs == stage.macs(grid) - base
        assert made.macs == done


@pytest.mark.parametrize("name", ["residual", "branches", "padded"])
def test_generated_c_gives_the_same_codes(name, networks, tmp_path):
    """With outputs over inputs and over the map that patches read: the known-answer test is made from whole maps."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    graph, x = networks[name]
    for i, (stage, grid, made) in enumerate(list(splits(graph))[-4::3]):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        c.write_project(made, "tiny", targets.load("host"), {graph.inputs[0].name: x}, folder, [])
        sources = [str(p.relative_to(folder)) for p in sorted([*folder.glob("*.c"), *folder.glob("kernels/*.c")])]
        strict = ["-std=c99", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I.", "-Ikernels"]
        sanitize = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        built = subprocess.run(
            ["gcc", *strict, *sanitize, *sources, "-o", "t"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert built.returncode == 0, built.stderr[:2000]
        done = subprocess.run(["./t"], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{stage.output.name} in {grid}: {done.stderr[:1000]}"


def test_constants_stand_in_flash_once(networks):
    graph, _ = networks["residual"]
    stage = patches.stages(graph)[-1]
    whole, made = c_project.build(graph, "tiny"), c_project.build(patches.split(stage, (4, 4)), "tiny")
    assert made.weight_bytes == whole.weight_bytes
    kinds = 9  # patches at corners, edges and inside differ in their padding
    assert len(made.structs) <= len(whole.structs) + kinds * (len(stage.nodes) + 2) + 16
    assert len(made.layers) > len(made.structs)


def test_stripes_of_rows_copy_nothing(networks):
    """Slices of the input are views, and results are computed inside their map, where rows begin on words."""
    graph, _ = networks["flatten"]  # 8 x 8 x 3 to 8 x 8 x 4: rows of 24 and 32 bytes
    made = patches.split(patches.stages(graph)[0], (4, 1))
    assert {n.op for n in made.nodes if n.name not in memory.idle(made)} == {"conv2d", "fully_connected"}
    places = memory.views(made)
    assert len({places[n.output.name] for n in made.nodes if n.op == "conv2d"}) == 4
    assert {places[n.output.name].root for n in made.nodes if n.op == "conv2d"} == {
        places[made.nodes[-1].inputs[0].name].root
    }


def image(name, channels, height, width, rng):
    return Tensor(name, (1, channels, height, width), np.float32(0.02), int(rng.integers(-20, 20)))


def conv(rng, x, outputs, stride=1, kernel=3, depthwise=False, name=""):
    """A convolution layer on a tensor."""
    channels, height, width = x.shape[1:]
    pad = kernel // 2
    shape = (outputs, 1 if depthwise else channels, kernel, kernel)
    y = image(f"{name}.y", outputs, (height - 1) // stride + 1, (width - 1) // stride + 1, rng)
    return Node(
        "depthwise_conv2d" if depthwise else "conv2d",
        name,
        (x,),
        y,
        {
            "groups": channels if depthwise else 1,
            "kernel": (kernel, kernel),
            "stride": (stride, stride),
            "dilation": (1, 1),
            "pads": (pad, pad, pad, pad),
            "low": -128,
            "high": 127,
        },
        {
            "weight": rng.integers(-127, 128, shape).astype(np.int8),
            "weight_zero_point": np.zeros(outputs, np.int32),
            "bias": rng.integers(-500, 500, outputs).astype(np.int32),
            "rescale": np.full(outputs, 0.02 / np.sqrt(kernel * kernel * shape[1]) / 4, np.float32),
        },
    )


@pytest.fixture
def mobile():
    """The first stages of a MobileNetV2, with an inverted residual block: graph and codes of an input."""
    from planish.export.graph import Graph, Port

    rng = np.random.default_rng(0)
    x = image("x", 3, 48, 48, rng)
    nodes = [conv(rng, x, 8, 2, name="stem")]

    def add(*args, **kwargs):
        nodes.append(conv(rng, nodes[-1].output, *args, name=f"n{len(nodes)}", **kwargs))

    add(8, depthwise=True)
    add(8, kernel=1)
    add(48, kernel=1)
    add(48, 2, depthwise=True)
    add(8, kernel=1)
    short = nodes[-1].output
    add(48, kernel=1)
    add(48, depthwise=True)
    add(8, kernel=1)
    y = image("sum", 8, 12, 12, rng)
    quantized = {
        "swapped": False,
        "repeat": "same",
        "scales": (short.scale, nodes[-1].output.scale),
        "zero_points": (short.zero_point, nodes[-1].output.zero_point),
        "low": -128,
        "high": 127,
    }
    nodes.append(Node("add", "sum", (short, nodes[-1].output), y, quantized))
    nodes.append(conv(rng, y, 16, 2, name="last"))
    ports = [Port(t.name, t.shape, "int8", t, (0, 1, 2, 3)) for t in (x, nodes[-1].output)]
    graph = Graph(tuple(nodes), (ports[0],), (ports[1],))
    return graph, {"x": rng.integers(-128, 128, (2, *x.shape[1:])).astype(np.int8)}


def test_residual_blocks_are_exact(mobile):
    graph, x = mobile
    expected = graph.codes(x)
    stage = next(s for s in patches.stages(graph) if s.output.name == "sum")
    for grid in ((1, 3), (3, 3), (5, 4), (12, 1)):
        np.testing.assert_array_equal(patches.split(stage, grid).codes(x)["sum"], expected["sum"])


def test_choice_lowers_the_peak_within_the_limit(mobile):
    graph, x = mobile
    found = patches.choose(graph, calls, extra=0.15)
    assert found is not None
    plan = memory.of(found.graph, calls(found.graph)).plan
    planner.check(plan)
    whole = memory.of(graph, calls(graph)).plan
    assert found.arena == plan.arena <= 1.15 * plan.least
    assert plan.arena < whole.arena / 2
    assert 0 < found.share <= 0.15
    assert found.extra_macs == found.graph.macs - graph.macs
    np.testing.assert_array_equal(found.graph.codes(x)["last.y"], graph.codes(x)["last.y"])


def test_choice_takes_the_least_work_that_fits(mobile, monkeypatch):
    graph, _ = mobile
    monkeypatch.setattr(patches, "FINALISTS", 3)
    least = patches.choose(graph, calls, extra=0.3)
    room = (memory.of(graph, calls(graph)).plan.arena + least.arena) // 2
    found = patches.choose(graph, calls, ram=room, extra=0.3)
    assert least.arena <= found.arena <= room
    assert found.extra_macs < least.extra_macs


def test_a_model_that_does_not_fit_is_exported_in_patches(mobile, tmp_path):
    graph, x = mobile
    plenty = targets.load("host")
    project, none = c.fitted(graph, "tiny", plenty)
    assert none is None
    small = targets.load("stm32f446")
    room = firmware.STACK + project.memory.plan.arena * 3 // 4
    small = small.model_copy(update={"ram": Memory(origin=small.ram.origin, length=room)})
    warnings = []
    facts, *_ = c.write_project(graph, "tiny", small, {"x": x["x"]}, tmp_path, warnings)
    assert facts["memory"]["arena"] + firmware.STACK <= room
    assert facts["patches"]["extra_macs"] == facts["macs"] - graph.macs
    assert any("patches" in w for w in warnings)


def test_no_patches_where_none_help(networks):
    graph, _ = networks["residual"]
    assert patches.choose(graph, calls, extra=0.0) is None or patches.choose(graph, calls, extra=0.0).extra_macs == 0


def test_bad_grid(networks):
    stage = patches.stages(networks["residual"][0])[0]
    for grid in ((0, 1), (9, 1), (1, 9)):
        with pytest.raises(PlanishError, match="8 x 8 pixels"):
            patches.split(stage, grid)
