"""How good a model is: perplexity, closeness to another model (KL divergence, agreement, cosine), accuracy.

Language models are seen through `Language`, which any runtime can stand behind, and are scored over windows of tokens: at
most one batch of windows is in memory, and of its scores only a few thousand rows at a time are widened to float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..common.errors import PlanishError, listed
from .model import Input, Model, output_names, predict

Arrays = Mapping[str, np.ndarray]
SCORES = 1 << 22
"""scores (numbers) that one batch may give, so that memory stays bounded for a large vocabulary"""
BATCH = 8
"""windows of a batch, at most"""


@dataclass(frozen=True)
class Language:
    """A language model behind any runtime: tokens in, scores of the next token out, states carried between calls."""

    run: Callable[[Arrays], Arrays]
    """outputs by name for every input by name"""
    inputs: tuple[Input, ...]
    """input_ids, perhaps attention_mask, and states"""
    outputs: tuple[str, ...]
    """the scores first, the states last, in the order of the state inputs; what stands between (a counter) is not looked at"""
    source: str

    @property
    def dynamic(self) -> bool:
        """Whether it takes any number of tokens at a time."""
        return any(i.dim(1) is not None for i in self.inputs if i.name == "input_ids")

    def __post_init__(self) -> None:
        others = [i.name for i in self.inputs if not i.state and i.name not in ("input_ids", "attention_mask")]
        names = [i.name for i in self.inputs]
        if others or "input_ids" not in names:
            raise PlanishError(
                f"'{self.source}' has the inputs {listed(names, 6)}; a language model takes input_ids, attention_mask and states"
            )

    def empty(self, n: int) -> dict[str, np.ndarray]:
        """The states before the first token, for `n` texts."""
        return {i.name: i.empty(n).numpy() for i in self.inputs if i.state}

    def step(self, tokens: np.ndarray, states: Arrays) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Tokens (n, length) behind what `states` stand for -> scores (n, length, vocabulary) and the states after them."""
        length = next(i for i in self.inputs if i.name == "input_ids").shape[1]
        if not self.dynamic and tokens.shape[1] != length:
            raise PlanishError(f"'{self.source}' takes {length} tokens at a time; {tokens.shape[1]} were given")
        feeds = {i.name: tokens.astype(_numpy(i.dtype)) for i in self.inputs if i.name == "input_ids"}
        feeds |= {i.name: np.ones(tokens.shape, _numpy(i.dtype)) for i in self.inputs if i.name == "attention_mask"}
        answers = self.run({**feeds, **states})
        scores = answers[self.outputs[0]]
        if scores.ndim != 3 or scores.shape[:2] != tokens.shape:
            raise PlanishError(
                f"'{self.source}': its first output has shape {scores.shape} for tokens {tokens.shape}; a language model "
                "gives (n, length, vocabulary)"
            )
        names = [i.name for i in self.inputs if i.state]
        carried = self.outputs[len(self.outputs) - len(names) :]
        return scores, {n: answers[o] for n, o in zip(names, carried, strict=True)}

    def scores(self, windows: np.ndarray) -> np.ndarray:
        """Tokens (n, length) -> scores (n, length, vocabulary), every window from its beginning."""
        return self.step(windows, self.empty(len(windows)))[0]


def language(model: Model) -> Language:
    """A traced model as a `Language`. Raises PlanishError when its inputs are not a language model's."""
    return Language(lambda arrays: predict(model, arrays), model.inputs, output_names(model), model.source)


def is_causal(model: Model) -> bool:
    """Whether perplexity is defined: the model says so, or it takes input_ids and carries states."""
    if model.text is not None:
        return model.text.causal
    return any(i.state for i in model.inputs) and model.inputs[0].name == "input_ids"


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood."""

    value: float
    """1 (sure of every token) to 1e304, where it is cut off"""
    n: int
    """tokens that were predicted"""
    nats: float
    """mean negative log likelihood of a token"""


@dataclass(frozen=True)
class Closeness:
    """How far the next-token distributions of a model are from another's."""

    kl: float
    """mean over tokens of KL(original || compressed), in nats"""
    agreement: float
    """share of tokens whose most likely successor is the same"""
    n: int
    """tokens"""


def perplexity(model: Language, windows: np.ndarray) -> Perplexity:
    """Perplexity over windows (n, length) of tokens: each token but a window's first is predicted from those before it.

    Raises PlanishError for windows of fewer than two tokens, tokens outside of the vocabulary, and scores that are not finite.
    """
    total, count = 0.0, 0
    for batch, scores in _scored(windows, model):
        total += _nats(batch, scores[0], model.source)
        count += batch[:, 1:].size
    return _of_nats(total, count)


def compare(original: Language, compressed: Language, windows: np.ndarray) -> tuple[Perplexity, Perplexity, Closeness]:
    """Perplexity of both models and their closeness, as `perplexity` and `closeness` give them, from one run of each."""
    totals, count = [0.0, 0.0], 0
    near: list[Closeness] = []
    for batch, scores in _scored(windows, original, compressed):
        for index, model in enumerate((original, compressed)):
            totals[index] += _nats(batch, scores[index], model.source)
        count += batch[:, 1:].size
        near.append(_close(scores[0], scores[1], original.source, compressed.source))
    before, after = (_of_nats(t, count) for t in totals)
    return before, after, _mean(near)


def closeness(original: Language, compressed: Language, windows: np.ndarray) -> Closeness:
    """KL divergence and agreement of two models with one vocabulary over windows (n, length), a window's last token included."""
    found = _scored(windows, original, compressed)
    return _mean([_close(before, after, original.source, compressed.source) for _, (before, after) in found])


def _nats(batch: np.ndarray, scores: np.ndarray, source: str) -> float:
    """Sum of the negative log likelihoods of a batch's tokens (n, length), each window's first left out, under scores (n, length, classes)."""
    flat, following = scores[:, :-1].reshape(-1, scores.shape[-1]), batch[:, 1:].reshape(-1)
    total = 0.0
    for rows in _rows(flat):
        total -= float(_log_softmax(flat[rows], source).gather(1, torch.from_numpy(following[rows])[:, None]).sum())
    return total


def _of_nats(total: float, count: int) -> Perplexity:
    return Perplexity(math.exp(min(total / count, 700.0)), count, total / count)


def _close(before: np.ndarray, after: np.ndarray, original: str, compressed: str) -> Closeness:
    """Of one batch's scores (n, length, classes)."""
    if before.shape != after.shape:
        raise PlanishError(
            f"'{compressed}' gives scores of shape {after.shape}, '{original}' of {before.shape}: "
            "they have no common vocabulary"
        )
    p, q = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    divergence, same = 0.0, 0
    for rows in _rows(p):
        kl, agreed = _divergence(_log_softmax(p[rows], original), _log_softmax(q[rows], compressed))
        divergence += kl
        same += agreed
    return Closeness(divergence / len(p), same / len(p), len(p))


def _mean(parts: Sequence[Closeness]) -> Closeness:
    n = sum(p.n for p in parts)
    return Closeness(sum(p.kl * p.n for p in parts) / n, sum(p.agreement * p.n for p in parts) / n, n)


def of_scores(before: np.ndarray, after: np.ndarray) -> Closeness:
    """KL divergence and agreement of scores (..., classes) that two models gave for the same samples."""
    p, q = (torch.from_numpy(np.ascontiguousarray(x)).flatten(0, -2).double().log_softmax(1) for x in (before, after))
    total, same = _divergence(p, q)
    return Closeness(total / len(p), same / len(p), len(p))


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean over rows of KL(softmax(before) || softmax(after)) in nats; scores (..., classes)."""
    width = before.shape[-1]
    p, q = before.reshape(-1, width).double().log_softmax(1), after.reshape(-1, width).double().log_softmax(1)
    return _divergence(p, q)[0] / max(1, len(p))


def top1(outputs: Arrays, labels: np.ndarray) -> float:
    """Share of samples whose largest score in the first output (n, classes) is the label's."""
    scores = next(iter(outputs.values()))
    if scores.ndim != 2:
        raise PlanishError(f"accuracy needs an output of shape (n, classes); the first output has shape {scores.shape}")
    return float((scores.argmax(1) == labels).mean())


def cosine(outputs: Arrays, originals: Arrays) -> float:
    """Least cosine similarity over the outputs, each taken as one vector. An output without numbers counts for nothing."""
    found = []
    for name, original in originals.items():
        a, b = outputs[name].astype(np.float64).ravel(), original.astype(np.float64).ravel()
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        found.append(float(a @ b) / norms if norms else float(np.array_equal(a, b)))
        if not np.isfinite(found[-1]):
            raise PlanishError(
                f"output '{name}' has NaN or infinite values; its closeness to the original is not defined"
            )
    return min(found)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> tuple[float, int]:
    """Sum over rows of KL(p || q) of log probabilities (rows, classes), and the rows with the same largest one."""
    share = p.exp()
    parts = torch.where(share > 0, share * (p - q), 0.0)  # what has probability 0 adds nothing, also with log -inf
    return float(parts.sum()), int((p.argmax(1) == q.argmax(1)).sum())


def _scored(windows: np.ndarray, *models: Language) -> Iterator[tuple[np.ndarray, Sequence[np.ndarray]]]:
    """(windows of a batch, scores of each model for it)"""
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise PlanishError(f"windows have shape {windows.shape}; (n, at least 2 tokens) are expected")
    vocabulary = min(m.scores(np.zeros_like(windows[:1])).shape[-1] for m in models)
    if int(windows.max()) >= vocabulary or int(windows.min()) < 0:
        raise PlanishError(
            f"tokens from {windows.min()} to {windows.max()} do not fit '{models[0].source}', whose vocabulary has {vocabulary}"
        )
    size = max(1, min(BATCH, SCORES // (windows.shape[1] * vocabulary)))
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        yield batch, [m.scores(batch) for m in models]


def _rows(flat: np.ndarray) -> Iterator[slice]:
    """Runs of rows of (rows, classes) that together have at most a few million numbers."""
    step = max(1, SCORES // 4 // flat.shape[1])
    return (slice(i, i + step) for i in range(0, len(flat), step))


def _log_softmax(scores: np.ndarray, source: str) -> torch.Tensor:
    """(rows, classes) log probabilities in float64. Raises PlanishError for NaN, and for rows without a finite score."""
    wide = torch.from_numpy(np.ascontiguousarray(scores)).double()
    found = wide.log_softmax(1)
    if bool(found.isnan().any()):
        raise PlanishError(f"'{source}' gives scores that are NaN or infinite; its perplexity is not defined")
    return found


def _numpy(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype
