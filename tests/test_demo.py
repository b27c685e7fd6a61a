"""The demo's own model and data through all three devices: the same answers everywhere, and the accuracy is kept."""

import numpy as np
import pytest
from planish import pipeline
from planish.common.errors import Missing
from planish.demo import demo, fashion_resnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's network, quantized without training, and the ONNX artifact."""
    place = tmp_path_factory.mktemp("demo")
    report = pipeline.compress(
        demo.NETWORK, weights=demo.WEIGHTS, data=demo.TRAIN, test_data=demo.TEST, output=place / "small"
    )
    assert report["accuracy"]["original"] > 0.9
    assert report["accuracy"]["compressed"] > report["accuracy"]["original"] - 0.01
    assert report["bytes"] < 0.3 * report["original"]["bytes"]
    pipeline.export(str(place / "small"), output=place / "host")
    return place


def answers(artifact, runtime, count):
    x = {"image": fashion_resnet.test()["image"][:count]}
    item = pipeline.artifacts.load(artifact)
    with pipeline._open(item, runtime, 1) as session:
        return session.run(x)["output"]


def test_microcontroller_and_host_give_the_same_bits(folder):
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    report = pipeline.export(str(folder / "small"), target="stm32f746", output=folder / "mcu")
    assert report["warnings"] == []
    assert report["flash_bytes"] < 100_000 and report["ram_bytes"] < 50_000
    want = answers(folder / "host", "ort", 200)
    assert np.array_equal(answers(folder / "mcu", "c", 200), want)
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    assert np.array_equal(answers(folder / "mcu", "emulator", 2), want[:2])
    profile = pipeline.profile(folder / "mcu")
    assert profile["kind"] == "emulated"
    assert profile["instructions"] == pipeline.profile(folder / "mcu")["instructions"]
    assert sum(layer["instructions"] for layer in profile["layers"]) <= profile["instructions"]
    assert sum(layer["macs"] for layer in profile["layers"]) == profile["macs"] == 9_345_920


@pytest.mark.qemu
def test_raspberry_pi_and_host_give_the_same_bits(folder):
    pytest.importorskip("tvm", reason="apache-tvm is not installed (extra 'tvm')")
    pipeline.export(str(folder / "small"), target="raspberry-pi-4", output=folder / "pi")
    try:
        got = answers(folder / "pi", "tvm", 4)
    except Missing as reason:
        pytest.skip(str(reason))
    assert np.array_equal(got, answers(folder / "host", "ort", 4))


def test_table_shows_every_row_and_says_what_was_not_run():
    rows = [
        {"name": "original", "target": "host", "format": "onnx", "bytes": 1000, "macs": 10, "accuracy": 0.9, "n": 5,
         "latency_ms": 1.0, "kind": "measured"},
        {"name": "compressed", "target": "raspberry-pi-4", "skipped": "needs qemu-aarch64"},
    ]  # fmt: skip
    table = demo.table({"rows": rows})
    assert table.row_count == 2
    assert "needs qemu-aarch64" in str(table.caption)
