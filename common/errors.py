"""The one error type whose text is meant for the user."""

from __future__ import annotations

from collections.abc import Iterable


class PlanishError(Exception):
    """A condition the user can act on. The message is one line: what was found, where, and what is accepted."""


class Missing(PlanishError):
    """An optional package or system tool is absent; the message names what to install."""


def missing_extra(package: str, extra: str, purpose: str) -> Missing:
    """The error for an absent optional package: which one, what it is for, and the extra that brings it."""
    return Missing(f"{purpose} needs the package '{package}': pip install 'planish[{extra}]'")


def listed(names: Iterable[object], limit: int = 3) -> str:
    """'a', 'b', 'c' and 4 more: a bounded list for one-line messages."""
    items = [f"'{n}'" for n in names]
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
