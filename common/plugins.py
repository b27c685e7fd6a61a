"""Plug-ins are found by file name: a module that defines one concrete subclass of the base is a plug-in named by its path.

There is no registry and no list to edit. Adding a method, an op, a format or a runtime creates one file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from types import ModuleType
from typing import TypeVar

from .errors import PlanishError

T = TypeVar("T")


@cache
def find(package: str, base: type[T]) -> dict[str, type[T]]:
    """Plug-ins of `base` below `package`: {'quantize.static': Static}, names relative to the package, sorted.

    A module counts when it defines, and does not merely import, exactly one concrete subclass of `base`. A package whose __init__ says
    `PLUGINS = False` is not entered.
    Raises PlanishError for a module that defines two: then the file name would not say which is meant.
    """
    root = importlib.import_module(package)
    found: dict[str, type[T]] = {}
    for module in _modules(package, root.__path__):
        own = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, base)
            and value.__module__ == module.__name__
            and not inspect.isabstract(value)
        ]
        if len(own) > 1:
            names = ", ".join(c.__name__ for c in own)
            raise PlanishError(f"{module.__name__} defines {len(own)} plug-ins ({names}); a plug-in is one file")
        if own:
            found[module.__name__.removeprefix(package + ".")] = own[0]
    return dict(sorted(found.items()))


def _modules(package: str, path: Iterable[str]) -> Iterator[ModuleType]:
    """Every module below a package."""
    for info in pkgutil.iter_modules(path, package + "."):
        module = importlib.import_module(info.name)
        yield module
        if info.ispkg and getattr(module, "PLUGINS", True):
            yield from _modules(info.name, module.__path__)


def create(package: str, base: type[T], name: str, kind: str) -> T:
    """An instance of the plug-in called `name`; PlanishError lists the accepted names. `kind` is the word for it in the message."""
    found = find(package, base)
    if name not in found:
        raise PlanishError(f"unknown {kind} '{name}'; accepted: {', '.join(found)}")
    return found[name]()
