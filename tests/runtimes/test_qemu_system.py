"""The firmware on QEMU's Cortex-M55 board: same outputs as on this machine, exact counts, one clear line when something is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from planish.common.errors import Missing, PlanishError
from planish.export import firmware
from planish.export.artifact import Artifact
from planish.export.c import C
from planish.export.format import Source
from planish.runtimes import qemu_system
from planish.runtimes.emulator import Emulator
from planish.targets import target as targets

pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
pytest.importorskip("elftools", reason="pyelftools is not installed (extra 'mcu')")
installed = pytest.mark.skipif(shutil.which(qemu_system.PROGRAM) is None, reason="qemu-system-arm is not installed")
TARGET = "corstone-300"


def artifact(made, folder):
    model, x = made
    folder.mkdir(parents=True, exist_ok=True)
    C().write(Source(model, {"x": x[:1]}, "tiny"), targets.load(TARGET), folder)
    return Artifact(folder, {"format": "c", "target": TARGET})


@pytest.mark.qemu
@installed
def test_equals_onnxruntime_and_counts_repeat(tiny, ort_outputs, tmp_path):
    model, x = tiny("branches")
    with Emulator().open(artifact((model, x), tmp_path), 1) as session:
        np.testing.assert_array_equal(session.run({"x": x[:3]})["y"], ort_outputs(model, {"x": x[:3]})["y"])
        first, second = (session.profile({"x": x[:1]}, 1, 0) for _ in range(2))
        after = session.run({"x": x[:3]})["y"]
    np.testing.assert_array_equal(after, ort_outputs(model, {"x": x[:3]})["y"])
    assert first == second
    assert first.kind == "emulated"
    assert first.environment["emulator"].startswith("QEMU ")
    sizes = firmware.sizes(tmp_path / "firmware.elf")
    assert first.flash_bytes == sizes.flash
    assert 0 < first.stack_bytes < firmware.STACK
    for total in ("instructions", "loads", "stores", "branches"):
        whole, counted = getattr(first, total), sum(getattr(layer, total) for layer in first.layers)
        assert whole - 40 < counted <= whole, total  # the rest is the return from the last layer
        assert all(getattr(layer, total) > 0 for layer in first.layers), total
    assert first.loads + first.stores < 2 * first.instructions


COUNTED = """
#include <stdint.h>
int main(void);
void planish_ready(void);
void planish_done(void);
void planish_layer_done(int layer);
void tiny_run(void);
uint32_t arena[1024];
__attribute__((noinline, used)) void planish_ready(void) { __asm__ volatile("" ::: "memory"); }
__attribute__((noinline, used)) void planish_done(void) { __asm__ volatile("" ::: "memory"); }
__attribute__((noinline, used)) void planish_layer_done(int layer) { __asm__ volatile("" ::"r"(layer) : "memory"); }
/* the first layer: 1 + 1 + 10 * 6 + 2 = 64 instructions before the call's own two, 10 + 4 * 10 words, 9 branches */
__attribute__((naked, noinline)) void tiny_run(void)
{
    __asm__ volatile(
        "push {r4, lr}\\n"
        "ldr r2, =arena\\n"
        "movs r3, #10\\n"
        "1: ldr r0, [r2]\\n"
        "vldrb.8 q0, [r2]\\n"
        "vstrb.8 q0, [r2, #16]\\n"
        "strh r0, [r2, #40]\\n"
        "subs r3, #1\\n"
        "bne 1b\\n"
        "movs r0, #0\\n"
        "bl planish_layer_done\\n"
        "movs r0, #1\\n"
        "bl planish_layer_done\\n"
        "pop {r4, pc}\\n");
}
int main(void)
{
    for (;;) {
        planish_ready();
        tiny_run();
        planish_done();
    }
}
"""


def assembled(tiny, folder, source):
    """An artifact whose firmware is `source` with the project's start-up code and linker script."""
    made = artifact(tiny("flatten"), folder)
    (folder / "other.c").write_text(source)
    script = next(folder.rglob("*.ld")).relative_to(folder)
    startup = next(folder.rglob("startup.c")).relative_to(folder)
    firmware.link(folder, ["other.c", str(startup)], str(script), targets.load(TARGET), "firmware.elf")
    return made


@pytest.mark.qemu
@installed
def test_counts_of_known_code(tiny, tmp_path):
    made = assembled(tiny, tmp_path, COUNTED)
    with Emulator().open(made, 1) as session:
        x = [np.zeros(b.size, np.int8) for b in session.model.inputs]
        counts = session.machine.count(x)
    first, second = counts.layers
    assert (first.instructions, first.loads, first.stores, first.branches) == (3 + 60 + 2, 1 + 50, 2 + 50, 9 + 1)
    assert (second.instructions, second.loads, second.stores, second.branches) == (2, 0, 0, 1)
    rest = counts.total - first - second  # the return, and the call of planish_done
    assert (rest.instructions, rest.loads, rest.stores, rest.branches) == (2, 2, 0, 2)


@pytest.mark.qemu
@installed
def test_a_fault_names_the_place(tiny, tmp_path):
    made = assembled(tiny, tmp_path, COUNTED.replace("movs r3, #10", "udf #0"))
    with Emulator().open(made, 1) as session, pytest.raises(PlanishError, match=r"faulted at pc 0x\w+ in tiny_run"):
        session.run({b.name: np.zeros(b.shape, np.uint8) for b in session.model.inputs})


@pytest.mark.qemu
@installed
def test_firmware_that_hangs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(qemu_system, "TIMEOUT", 1.0)
    made = assembled(tiny, tmp_path, COUNTED.replace("movs r3, #10", "b ."))
    with (
        Emulator().open(made, 1) as session,
        pytest.raises(PlanishError, match=r"did not reach planish_done.*in tiny_run"),
    ):
        session.run({b.name: np.zeros(b.shape, np.uint8) for b in session.model.inputs})


@pytest.mark.qemu
@installed
def test_lockup(tiny, tmp_path):
    made = artifact(tiny("flatten"), tmp_path)
    elf = bytearray((tmp_path / "firmware.elf").read_bytes())
    at = firmware.elf_file(tmp_path / "firmware.elf").get_section_by_name(".text")["sh_offset"]
    elf[at : at + 64] = bytes(64)  # no vectors: neither a stack nor a handler
    (tmp_path / "firmware.elf").write_bytes(elf)
    with pytest.raises(PlanishError, match="Lockup"):
        Emulator().open(made, 1)


@pytest.mark.qemu
@installed
def test_board_that_qemu_lacks(tiny, tmp_path, monkeypatch):
    made = artifact(tiny("flatten"), tmp_path)
    given = targets.load(TARGET)
    monkeypatch.setattr(targets, "load", lambda _: given.model_copy(update={"emulator_cpu": "mps9-an1"}))
    with pytest.raises(Missing, match=r"QEMU .* did not start the board 'mps9-an1': .*unsupported machine"):
        Emulator().open(made, 1)


def test_no_qemu(tiny, tmp_path, monkeypatch):
    made = artifact(tiny("flatten"), tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(Missing, match="apt-get install qemu-system-arm"):
        Emulator().open(made, 1)


@pytest.mark.qemu
@installed
def test_qemu_that_does_not_take_the_plugin(tiny, tmp_path, monkeypatch):
    made = artifact(tiny("flatten"), tmp_path)
    broken = tmp_path / "no-plugin"
    broken.write_bytes(b"")
    monkeypatch.setattr(qemu_system.qemu_user, "built", lambda *_: Path(broken))
    with Emulator().open(made, 1) as session:
        sample = {b.name: np.zeros(b.shape, np.uint8) for b in session.model.inputs}
        session.run(sample)
        with pytest.raises(Missing, match=r"QEMU .* did not start"):
            session.profile(sample, 1, 0)


def test_artifact_without_firmware(tiny, tmp_path):
    made = artifact(tiny("flatten"), tmp_path)
    (tmp_path / "firmware.elf").unlink()
    with pytest.raises(PlanishError, match=r"no firmware\.elf"):
        Emulator().open(made, 1)
