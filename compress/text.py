"""Text as data of a language model: its own tokenizer, and windows of tokens.

For a causal model `windows` cuts the text into rows of tokens, one behind the other; for an encoder `sentences` takes its lines,
padded to one length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import PlanishError, missing_extra
from .data import Data
from .model import Model, Text

SUFFIX = ".txt"
LENGTH = 512
"""tokens of a window when none are asked for and the model takes that many"""


def is_text(spec: str) -> bool:
    """Whether the data is a text file, which needs the model's tokenizer to become tokens."""
    return Path(spec).suffix == SUFFIX


def load(spec: str, model: Model, length: int | None = None) -> Data:
    """The tokens of a UTF-8 text file as data of `model`, in windows or lines of `length` tokens.

    Raises PlanishError for a file that is missing or no text, a model without a tokenizer, and a text shorter than one window.
    """
    how = model.text
    if how is None:
        raise PlanishError(
            f"data '{spec}' is text, and '{model.source}' has no tokenizer.json; "
            "give its tokens as .npz (input_ids), or put the file into the model's folder"
        )
    try:
        content = Path(spec).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlanishError(f"data '{spec}' does not exist") from None
    except UnicodeDecodeError as error:
        raise PlanishError(f"data '{spec}' is not UTF-8 text (byte {error.start})") from None
    names = {i.name for i in model.inputs}
    if how.causal:
        arrays = {"input_ids": windows(content, how, length, spec)}
    else:
        arrays = dict(zip(("input_ids", "attention_mask"), sentences(content, how, length, spec), strict=True))
    return Data({n: a for n, a in arrays.items() if n in names}, None, spec)


def windows(text: str, how: Text, length: int | None = None, source: str = "text") -> np.ndarray:
    """Tokens (n, length) int64: each window is the begin token, where there is one, and the text that follows the window before.

    What is left over at the end is dropped. `length` None stands for the model's window, at most LENGTH. Raises
    PlanishError for a text shorter than one window.
    """
    length = _length(how, length, source)
    lead = [] if how.begin is None else [how.begin]
    ids = np.asarray(opened(how.tokenizer).encode(text, add_special_tokens=False).ids, np.int64)
    step = length - len(lead)
    count = len(ids) // step
    if count == 0:
        raise PlanishError(
            f"data '{source}' has {len(ids)} tokens, fewer than one window of {step}; "
            "give a longer text or a smaller --length"
        )
    rows = ids[: count * step].reshape(count, step)
    return np.concatenate([np.full((count, len(lead)), how.begin or 0, np.int64), rows], 1)


def sentences(text: str, how: Text, length: int | None = None, source: str = "text") -> tuple[np.ndarray, np.ndarray]:
    """The text's lines that are not empty, with the tokenizer's own special tokens, cut after `length` tokens: tokens and mask.

    Both are (n, longest) int64; the mask is 0 where padding stands. Raises PlanishError for a text without a line.
    """
    length = _length(how, length, source)
    tokenizer = opened(how.tokenizer)
    pad = json.loads(how.tokenizer).get("padding") or {}
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=pad.get("pad_id") or tokenizer.token_to_id("[PAD]") or 0)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise PlanishError(f"data '{source}' has no line of text")
    found = tokenizer.encode_batch(lines)
    return np.asarray([e.ids for e in found], np.int64), np.asarray([e.attention_mask for e in found], np.int64)


def begin(tokenizer: str, folder: Path) -> int | None:
    """The token in front of every text: what the tokenizer itself puts there, else the bos token where its config asks for one."""
    made = opened(tokenizer, str(folder / "tokenizer.json"))
    alone = made.encode("", add_special_tokens=True).ids
    if alone:
        return alone[0]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    token = config.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return made.token_to_id(token) if config.get("add_bos_token") and isinstance(token, str) else None


def _length(how: Text, length: int | None, source: str) -> int:
    if length is None:
        return min(how.window, LENGTH)
    if not 2 <= length <= how.window:
        raise PlanishError(f"data '{source}': windows of {length} tokens; the model takes 2 to {how.window}")
    return length


def opened(content: str, where: str = "tokenizer.json") -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, without truncation and padding. Raises PlanishError for what is none."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise missing_extra("tokenizers", "hf", "turning text into tokens") from error
    try:
        made = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the Rust side raises Exception itself
        reason = (str(error).strip() or "no reason given").splitlines()[0][:150]
        raise PlanishError(f"'{where}' is not a tokenizer: {reason}") from None
    made.no_truncation()
    made.no_padding()
    return made
