"""Functions in the user's own files: `path/to/file.py:name` or `package.module:name`, found and called with clear errors."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import PlanishError, listed


def names_code(spec: str) -> bool:
    """Whether `spec` has the form 'something:name'."""
    place, colon, name = spec.rpartition(":")
    return bool(colon and place and name.isidentifier())


def call(spec: str) -> Any:
    """The result of calling the function that `spec` names, without arguments.

    Raises PlanishError for a file, module or function that is not there (listing what is), and for whatever the user's
    code raises: one line with the exception, the file and the line.
    """
    place, _, name = spec.rpartition(":")
    with _importable(place), _located(spec):
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        if not hasattr(module, name):
            raise PlanishError(
                f"'{place}' has no '{name}'; it defines {listed(_callables(module), 8) or 'no functions'}"
            )
        function = getattr(module, name)
        if not callable(function):
            raise PlanishError(f"'{spec}' is a {type(function).__name__}; a function without arguments is expected")
        return function()


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PlanishError(f"file '{path}' does not exist")
    name = f"planish_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(place: str) -> Iterator[None]:
    """Let the user's code import its neighbours: the file's own folder, or the working directory for a module."""
    folder = str(Path(place).resolve().parent if place.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it itself
            sys.path.remove(folder)


@contextlib.contextmanager
def _located(spec: str) -> Iterator[None]:
    """Turn what the user's code raises into one line that says where."""
    try:
        yield
    except PlanishError:
        raise
    except (Exception, SystemExit) as error:
        place = spec.rpartition(":")[0]
        if isinstance(error, ModuleNotFoundError) and error.name and f"{place}.".startswith(f"{error.name}."):
            raise PlanishError(
                f"module '{error.name}' of '{spec}' is not found; a module name or a path ending in .py is accepted"
            ) from None
        text = (str(error).strip() or "no message").splitlines()[0][:200]
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        else:
            frames = traceback.extract_tb(error.__traceback__)
            own = [f for f in frames if f.filename.endswith(Path(place).name)] or frames
            where = f"{own[-1].filename}:{own[-1].lineno}"
        raise PlanishError(f"'{spec}' raised {type(error).__name__}: {text} ({where})") from error


def _callables(module: ModuleType) -> list[str]:
    found = [n for n, v in vars(module).items() if inspect.isfunction(v) or inspect.isclass(v)]
    return [n for n in found if getattr(module, n).__module__ == module.__name__]
