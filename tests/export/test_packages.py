"""Arduino library and Zephyr module: complete by their own layout's rules, same codes, no byte different between runs."""

import json
import re
import shutil
import subprocess

import pytest
from planish import pipeline
from planish.common.errors import PlanishError
from planish.export import firmware, packages
from planish.targets import target as targets

CC, CXX = shutil.which("gcc"), shutil.which("g++")
ARDUINO_H = """
#include <stdint.h>
struct Port { void begin(long) {} template <class T> void print(T) {} template <class T> void println(T) {} };
static Port Serial;
static unsigned long micros() { return 0; }
static void delay(unsigned long) {}
"""
"""the part of Arduino.h that the example uses"""
ZEPHYR_CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(check C)
set(CONFIG_{symbol} y)
function(zephyr_library_named name)
    add_library(${{name}} STATIC)
    set(current ${{name}} PARENT_SCOPE)
endfunction()
function(zephyr_library_sources)
    target_sources(${{current}} PRIVATE ${{ARGV}})
endfunction()
function(zephyr_library_include_directories)
    target_include_directories(${{current}} PRIVATE ${{ARGV}})
endfunction()
function(zephyr_library_compile_options)
    target_compile_options(${{current}} PRIVATE ${{ARGV}})
endfunction()
function(zephyr_include_directories)
    include_directories(${{ARGV}})
    target_include_directories(${{current}} PRIVATE ${{ARGV}})
endfunction()
include({module}/zephyr/CMakeLists.txt)
add_executable(check {module}/{name}_test.c)
target_link_libraries(check {name})
"""
"""Zephyr's functions as plain CMake: what they do to a library, without the kernel"""


@pytest.fixture(scope="module")
def exported(small_tflite, tmp_path_factory):
    """exported(target) -> the artifact of a small network with both packages, made once each."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "small.tflite").write_bytes(small_tflite)

    def make(target):
        out = folder / target
        if not out.exists():
            model, both = str(folder / "small.tflite"), ("arduino", "zephyr", "cmake")
            pipeline.export(model, target=target, format="c", output=out, package=both)
        return out

    return make


def objects(library, tmp_path, command):
    """Every C file below src, compiled by itself as Arduino's builder does."""
    sources = sorted((library / "src").rglob("*.c"))
    made = []
    for k, source in enumerate(sources):
        made.append(str(tmp_path / f"{k}.o"))
        subprocess.run([*command, "-c", f"-I{library / 'src'}", str(source), "-o", made[-1]], check=True)
    return made


@pytest.mark.skipif(CC is None or CXX is None, reason="no gcc and g++")
@pytest.mark.parametrize("target", ["host", "stm32f446", "corstone-300"])
def test_arduino_library_builds_by_its_layout_and_gives_the_known_answer(target, exported, tmp_path):
    library = exported(target) / "arduino" / "small"
    (tmp_path / "Arduino.h").write_text(ARDUINO_H)
    assert CC
    assert CXX
    # as Arduino: optimized for size, GNU C, no option from the library; -march=native where it would fuse products and sums
    made = objects(library, tmp_path, [CC, "-Os", "-std=gnu11", "-march=native", "-Wall", "-Wextra", "-Werror"])
    example = library / "examples" / "known_answer"
    subprocess.run(
        [CC, "-c", f"-I{library / 'src'}", str(example / "known_answer.c"), "-o", str(tmp_path / "example.o")],
        check=True,
    )
    sketch = ["-x", "c++", str(example / "known_answer.ino"), "-include", str(tmp_path / "Arduino.h")]
    subprocess.run([CXX, "-c", f"-I{library / 'src'}", *sketch, "-o", str(tmp_path / "sketch.o")], check=True)
    (tmp_path / "main.c").write_text("int small_test(void); int main(void) { return small_test() != 0; }\n")
    program = str(tmp_path / "check")
    subprocess.run([CC, str(tmp_path / "main.c"), str(tmp_path / "example.o"), *made, "-o", program], check=True)
    subprocess.run([program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rp2040", "nrf52840"])
def test_arduino_library_builds_for_a_core(name, exported, tmp_path):
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    command = [
        *firmware.compiler(),
        *firmware.flags(targets.load(name)),
        "-Os",
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    assert objects(exported(name) / "arduino" / "small", tmp_path, command)


def test_arduino_library_properties(exported):
    library = exported("stm32f446") / "arduino" / "small"
    text = (library / "library.properties").read_text()
    found = dict(line.split("=", 1) for line in text.splitlines())
    wanted = "name version author maintainer sentence paragraph category url architectures includes"
    assert list(found) == wanted.split()
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", found["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["version"])
    assert (library / "src" / found["includes"]).is_file()
    for file in (library / "src").rglob("*"):
        for included in re.findall(r'#include "([^"]+)"', file.read_text()) if file.is_file() else ():
            assert (library / "src" / included).is_file() or (file.parent / included).is_file(), (file, included)


@pytest.mark.skipif(shutil.which("cmake") is None or CC is None, reason="no cmake and gcc")
@pytest.mark.parametrize("target", ["host", "stm32f446"])
def test_zephyr_module_builds_and_gives_the_known_answer(target, exported, tmp_path):
    import yaml

    folder = exported(target)
    module = yaml.safe_load((folder / "zephyr" / "module.yml").read_text())
    assert (folder / module["build"]["cmake"] / "CMakeLists.txt").is_file()
    kconfig = (folder / module["build"]["kconfig"]).read_text()
    assert "config PLANISH_SMALL\n" in kconfig
    assert ("imply FPU" in kconfig) == ("fpu" in targets.load(target).features)
    text = ZEPHYR_CMAKE.format(symbol="PLANISH_SMALL", module=folder, name="small")
    (tmp_path / "CMakeLists.txt").write_text(text)
    for step in (["-B", "build", "."], ["--build", "build"]):
        subprocess.run(["cmake", *step], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([str(tmp_path / "build" / "check")], check=True)
    conf = (folder / "zephyr" / "sample" / "prj.conf").read_text()
    assert "CONFIG_PLANISH_SMALL=y" in conf


def test_the_manifest_has_the_packages(exported):
    manifest = json.loads((exported("host") / "manifest.json").read_text())
    assert "arduino/small/library.properties" in manifest["files"]
    assert "zephyr/sample/src/main.c" in manifest["files"]
    assert pipeline.verify(exported("host"), runtime="c")["exact"]


def test_unknown_packages_and_other_formats_are_refused(small_tflite, tmp_path):
    (tmp_path / "small.tflite").write_bytes(small_tflite)
    for kinds, format, text in ((["conan"], "c", "make, cmake, arduino, zephyr"), (["arduino"], "onnx", "format c")):
        with pytest.raises(PlanishError, match=text):
            pipeline.export(str(tmp_path / "small.tflite"), format=format, output=tmp_path / "out", package=kinds)
        assert not (tmp_path / "out").exists()


def test_the_same_bytes_again(exported, tmp_path):
    folder = exported("stm32f446")
    shutil.copytree(folder, tmp_path / "again", ignore=shutil.ignore_patterns("arduino", "zephyr"))
    packages.write(["zephyr", "arduino"], tmp_path / "again", targets.load("stm32f446"), "0.1.0")
    for kind in ("arduino", "zephyr"):
        files = sorted(p.relative_to(folder) for p in (folder / kind).rglob("*") if p.is_file())
        assert files == sorted(
            p.relative_to(tmp_path / "again") for p in (tmp_path / "again" / kind).rglob("*") if p.is_file()
        )
        assert all((folder / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
