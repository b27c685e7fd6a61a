"""planish: prune, quantize and export a trained PyTorch model to a named device, and profile it there.

The verbs of the command line are the functions of this module: compress, export, verify, profile, run, evaluate, generate,
inspect. Importing it loads no PyTorch; the first call of a verb does. `planish.compress` and `planish.export` are the packages of those
stages as well, so both `planish.compress(...)` and `planish.compress.model` work.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .common.errors import PlanishError as PlanishError
    from .pipeline import compress as compress
    from .pipeline import evaluate as evaluate
    from .pipeline import export as export
    from .pipeline import generate as generate
    from .pipeline import inspect as inspect
    from .pipeline import profile as profile
    from .pipeline import run as run
    from .pipeline import verify as verify

STAGES = ("compress", "export")
VERBS = (*STAGES, "evaluate", "generate", "inspect", "profile", "run", "verify")
__all__ = ["PlanishError", "compress", "evaluate", "export", "generate", "inspect", "profile", "run", "verify"]


class _Stage(ModuleType):
    """The package of a stage that can also be called, as the verb of the same name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        verb = getattr(import_module(".pipeline", __name__), self.__name__.rpartition(".")[2])
        return verb(*args, **options)


class _Root(ModuleType):
    """This package; the import system stores each submodule on it when it is first imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in STAGES and isinstance(value, ModuleType):
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root


def __getattr__(name: str) -> object:
    """Load a verb when it is first used (PEP 562)."""
    if name in STAGES:
        return import_module(f".{name}", __name__)
    if name in VERBS:
        return getattr(import_module(".pipeline", __name__), name)
    if name == "PlanishError":
        return import_module(".common.errors", __name__).PlanishError
    raise AttributeError(f"module 'planish' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
