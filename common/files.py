"""Outputs that are whole or absent, hashes, and one spelling of JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import PlanishError


def check_output(path: Path, force: bool) -> None:
    """Raise PlanishError now, before any work, if `path` exists without `force` or its parent cannot be written."""
    if path.exists() and not force:
        raise PlanishError(f"output '{path}' exists; choose another path or pass --force to replace it")
    if path.is_dir() and any(path.iterdir()) and not _ours(path):
        raise PlanishError(
            f"output '{path}' is a folder that planish did not write (by its manifest.json); not replaced"
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise PlanishError(f"output '{path}' cannot be written: '{parent}' is not a folder")
    if not os.access(parent, os.W_OK):
        raise PlanishError(f"output '{path}' cannot be written: no write permission in '{parent}'")


def _ours(folder: Path) -> bool:
    """Whether the folder's manifest names the planish that wrote it."""
    try:
        return "planish" in read_json(folder / "manifest.json")
    except PlanishError:
        return False


@contextlib.contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises PlanishError for an existing path (without `force`), a path that cannot be written, and a full disk.
    """
    check_output(path, force)
    made: list[Path] = []
    parent = path.absolute().parent
    missing = parent
    while not missing.exists():
        made.append(missing)
        missing = missing.parent
    work: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
        work.chmod(0o755)
        yield work
        for file in work.rglob("*"):  # libraries that write by way of a temporary file leave it private
            file.chmod(file.stat().st_mode | 0o044)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=parent))
            path.rename(old / "replaced")
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for folder in made:  # deepest first; a folder that someone else filled meanwhile stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and not isinstance(error, PlanishError):
            raise PlanishError(f"output '{path}' cannot be written: {error.strerror or error}") from error
        raise


@contextlib.contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Path]:
    """Like `new_folder`, for one file."""
    if path.is_dir():
        raise PlanishError(f"output '{path}' is a folder; a file is written here")
    check_output(path, force)
    work: Path | None = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.absolute().parent)
        os.close(handle)
        work = Path(name)
        work.chmod(0o644)
        yield work
        work.replace(path)
    except BaseException as error:
        if work is not None:
            work.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise PlanishError(f"output '{path}' cannot be written: {error.strerror or error}") from error
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> str:
    """The one spelling of JSON that planish writes: sorted keys, two spaces, newline at the end, no NaN."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; PlanishError names the file and the position of a fault."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanishError(f"'{path}' is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanishError(f"'{path}' is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise PlanishError(f"'{path}' holds a JSON {type(value).__name__}; an object is expected")
    return value
