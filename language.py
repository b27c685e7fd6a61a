"""Language models behind the verbs: an artifact as a `Language`, the tokenizer that it carries, and greedy generation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .common.errors import PlanishError
from .compress import text
from .compress.data import Data
from .compress.evaluation import Language
from .compress.model import Input, Model, Text
from .export.artifact import Artifact
from .runtimes.session import Greedy, Session

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Generated:
    """What a model wrote."""

    text: str
    """without the prompt"""
    tokens: int
    prompt_tokens: int
    per_second: float | None
    """steps of one token a second, the reading of the prompt left out; None when there was no further step"""


def inputs(item: Artifact) -> tuple[Input, ...]:
    """An artifact's inputs as of a model: which dimensions are dynamic, and which inputs are states."""
    states = item.manifest.get("states", [])
    found = []
    for i in item.inputs:
        rest = i["shape"][1:]
        dims = (None, *(d if isinstance(d, str) else None for d in rest))
        shape = (1, *(d if isinstance(d, int) else 1 for d in rest))
        found.append(
            Input(i["name"], shape, getattr(torch, i["dtype"]), dims if any(dims) else (), i["name"] in states)
        )
    return tuple(found)


def of_session(item: Artifact, session: Session) -> Language:
    """An open artifact as a `Language`. Raises PlanishError when it takes other inputs than a language model."""
    return Language(session.run, inputs(item), tuple(o["name"] for o in item.outputs), str(item.folder))


def is_causal(item: Artifact) -> bool:
    """Whether an artifact's perplexity is defined: as `evaluation.is_causal`."""
    if "text" in item.manifest:
        return bool(item.manifest["text"]["causal"])
    return bool(item.manifest.get("states")) and item.inputs[0]["name"] == "input_ids"


def store(how: Text, folder: Path) -> dict[str, Any]:
    """Write the tokenizer into an artifact's folder; returns what its manifest says of it under `text`."""
    (folder / TOKENIZER).write_text(how.tokenizer, encoding="utf-8")
    return {"begin": how.begin, "window": how.window, "causal": how.causal}


def stored(item: Artifact) -> Text | None:
    """How an artifact turns text into tokens, None when it carries no tokenizer."""
    said = item.manifest.get("text")
    if said is None:
        return None
    content = (item.folder / TOKENIZER).read_text(encoding="utf-8")
    return Text(content, said["begin"], int(said["window"]), bool(said["causal"]))


def generate(
    model: Language, how: Text, prompt: str, count: int, greedy: Callable[[int], Greedy | None] = lambda capacity: None
) -> Generated:
    """At most `count` tokens behind the prompt, each the most likely one; stops at a special token (end of text).

    The prompt is read in one step; every further step takes one token and the states. A model without states reads all again.
    `greedy`: what a session has instead of steps, for a text of so many tokens.
    Raises PlanishError for an empty prompt without begin token, and when prompt and tokens exceed the window.
    """
    tokenizer = text.opened(how.tokenizer)
    ids = [*([] if how.begin is None else [how.begin]), *tokenizer.encode(prompt, add_special_tokens=False).ids]
    if not ids:
        raise PlanishError(f"the prompt is empty, and '{model.source}' has no token that begins a text")
    if len(ids) + count > how.window:
        raise PlanishError(
            f"a prompt of {len(ids)} tokens and {count} more exceed the {how.window} that '{model.source}' takes"
        )
    added = json.loads(how.tokenizer).get("added_tokens") or []
    ends = {t["id"] for t in added if t.get("special")}
    made: list[int] = []
    started, steps = 0.0, 0
    held = greedy(len(ids) + count)
    tokens = _stepped(model, ids) if held is None else _held(held, ids)
    for steps, token in zip(range(count), tokens, strict=False):
        if steps == 0:
            started = time.perf_counter()
        if token in ends:
            break
        made.append(token)
    seconds = time.perf_counter() - started
    before, whole = (
        tokenizer.decode(ids),
        tokenizer.decode([*ids, *made]),
    )  # a space in front may only show behind other text
    written = whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(made)
    return Generated(written, len(made), len(ids), steps / seconds if steps else None)


def _stepped(model: Language, ids: list[int]) -> Iterator[int]:
    """The most likely tokens behind `ids`, one a step."""
    states, seen, given = model.empty(1), list(ids), ids
    while True:
        scores, states = model.step(np.asarray([given], np.int64), states)
        token = int(scores[0, -1].argmax())
        yield token
        seen.append(token)
        given = [token] if states else seen


def _held(held: Greedy, ids: list[int]) -> Iterator[int]:
    """The same where the session holds the states."""
    yield held.read(torch.tensor([ids]))
    while True:
        yield held.next()


def read(spec: str, item: Artifact, length: int | None = None) -> Data:
    """A text file as the tokens that an artifact takes. Raises PlanishError as `text.load` does."""
    nothing = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())  # tokens depend on inputs and tokenizer only
    return text.load(spec, Model(nothing, inputs(item), True, str(item.folder), text=stored(item)), length)
