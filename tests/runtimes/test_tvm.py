"""The tvm runtime: the library on this machine, and the cross compiled one under QEMU."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from planish.common.errors import Missing, PlanishError
from planish.export import tvm_import
from planish.export.artifact import Artifact
from planish.export.format import Source
from planish.export.lowering import to_onnx
from planish.export.tvm import Tvm as Format
from planish.export.tvm import compile_model, link
from planish.kernels import affine
from planish.runtimes import ort, qemu_user
from planish.runtimes.tvm import EmulatedSession, HostSession, Tvm
from planish.targets import target

pytest.importorskip("tvm", reason="apache-tvm is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed")
_ = affine  # its import defines planish::quantize, which to_onnx looks up


def artifact(model, name, folder):
    """The model written for a target, with the manifest fields that the runtime reads."""
    folder.mkdir()
    written = Format().write(Source(to_onnx(model), {}, "net"), target.load(name), folder)
    manifest = {"format": "tvm", "target": name, "inputs": written.inputs, "outputs": written.outputs}
    return Artifact(folder, manifest | {"details": dict(written.details), "ram_bytes": written.ram_bytes})


@pytest.fixture(scope="module")
def host(residual, tmp_path_factory):
    return artifact(residual, "host", tmp_path_factory.mktemp("tvm") / "host")


@pytest.fixture(scope="module")
def kit():
    """The emulator with its parts; the test is skipped where they are not there and cannot be fetched."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed (apt-get install qemu-user)")
    try:
        return qemu_user.kit()
    except Missing as error:
        pytest.skip(str(error))


def test_any_batch_equals_onnx_runtime(host, residual, images):
    x = {"image": images.inputs["image"][:5]}
    want = ort.run(ort.create(to_onnx(residual).SerializeToString(), 1), x)
    with Tvm().open(host, 1) as session:
        assert isinstance(session, HostSession)
        got = session.run(x)
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].shape == values.shape
        assert np.abs(got[name] - values).max() <= 1e-5 * np.abs(values).max()


def test_profile_tells_every_kernel(host, images):
    with Tvm().open(host, 1) as session:
        profile = session.profile({"image": images.inputs["image"][:1]}, runs=5, warmup=1)
    assert profile.kind == "measured"
    assert profile.latency_ms is not None
    assert profile.latency_ms.runs == 5
    calls = host.manifest["details"]["calls"]
    macs = {k["kernel"]: k["macs"] for k in host.manifest["details"]["kernels"]}
    assert [layer.macs for layer in profile.layers] == [macs[c["kernel"]] for c in calls]
    assert profile.macs == sum(layer.macs or 0 for layer in profile.layers) > 500_000
    assert all(layer.name == c["layer"] for layer, c in zip(profile.layers, calls, strict=True) if layer.macs)
    assert profile.flash_bytes is None
    assert all(layer.ms is not None and layer.ms > 0 for layer in profile.layers)
    assert profile.environment["threads"] == 1
    assert profile.environment["tvm"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), r"shape \[1, 3, 8, 8\].*samples of \[1, 3, 16, 16\]"),
        (np.zeros((1, 3, 16, 16)), "float64"),
    ],
)
def test_wrong_inputs_are_named(host, array, message):
    with Tvm().open(host, 1) as session, pytest.raises(PlanishError, match=message):
        session.run({"image": array})


def test_a_missing_input_is_named(host):
    with Tvm().open(host, 1) as session, pytest.raises(PlanishError, match="'image' is missing; given: picture"):
        session.run({"picture": np.zeros((1, 3, 16, 16), np.float32)})


def test_a_machine_without_the_instructions_is_refused(host):
    details = dict(host.manifest["details"]) | {"features": ["avx1024"]}
    with pytest.raises(Missing, match="this machine lacks avx1024"):
        Tvm().open(replace(host, manifest=dict(host.manifest) | {"details": details}), 1)


def test_a_library_that_is_none_is_one_line(host, tmp_path):
    (tmp_path / "model.so").write_bytes(b"not a library")
    with pytest.raises(PlanishError, match=r"TVM cannot load '.*model.so'"):
        Tvm().open(replace(host, folder=tmp_path), 1)


@pytest.mark.qemu
def test_aarch64_gives_the_hosts_codes_and_an_exact_count(kit, quantized, images, tmp_path):
    assert kit.runner.exists()
    x = {"image": images.inputs["image"][:3]}
    here, there = (artifact(quantized, n, tmp_path / n) for n in ("host", "raspberry-pi-4"))
    with Tvm().open(here, 1) as session:
        want = session.run(x)
    with Tvm().open(there, 1) as session:
        assert isinstance(session, EmulatedSession)
        got = session.run(x)
        profiles = [session.profile(x, 1, 0) for _ in range(2)]
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values)
    assert [p.kind for p in profiles] == ["emulated"] * 2
    assert profiles[0].latency_ms is None, "emulated time is not latency"
    if kit.plugin is None:
        pytest.skip("this QEMU does not load the counting plugin")
    assert profiles[0].instructions is not None
    assert abs(profiles[0].instructions - (profiles[1].instructions or 0)) <= 1e-4 * profiles[0].instructions
    assert [x.instructions for x in profiles[0].layers] == [x.instructions for x in profiles[1].layers]
    assert [x.name for x in profiles[0].layers if x.macs] == [
        c["layer"] for c in there.manifest["details"]["calls"] if c["layer"]
    ], "widening the weights is no part of an inference"
    kernels = sum(layer.instructions or 0 for layer in profiles[0].layers)
    assert 0.8 * profiles[0].instructions < kernels <= profiles[0].instructions


@pytest.mark.qemu
def test_the_schedule_saves_instructions(kit, residual, images, tmp_path):
    if kit.plugin is None:
        pytest.skip("this QEMU does not load the counting plugin")
    device = target.load("raspberry-pi-4")
    fixed = tvm_import.fix_batch(to_onnx(residual))
    sample = [[images.inputs["image"][:1]]]
    counts = {}
    for plain in (False, True):
        library = tmp_path / f"{plain}.so"
        link(compile_model(fixed, device, {}, plain).executable, device, library)
        _, counted = qemu_user.run(kit, library, "cortex-a72", sample, [((1, 10), np.dtype("float32"))], count=True)
        assert counted is not None
        counts[plain] = counted.total
    assert counts[True] > 3 * counts[False]


def test_emulation_without_qemu_names_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(Missing, match="apt-get install qemu-user"):
        qemu_user.kit()
