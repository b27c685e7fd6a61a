"""The firmware on emulated cores: same outputs as on this machine, exact and repeatable instruction counts."""

import shutil

import numpy as np
import pytest
from planish.common.errors import PlanishError
from planish.export import firmware
from planish.export.artifact import Artifact
from planish.export.c import C
from planish.export.format import Source
from planish.runtimes.emulator import Emulator
from planish.targets import target as targets

pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
pytest.importorskip("elftools", reason="pyelftools is not installed (extra 'mcu')")

UNICORN = [n for n in targets.names() if targets.load(n).emulator == "unicorn"]


def artifact(made, folder, target):
    model, x = made
    folder.mkdir(parents=True, exist_ok=True)
    C().write(Source(model, {"x": x[:1]}, "tiny"), targets.load(target), folder)
    return Artifact(folder, {"format": "c", "target": target})


@pytest.mark.parametrize("target", UNICORN)
def test_equals_onnxruntime_on_every_core(target, tiny, ort_outputs, tmp_path):
    model, x = tiny("branches")
    with Emulator().open(artifact((model, x), tmp_path, target), 1) as session:
        np.testing.assert_array_equal(session.run({"x": x[:3]})["y"], ort_outputs(model, {"x": x[:3]})["y"])


@pytest.mark.parametrize("name", ["residual", "flatten", "channels_last"])
def test_counts_are_exact_and_repeat(name, tiny, tmp_path):
    made = tiny(name)
    with Emulator().open(artifact(made, tmp_path, "stm32f446"), 1) as session:
        sample = {"x": made[1][:1]}
        first, second = (session.profile(sample, 1, 0) for _ in range(2))
        steps = session.machine.count_steps([p[0] for p in session.model.pack(sample)])
    assert first == second
    assert first.kind == "emulated"
    assert first.instructions == steps
    counted = sum(layer.instructions or 0 for layer in first.layers)
    assert steps - 40 < counted <= steps  # the rest is the return from the last layer
    for kind in ("loads", "stores", "branches"):
        assert all(0 < getattr(layer, kind) < layer.instructions for layer in first.layers)
    assert (first.macs or 0) < steps
    sizes = firmware.sizes(tmp_path / "firmware.elf")
    assert first.flash_bytes == sizes.flash
    assert first.ram_bytes == sizes.ram + (first.stack_bytes or 0)
    assert 0 < (first.stack_bytes or 0) < firmware.STACK


def test_a_fault_names_the_place(tiny, tmp_path):
    made = tiny("flatten")
    with Emulator().open(artifact(made, tmp_path, "stm32f746"), 1) as session:
        # a branch to nowhere at the entry of the model
        session.machine.uc.mem_write(session.machine.symbols["tiny_run"], b"\xdf\xf8\x00\xf0\xff\xff\xff\x0f")
        with pytest.raises(PlanishError, match="faulted at pc 0x"):
            session.run({"x": made[1][:1]})


def test_artifact_without_firmware(tiny, tmp_path):
    made = artifact(tiny("flatten"), tmp_path / "a", "stm32f746")
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("firmware.elf"))
    with pytest.raises(PlanishError, match=r"no firmware\.elf"):
        Emulator().open(Artifact(tmp_path / "b", made.manifest), 1)
