"""The shape of the house: imports run one way, packages are listed, importing is free, plug-ins are whole."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pydantic
import pytest
from planish.common import plugins
from planish.compress import recipe
from planish.compress.passes import Pass
from planish.export.format import Format
from planish.kernels.op import Op
from planish.runtimes.session import Runtime
from planish.targets import target

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("common", "targets", "kernels", "compress", "export", "runtimes")
OUTSIDE = ("tests", "benchmarks", "examples", "docs", "build")


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in OUTSIDE and not parts[0].startswith("."):
            yield path, parts


def level(folder):
    """Place in the order; the root files (and demo/) come last and may import everything."""
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


def imported_folders(path, parts):
    """Top folders of planish that a file imports, with the line of each import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(parts[:-1])
            base = base[: len(base) - (node.level - 1)]
            full = base + (node.module.split(".") if node.module else [])
            names = [full[0]] if full else [a.name for a in node.names]
            for name in names:
                yield name, node.lineno
        elif (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "planish") or (
            isinstance(node, ast.Import) and any(a.name.split(".")[0] == "planish" for a in node.names)
        ):
            yield "absolute import of planish", node.lineno


def test_imports_run_one_way():
    wrong = []
    for path, parts in sources():
        own = parts[0] if len(parts) > 1 else "root"
        for folder, line in imported_folders(path, parts):
            if folder == "absolute import of planish":
                wrong.append(f"{path.relative_to(ROOT)}:{line}: inside the package imports are relative")
            elif level(folder) > level(own):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {folder}")
    assert not wrong, "\n".join(wrong)


def test_listed_packages_are_the_folders_on_disk():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(["planish", *parts[:-1]]) for path, parts in sources() if path.name == "__init__.py"}
    assert listed == found


def test_importing_planish_loads_no_torch():
    code = "import sys, planish, planish.cli; print([m for m in ('torch', 'onnx', 'tvm', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_importable_under_a_bare_name():
    for folder in ORDER:
        done = subprocess.run(
            [sys.executable, "-c", f"import {folder}; print({folder}.__file__)"],
            capture_output=True, text=True, cwd="/", check=False,
        )  # fmt: skip
        assert str(ROOT) not in done.stdout


@pytest.mark.parametrize(
    "base, package", [(Pass, "compress"), (Format, "export"), (Runtime, "runtimes"), (Op, "kernels")]
)
def test_every_plugin_is_found_and_documented(base, package):
    found = plugins.find(f"planish.{package}", base)
    assert found
    for name, kind in found.items():
        assert kind.__doc__, name
        if issubclass(kind, pydantic.BaseModel):
            assert kind.model_config.get("frozen") and kind.model_config.get("extra") == "forbid", name
        else:
            kind()


def test_every_runtime_runs_a_format_that_exists():
    formats = set(plugins.find("planish.export", Format))
    for name, kind in plugins.find("planish.runtimes", Runtime).items():
        assert kind.formats and set(kind.formats) <= formats, name


def test_every_target_names_what_exists():
    formats, runtimes = plugins.find("planish.export", Format), plugins.find("planish.runtimes", Runtime)
    for name in target.names():
        device = target.load(name)
        assert device.format in formats and device.runtime in runtimes, name
        assert device.format in runtimes[device.runtime].formats, name
        assert device.recipe in recipe.names(), name
        assert (device.kind == "mcu") == (device.flash is not None) == (device.ram is not None), name


def test_every_bundled_recipe_is_valid():
    for name in recipe.names():
        found = recipe.load(name)
        assert found.name == name
        assert found.passes


def test_shipped_files_name_no_machine():
    """Nothing that ships speaks of where it was made."""
    pattern = re.compile(r"/work/|/root/")
    wrong = [str(path.relative_to(ROOT)) for path, _ in sources() if pattern.search(path.read_text(encoding="utf-8"))]
    assert not wrong
