"""The trained language models of benchmarks/weights: small enough, loadable, and as good as their training said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planish.compress import evaluation, load

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
KINDS = ("decoder", "mamba")


def test_weights_are_16_bit_and_at_most_25_megabytes_together() -> None:
    safetensors = pytest.importorskip("safetensors")
    assert sum(f.stat().st_size for f in (ROOT / "weights").rglob("*") if f.is_file()) <= 25_000_000
    for kind in KINDS:
        with safetensors.safe_open(ROOT / "weights" / kind / "model.safetensors", "pt") as file:
            tensors = [file.get_tensor(n) for n in file.keys()]  # noqa: SIM118, safetensors' handle is no mapping
        assert {t.dtype for t in tensors} == {torch.float16}
        assert 5_000_000 <= sum(t.numel() for t in tensors) <= 15_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_perplexity(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a quarter of the held-out windows: within 10 % of what all of them gave, by planish's own loading and scoring."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    import models
    import text

    if not (models.data_folder() / text.FILES[0]).is_file():
        pytest.skip(f"no texts in '{models.data_folder()}'; PLANISH_DATA names another folder")
    folder = ROOT / "weights" / kind
    facts = json.loads((folder / "training.json").read_text())
    tokens = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.held_out_text()).ids
    rows = text.windows(torch.tensor(tokens), facts["context"])
    assert rows.numel() == facts["held_out_tokens"]
    model = load.load(str(folder))
    found = evaluation.perplexity(evaluation.language(model), np.ascontiguousarray(rows[::4].numpy())).value
    assert found == pytest.approx(facts["held_out_perplexity"], rel=0.1)
