"""The generated project: compiles without warnings, passes its own test and the sanitizers, fits or says why not."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from planish.common.errors import PlanishError
from planish.export import c_project, firmware, qdq
from planish.export.c import C
from planish.export.format import Source
from planish.targets import target as targets
from planish.targets.target import Memory

NAMES = ("residual", "branches", "flatten", "matmul", "channels_last", "padded")
STRICT = ["-std=c99", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I.", "-Ikernels"]
NEEDS_ZIG = pytest.mark.skipif(not firmware.available(), reason="ziglang is not installed (extra 'mcu')")


def write(made, folder, name="tiny", target="host"):
    model, x = made
    folder.mkdir(parents=True, exist_ok=True)
    return C().write(Source(model, {"x": x[:3]}, name), targets.load(target), folder)


def run_test(folder, compiler, *options, name="tiny"):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    sources = [str(p.relative_to(folder)) for p in sorted([*folder.glob("*.c"), *folder.glob("kernels/*.c")])]
    built = subprocess.run(
        [compiler, *STRICT, *options, *sources, "-o", "t"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[:2000]
    done = subprocess.run(["./t"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compiles_strictly_and_passes_its_own_test(compiler, tiny, tmp_path):
    for name in NAMES:
        write(tiny(name), tmp_path / name)
        run_test(tmp_path / name, compiler)


def test_sanitizers_find_nothing(tiny, tmp_path):
    for name in NAMES:
        write(tiny(name), tmp_path / name)
        run_test(tmp_path / name, "clang", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_known_answer_test_fails_on_a_wrong_answer(tiny, tmp_path):
    write(tiny("flatten"), tmp_path)
    text = (tmp_path / "tiny_test.c").read_text()
    broken = re.sub(r"(expected\[7\] = \{\n    )(-?\d+)", lambda m: f"{m[1]}{int(m[2]) // 2 + 1}", text)
    assert broken != text
    (tmp_path / "tiny_test.c").write_text(broken)
    with pytest.raises(AssertionError):
        run_test(tmp_path, "gcc")


def test_no_allocation_no_library_in_the_model(tiny, tmp_path):
    write(tiny("branches"), tmp_path)
    for path in [tmp_path / "tiny.c", tmp_path / "tiny_weights.c", *tmp_path.glob("kernels/*.c")]:
        includes = set(re.findall(r'#include [<"](.*?)[>"]', path.read_text()))
        assert includes <= {"tiny.h", "tiny_weights.h", "planish.h", "stdint.h"}, path


@NEEDS_ZIG
def test_same_input_same_bytes(tiny, tmp_path):
    folders = [tmp_path / "one", tmp_path / "elsewhere" / "two"]
    for folder in folders:
        write(tiny("residual"), folder, target="stm32f746")
    files = sorted(p.relative_to(folders[0]) for p in folders[0].rglob("*") if p.is_file())
    assert any(p.name == "firmware.elf" for p in files)
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


@NEEDS_ZIG
@pytest.mark.parametrize("name", [n for n in targets.names() if targets.load(n).kind == "mcu"])
def test_firmware_links_for_every_microcontroller(name, tiny, tmp_path):
    written = write(tiny("residual"), tmp_path, target=name)
    target = targets.load(name)
    assert target.ram is not None
    assert written.flash_bytes is not None
    assert written.ram_bytes is not None
    sizes = written.details["sizes"]
    assert (
        written.flash_bytes == sizes["code"] + sizes["constants"] + sizes["data"] > written.details["memory"]["weights"]
    )
    assert written.details["memory"]["arena"] <= sizes["bss"] < written.ram_bytes < target.ram.length
    script = (tmp_path / "firmware" / f"{name}.ld").read_text()
    assert f"LENGTH = 0x{target.ram.length:x}" in script
    assert not written.warnings


def test_without_ziglang_the_sizes_are_named_estimates(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(firmware, "available", lambda: False)
    written = write(tiny("flatten"), tmp_path, target="stm32f746")
    assert "estimates" in written.warnings[0]
    assert not (tmp_path / "firmware.elf").exists()
    assert written.flash_bytes is not None


def test_manifest_says_how_codes_lie(tiny, tmp_path):
    written = write(tiny("residual"), tmp_path)
    (x,) = written.inputs
    assert (x["name"], x["dtype"], x["layout"], x["order"]) == ("x", "float32", "NHWC", [0, 2, 3, 1])
    assert x["shape"] == ["n", 3, 8, 8]
    assert x["code_dtype"] == "int8"
    assert x["function"] == "tiny_input"
    memory = written.details["memory"]
    assert memory["arena"] >= memory["least"] > 0
    assert memory["bound"] == 3 * 6 * 64  # the tensors of the residual add
    assert json.loads((tmp_path / "model.json").read_text())["macs"] == written.details["macs"]


def small(**memories):
    target = targets.load("stm32f746")
    return target.model_copy(
        update={k: Memory(origin=getattr(target, k).origin, length=n) for k, n in memories.items()}
    )


def too_large(made, target, folder):
    with pytest.raises(PlanishError) as caught:
        C().write(Source(made[0], {"x": made[1][:1]}, "tiny"), target, folder)
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_too_little_ram_names_the_peak(tiny, tmp_path):
    message = too_large(tiny("residual"), small(ram=2600), tmp_path)
    project = c_project.build(qdq.read(tiny("residual")[0]), "tiny", targets.load("stm32f746").features)
    over = project.memory.plan.arena + firmware.STACK - 2600
    assert f"{over} over its 2600" in message
    assert "at layer 'conv_c' (conv2d)" in message
    assert "bytes (6 x 8 x 8)" in message


def test_too_little_flash_names_the_weights(tiny, tmp_path):
    message = too_large(tiny("flatten"), small(flash=1024), tmp_path)
    assert "over its 1024 of flash" in message
    assert "'gemm_y'" in message


@NEEDS_ZIG
def test_too_little_flash_for_the_code_is_found_by_the_linker(tiny, tmp_path):
    with pytest.raises(PlanishError, match=r"overflows FLASH by [0-9]+ bytes"):
        C().write(Source(tiny("flatten")[0], {"x": tiny("flatten")[1][:1]}, "tiny"), small(flash=3072), tmp_path)


@pytest.mark.parametrize("name", ["int", "9 lives", "été", "planish", "kernels", "a-b.c/d", ""])
def test_any_model_name_gives_c_that_compiles(name, tiny, tmp_path):
    write(tiny("flatten"), tmp_path, name=name)
    run_test(tmp_path, "gcc")


def test_identifiers_never_collide():
    taken = set()
    names = [c_project.identifier(n, taken) for n in ["a/b", "a.b", "A b", "while", "1", "", "x" * 200, "x" * 200]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", n) for n in names)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 3.4e38, 123456.78, -0.0])
def test_floats_keep_their_bits(value):
    text = c_project.number(value)
    assert text.endswith("f")
    assert np.float32(text[:-1]).tobytes() == np.float32(value).tobytes()


def test_quantize_helper_is_onnx_quantize_linear(tiny, tmp_path):
    """The C helpers agree with numpy on ties, on both ends and beyond."""
    write(tiny("flatten"), tmp_path)
    port = qdq.read(tiny("flatten")[0]).inputs[0]
    scale = port.tensor.scale
    values = np.concatenate([np.arange(-300, 300, 0.5, np.float32) * scale, np.float32([1e9, -1e9])]).astype(np.float32)
    want = port.to_codes(values.reshape(-1, 1, 1, 1)).reshape(-1)
    numbers = ",".join(c_project.number(v) for v in values)
    codes = ",".join(str(v) for v in want.tolist())
    (tmp_path / "tiny_test.c").write_text(
        f'#include "tiny.h"\nstatic const float v[] = {{{numbers}}};\nstatic const int8_t w[] = {{{codes}}};\n'
        f"int main(void) {{ int i, bad = 0; for (i = 0; i < {len(values)}; i++) bad += tiny_quantize(v[i]) != w[i]; return bad != 0; }}\n"
    )
    run_test(tmp_path, "gcc")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_build_files(tiny, tmp_path):
    write(tiny("matmul"), tmp_path, target="stm32f746" if firmware.available() else "host")
    subprocess.run(["make", "-s", "test"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["cmake", "-S", ".", "-B", "build"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", "build"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["ctest", "--test-dir", "build"], cwd=tmp_path, check=True, capture_output=True)


@NEEDS_ZIG
def test_firmware_carries_no_debug_sections(tiny, tmp_path):
    """They would name places of the machine that built the compiler's library; a build of the user's may have them."""
    write(tiny("residual"), tmp_path, target="stm32f446")
    names = {s.name for s in firmware.elf_file(tmp_path / "firmware.elf").iter_sections()}
    assert ".symtab" in names
    assert not [n for n in names if n.startswith(".debug")]
    assert ".debug" not in (tmp_path / "firmware" / "stm32f446.ld").read_text()
