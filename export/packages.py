"""The C project of an artifact as other build systems want it: an Arduino library, a Zephyr module.

Makefile and CMakeLists.txt are always in the project. Both packages here hold the same sources: the Zephyr module builds the
project's own files, the Arduino library is a folder of its own, since Arduino compiles every C file below `src`, gives
no include path but `src` and no compiler options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..common import files
from ..common.errors import PlanishError, listed
from ..targets.target import Target

TEMPLATES = Path(__file__).parent / "c_templates"
MODEL = "model.json"
ALWAYS = ("make", "cmake")
"""what every project is"""
OPTIONS = "planish_options.h"


def check(kinds: Sequence[str], format: str) -> None:
    """Raise PlanishError for a package that is not known, and for another format than `c`."""
    unknown = [k for k in kinds if k not in (*ALWAYS, *WRITERS)]
    if unknown:
        raise PlanishError(f"unknown package {listed(unknown)}; accepted: {', '.join((*ALWAYS, *WRITERS))}")
    if kinds and format != "c":
        raise PlanishError(f"--package is for format c; '{format}' was asked for")


def write(kinds: Sequence[str], folder: Path, target: Target, version: str) -> None:
    """Add the packages to a folder that format `c` has written. `version` is planish's, which Arduino wants in numbers."""
    for kind in dict.fromkeys(kinds):
        if kind in WRITERS:
            WRITERS[kind](folder, files.read_json(folder / MODEL), target, version)


def _arduino(folder: Path, facts: Mapping[str, Any], target: Target, version: str) -> None:
    """arduino/<name>: library.properties, src with every source, an example that checks the known answer."""
    name = facts["name"]
    library = folder / "arduino" / name
    source, example = library / "src", library / "examples" / "known_answer"
    compiled = set(facts["sources"])
    kernels = [p.relative_to(folder).as_posix() for p in sorted((folder / "kernels").rglob("*.[ch]"))]
    for path in (f"{name}.h", f"{name}_weights.h", *(s for s in facts["sources"] if s not in kernels), *kernels):
        # a kernel that others include is no source of its own here: Arduino would compile it
        own = path.removeprefix("kernels/")
        own = re.sub(r"\.c$", ".inc", own) if path.endswith(".c") and path not in compiled else own
        text = (folder / path).read_text(encoding="utf-8")
        text = re.sub(r'^(#include "[^"]*)\.c"', r'\1.inc"', text, flags=re.MULTILINE)
        if path in compiled:
            text = f'#include "{OPTIONS}"\n{text}'
        _put(source / own, text)
    _render(source / OPTIONS, "arduino_options.h.jinja", {})
    _render(
        library / "library.properties", "arduino_library.jinja", {"name": name, "target": target, "version": version}
    )
    _render(example / "known_answer.ino", "arduino_example.jinja", {"name": name})
    test = (folder / f"{name}_test.c").read_text(encoding="utf-8")
    _put(example / "known_answer.c", f"#define PLANISH_NO_MAIN\n{test}")


def _zephyr(folder: Path, facts: Mapping[str, Any], target: Target, version: str) -> None:
    """zephyr/: module.yml, CMakeLists.txt and Kconfig, which make the project's folder a module, and a sample application."""
    values = {
        "name": facts["name"],
        "symbol": f"PLANISH_{facts['name'].upper()}",
        "sources": facts["sources"],
        "target": target,
    }
    place = folder / "zephyr"
    for path, template in {
        "module.yml": "zephyr_module.jinja",
        "CMakeLists.txt": "zephyr_cmake.jinja",
        "Kconfig": "zephyr_kconfig.jinja",
        "sample/CMakeLists.txt": "zephyr_sample_cmake.jinja",
        "sample/prj.conf": "zephyr_sample_conf.jinja",
        "sample/src/main.c": "zephyr_sample_main.c.jinja",
    }.items():
        _render(place / path, template, values)


WRITERS: Mapping[str, Callable[[Path, Mapping[str, Any], Target, str], None]] = {"arduino": _arduino, "zephyr": _zephyr}


def _render(path: Path, template: str, values: Mapping[str, Any]) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    _put(path, environment.get_template(template).render(**values))


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
