"""Recipes: what is accepted is run as written, every fault is named with its line and what is accepted."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic
import pytest
from planish.common.errors import PlanishError
from planish.compress import recipe
from planish.compress.model import Model
from planish.compress.passes import Context, Pass


class Prune(Pass):
    criterion: Literal["l1", "l2"] = "l1"
    macs: float = pydantic.Field(default=0.5, gt=0, le=1)
    skip: tuple[str, ...] = ()

    def apply(self, model: Model, context: Context) -> Model:
        return model


class Distill(Pass):
    trains: ClassVar[bool] = True
    epochs: int = 1
    rate: float = 0.1

    def apply(self, model: Model, context: Context) -> Model:
        return model


class Static(Pass):
    def apply(self, model: Model, context: Context) -> Model:
        return model


@pytest.fixture(autouse=True)
def three_methods(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        found = {"prune.channels": Prune, "distill": Distill, "quantize.static": Static}
        monkeypatch.setattr(recipe, "methods", lambda: found)


GOOD = """name: small
description: prune, recover, quantize
passes:
  - prune.channels: {criterion: l2, macs: 0.25, skip: [conv1, "layer*"]}
  - distill:
      epochs: 3
      rate: 1e-3
  - quantize.static
"""


def test_a_recipe_is_read_as_written() -> None:
    found = recipe.parse(GOOD, "x.yaml")
    assert [n for n, _ in found.passes] == ["prune.channels", "distill", "quantize.static"]
    assert found.passes[0][1] == Prune(criterion="l2", macs=0.25, skip=("conv1", "layer*"))
    assert found.passes[1][1] == Distill(epochs=3, rate=0.001)
    assert (found.name, found.description) == ("small", "prune, recover, quantize")


def test_dump_writes_every_field_and_reads_back() -> None:
    import yaml

    found = recipe.parse("name: a\npasses: [prune.channels]", "x.yaml")
    written = recipe.dump(found)
    assert written["passes"] == [{"prune.channels": {"criterion": "l1", "macs": 0.5, "skip": []}}]
    assert (
        recipe.parse(yaml.safe_dump(written).replace("description: ''", "description: d"), "y").passes == found.passes
    )


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "empty"),
        ("# nothing\n", None, "empty"),
        ("- a\n- b\n", 1, "a recipe is a list; a mapping"),
        ("name: x\npasses: [\n", 3, "not valid YAML"),
        ("name: x\n\tpasses: 1\n", 2, "not valid YAML"),
        ("name: x\npasses: *nowhere\n", 2, "not valid YAML"),
        ("name: x\npases:\n  - distill\n", 2, "unknown key 'pases'; accepted: name, description, passes"),
        ("passes:\n  - distill\n", 1, "'name' is missing"),
        ("name: x\n", 1, "'passes' is missing"),
        ("name: x\npasses:\n", 2, "'passes' is nothing; a list"),
        ("name: x\npasses: []\n", 2, "'passes' is an empty list"),
        ("name: x\npasses: distill\n", 2, "'passes' is 'distill'; a list"),
        ("name: [x]\npasses:\n  - distill\n", 1, "a list stands where a text"),
        ("name: 3\npasses:\n  - distill\n", 1, "'3' stands where a text"),
        ("name: x\nname: y\npasses:\n  - distill\n", 2, "'name' occurs twice, first on line 1"),
        (
            "name: x\npasses:\n  - distil\n",
            3,
            "unknown pass 'distil'; accepted: prune.channels, distill, quantize.static",
        ),
        ("name: x\npasses:\n  - distill:\n      epoch: 1\n", 4, "no field 'epoch'; accepted: epochs, rate"),
        ("name: x\npasses:\n  - quantize.static: {bits: 8}\n", 3, "no field 'bits'; accepted: none"),
        ("name: x\npasses:\n  - distill:\n      rate: 0.1\n      epochs: many\n", 5, "found 'many'; accepted: int"),
        ("name: x\npasses:\n  - distill: {epochs: 1.5}\n", 3, "'epochs'.*1.5"),
        ("name: x\npasses:\n  - distill: {epochs: true}\n", 3, "'epochs'.*True"),
        ("name: x\npasses:\n  - distill:\n      epochs: 1\n      epochs: 2\n", 5, "'epochs' occurs twice"),
        ("name: x\npasses:\n  - prune.channels:\n\n      criterion: l3\n", 5, "'l1' or 'l2', found 'l3'"),
        ("name: x\npasses:\n  - prune.channels: {macs: 2}\n", 3, "less than or equal to 1, found 2"),
        ("name: x\npasses:\n  - prune.channels: {skip: [1]}\n", 3, "skip.0.*found 1"),
        ("name: x\npasses:\n  - prune.channels: {skip: conv1}\n", 3, "'skip'.*found 'conv1'"),
        ("name: x\npasses:\n  - prune.channels: half\n", 3, "'prune.channels' is 'half'; a mapping"),
        ("name: x\npasses:\n  - distill: {}\n    quantize.static: {}\n", 3, "a pass has 2 keys"),
        ("name: x\npasses:\n  - [distill]\n", 3, "a pass is a list"),
        ("name: x\npasses:\n  - distill: {rate: !!python/name:os.system x}\n", 3, "not a plain value"),
        ("name: x\npasses:\n  - quantize.static\n  - distill\n", 4, "'distill' stands after 'quantize.static'"),
        ("name: x\npasses:\n  - quantize.static\n  - prune.channels\n", 4, "come before quantization"),
    ],
)
def test_a_fault_is_named_with_its_line(text: str, line: int | None, words: str) -> None:
    with pytest.raises(PlanishError, match=words) as caught:
        recipe.parse(text, "my.yaml")
    message = str(caught.value)
    assert "my.yaml" in message
    assert "\n" not in message
    if line is not None:
        assert f"line {line}:" in message


def test_a_file_and_an_unknown_name(tmp_path: Any) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert recipe.load(str(tmp_path / "mine.yaml")).name == "small"
    with pytest.raises(PlanishError, match="cannot be read"):
        recipe.load(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanishError, match="UTF-8"):
        recipe.load(str(tmp_path / "bad.yaml"))
    with pytest.raises(PlanishError, match="unknown recipe 'nothing'"):
        recipe.load("nothing")


@pytest.mark.parametrize("name", recipe.names())
def test_bundled_recipes_are_valid_real(name: str) -> None:
    found = recipe.load(name)
    assert found.name == name
    assert found.description
    assert len(found.description.splitlines()) == 1


def test_methods_on_disk_are_found_real() -> None:
    for name, kind in recipe.methods().items():
        assert issubclass(kind, Pass)
        assert kind.__module__ == f"planish.compress.{name}"
