"""The generated C on this machine gives ONNX Runtime's outputs bit for bit."""

import numpy as np
import pytest
from planish.common.errors import Missing, PlanishError
from planish.export.artifact import Artifact
from planish.export.c import C
from planish.export.format import Source
from planish.runtimes import c as runtime
from planish.targets import target as targets

NAMES = ("residual", "branches", "flatten", "matmul", "channels_last", "padded")


def artifact(made, folder, target="host"):
    model, x = made
    folder.mkdir(parents=True, exist_ok=True)
    C().write(Source(model, {"x": x[:1]}, "tiny"), targets.load(target), folder)
    return Artifact(folder, {"format": "c", "target": target})


@pytest.mark.parametrize("name", NAMES)
def test_equals_onnxruntime(name, tiny, ort_outputs, tmp_path):
    model, x = tiny(name)
    with runtime.C().open(artifact((model, x), tmp_path), 1) as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], ort_outputs(model, {"x": x})["y"])


def test_profile_is_measured_on_the_host_with_every_layer(tiny, tmp_path):
    made = tiny("residual")
    with runtime.C().open(artifact(made, tmp_path, "stm32f746"), 1) as session:
        profile = session.profile({"x": made[1][:1]}, 5, 1)
    assert (profile.kind, profile.target, profile.environment["artifact_target"]) == ("measured", "host", "stm32f746")
    assert profile.latency_ms is not None
    assert profile.latency_ms.runs == 5
    assert [layer.op for layer in profile.layers] == [
        "conv2d",
        "conv2d",
        "add",
        "global_average_pool",
        "fully_connected",
    ]
    assert sum(layer.macs or 0 for layer in profile.layers) == profile.macs
    assert all(layer.ms is not None and layer.ms >= 0 for layer in profile.layers)


def test_two_sessions_do_not_share_memory(tiny, ort_outputs, tmp_path):
    (first, x), (second, z) = tiny("flatten"), tiny("matmul")
    with (
        runtime.C().open(artifact((first, x), tmp_path / "a"), 1) as one,
        runtime.C().open(artifact((second, z), tmp_path / "b"), 1) as two,
    ):
        two.run({"x": z})
        np.testing.assert_array_equal(one.run({"x": x})["y"], ort_outputs(first, {"x": x})["y"])


def test_bad_inputs_and_missing_compiler(tiny, tmp_path, monkeypatch):
    made = tiny("flatten")
    with runtime.C().open(artifact(made, tmp_path), 1) as session:
        with pytest.raises(PlanishError, match="input 'x' is missing"):
            session.run({"z": made[1]})
        with pytest.raises(PlanishError, match="has shape"):
            session.run({"x": made[1][:, :2]})
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Missing, match="C compiler"):
        runtime.find_compiler()
