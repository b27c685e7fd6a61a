"""`Recipe`: an ordered list of passes, written as YAML and validated with the line of every fault.

name: prune-w8a8
description: one line
passes:
  - prune.channels: {criterion: l1, macs: 0.5}
  - distill: {epochs: 10}
  - quantize.static            # no fields: defaults
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
import yaml

from ..common import plugins
from ..common.errors import PlanishError, listed
from .passes import Pass

FOLDER = Path(__file__).parent / "recipes"
KEYS = ("name", "description", "passes")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and 1e-3 as the number that everyone means by it (1.1 asks for 1.0e-3)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("-+0123456789"))


@dataclass(frozen=True)
class Recipe:
    """What is done to a model, in order."""

    name: str
    description: str
    passes: tuple[tuple[str, Pass], ...]
    """(name of the pass, its configuration)"""


def names() -> list[str]:
    """Bundled recipes, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def methods() -> dict[str, type[Pass]]:
    """Every pass by its name in a recipe: its file's path below compress/."""
    return plugins.find(__package__ or "planish.compress", Pass)


def load(name_or_path: str) -> Recipe:
    """A bundled recipe by name, or one from a .yaml file. Raises PlanishError with file and line."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in names():
            raise PlanishError(
                f"unknown recipe '{name_or_path}'; accepted: {', '.join(names()) or 'none bundled'}, or a .yaml file"
            )
        path = FOLDER / f"{name_or_path}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise PlanishError(f"recipe '{path}' cannot be read: {reason}") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Recipe:
    """A recipe from YAML text. Raises PlanishError naming `source`, the line, what was found and what is accepted."""
    return _Parser(source).recipe(text)


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every field written out, for the manifest; `parse` reads it back to the same recipe."""
    passes = [{name: config.model_dump(mode="json")} for name, config in recipe.passes]
    return {"name": recipe.name, "description": recipe.description, "passes": passes}


@dataclass(frozen=True)
class _Parser:
    source: str

    def fault(self, node: yaml.Node | yaml.Mark, message: str) -> PlanishError:
        """The error for a place in the text; lines count from 1."""
        mark = node.start_mark if isinstance(node, yaml.Node) else node
        return PlanishError(f"recipe '{self.source}', line {mark.line + 1}: {message}")

    def recipe(self, text: str) -> Recipe:
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = f"not valid YAML: {error.problem or error.context}"
            raise (self.fault(mark, problem) if mark else PlanishError(f"recipe '{self.source}': {problem}")) from None
        except (yaml.YAMLError, RecursionError) as error:
            raise PlanishError(
                f"recipe '{self.source}' is not valid YAML: {str(error).splitlines()[0][:150]}"
            ) from None
        if root is None:
            raise PlanishError(f"recipe '{self.source}' is empty; {', '.join(KEYS)} are expected")
        entries = self.mapping(root, "a recipe")
        for key, (node, _) in entries.items():
            if key not in KEYS:
                raise self.fault(node, f"unknown key '{key}'; accepted: {', '.join(KEYS)}")
        for key in ("name", "passes"):
            if key not in entries:
                raise self.fault(root, f"'{key}' is missing")
        listing = entries["passes"][1]
        if not isinstance(listing, yaml.SequenceNode) or not listing.value:
            raise self.fault(listing, f"'passes' is {_kind(listing)}; a list of passes is expected")
        passes = tuple(self.step(item) for item in listing.value)
        self.check_order(passes, listing.value)
        description = self.text(entries["description"][1]) if "description" in entries else ""
        return Recipe(self.text(entries["name"][1]), description, passes)

    def mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """{key: (key node, value node)}; a key that occurs twice is a fault."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fault(node, f"{what} is {_kind(node)}; a mapping (key: value) is expected")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            name = self.text(key)
            if name in found:
                raise self.fault(key, f"'{name}' occurs twice, first on line {found[name][0].start_mark.line + 1}")
            found[name] = (key, value)
        return found

    def text(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str" or not node.value.strip():
            raise self.fault(node, f"{_kind(node)} stands where a text is expected")
        return node.value

    def step(self, node: yaml.Node) -> tuple[str, Pass]:
        """One pass: its name, or a mapping of its name to its fields."""
        if isinstance(node, yaml.ScalarNode):
            return self.method(self.text(node), node, None)
        entries = self.mapping(node, "a pass")
        if len(entries) != 1:
            raise self.fault(
                node, f"a pass has {len(entries)} keys ({listed(entries)}); one, the name of the pass, is expected"
            )
        ((name, (key, value)),) = entries.items()
        empty = isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:null"
        return self.method(name, key, None if empty else value)

    def method(self, name: str, node: yaml.Node, fields: yaml.Node | None) -> tuple[str, Pass]:
        known = methods()
        if name not in known:
            raise self.fault(node, f"unknown pass '{name}'; accepted: {', '.join(known)}")
        kind = known[name]
        entries = {} if fields is None else self.mapping(fields, f"'{name}'")
        for field, (key, _) in entries.items():
            if field not in kind.model_fields:
                accepted = ", ".join(kind.model_fields) or "none, it has no fields"
                raise self.fault(key, f"'{name}' has no field '{field}'; accepted: {accepted}")
        try:
            values = {f: self.value(v) for f, (_, v) in entries.items()}
            return name, kind.model_validate(_lists_as_tuples(values))
        except pydantic.ValidationError as error:
            raise self.invalid(name, kind, error, entries, node) from None

    def value(self, node: yaml.Node) -> Any:
        """The plain value of a node: numbers, texts, lists and mappings, whose keys occur once."""
        for inner in _walk(node):
            if isinstance(inner, yaml.MappingNode):
                self.mapping(inner, "a value")
        loader = _Loader("")
        try:
            return loader.construct_document(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fault(node, f"not a plain value: {str(error).splitlines()[0][:150]}") from None
        finally:
            loader.dispose()

    def invalid(
        self,
        name: str,
        kind: type[Pass],
        error: pydantic.ValidationError,
        entries: dict[str, tuple[yaml.Node, yaml.Node]],
        node: yaml.Node,
    ) -> PlanishError:
        """The first of pydantic's findings, at the line of its field."""
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        field = str(first["loc"][0]) if first["loc"] else ""
        if field in entries:
            node = entries[field][1]
        found = "" if first["type"] == "missing" else f", found {first['input']!r:.60}"
        message = first["msg"].removeprefix("Value error, ")
        choices = _choices(kind, field)
        accepted = f"; accepted: {choices}" if choices and "literal" not in first["type"] else ""
        where = f"'{name}'" + (f", field '{place}'" if place else "")
        return self.fault(node, f"{where}: {message[:1].lower()}{message[1:]}{found if place else ''}{accepted}")

    def check_order(self, passes: tuple[tuple[str, Pass], ...], nodes: list[yaml.Node]) -> None:
        """Pruning and training come before quantization: they would change weights that are codes already.

        A rewrite that changes what the network computes is trained before it is quantized.
        """
        quantized = untrained = ""
        for (name, config), node in zip(passes, nodes, strict=True):
            if config.untrained():
                untrained = name
            elif config.trains:
                untrained = ""
            if name.startswith("quantize."):
                if untrained:
                    raise self.fault(
                        node,
                        f"'{untrained}' changes what the network computes; it is trained (distill) before '{name}'",
                    )
                quantized = quantized or name
            elif quantized and (name.startswith("prune.") or config.trains):
                raise self.fault(
                    node, f"'{name}' stands after '{quantized}'; pruning and training come before quantization"
                )


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    return f"'{node.value[:60]}'" if node.value else "nothing"


def _walk(node: yaml.Node) -> Iterator[yaml.Node]:
    """The node and all below it."""
    yield node
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [v for _, v in node.value]
    for child in children:
        yield from _walk(child)


def _lists_as_tuples(value: Any) -> Any:
    """Strict pydantic models take tuples, YAML knows only lists."""
    if isinstance(value, dict):
        return {k: _lists_as_tuples(v) for k, v in value.items()}
    return tuple(_lists_as_tuples(v) for v in value) if isinstance(value, list) else value


def _choices(kind: type[Pass], field: str) -> str:
    info = kind.model_fields.get(field)
    if info is None:
        return ""
    literal = getattr(info.annotation, "__origin__", None) is Literal
    if literal:
        return ", ".join(repr(a) for a in get_args(info.annotation))
    limits = [str(m) for m in info.metadata]
    name = getattr(info.annotation, "__name__", str(info.annotation))
    return name + (f" with {', '.join(limits)}" if limits else "")
