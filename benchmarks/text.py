"""The text that the language models of benchmarks/weights are trained on and measured with, cut from the data folder.

WikiText-2 (validation part) and tiny Shakespeare, one after the other; the last 5 % of each is held out. No text is kept
in the repository.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable

import models
import torch
from planish.common.errors import PlanishError
from torch.nn import functional as F

FILES = ("wikitext2/valid.txt.xz", "tinyshakespeare/input.txt.xz")
HELD_OUT = 0.05


def _parts() -> list[tuple[str, str]]:
    """(training, held out) of each file, cut at the first line end after 95 % of its characters."""
    parts: list[tuple[str, str]] = []
    for name in FILES:
        path = models.data_folder() / name
        if not path.is_file():
            raise PlanishError(f"text '{path}' is missing: set PLANISH_DATA to the folder that holds {name}")
        with lzma.open(path, "rt", encoding="utf8") as file:
            text = file.read()
        cut = text.index("\n", int(len(text) * (1 - HELD_OUT))) + 1
        parts.append((text[:cut], text[cut:]))
    return parts


def training_text() -> str:
    """What the models are trained on, and the only text that calibration may use."""
    return "".join(training for training, _ in _parts())


def held_out_text() -> str:
    """What perplexity is measured on."""
    return "".join(held_out for _, held_out in _parts())


def windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """`tokens` (n,) cut into rows (n // length, length); the rest is dropped."""
    return tokens[: len(tokens) // length * length].reshape(-1, length)


@torch.no_grad()
def perplexity(logits: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, batch: int = 16) -> float:
    """exp of the mean loss over all tokens but the first of each row.

    `rows`: token ids (n, length); `logits`: (batch, length) to (batch, length, vocabulary).
    """
    total = 0.0
    for ids in rows.split(batch):
        scores = logits(ids)[:, :-1].float()
        total += F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))
