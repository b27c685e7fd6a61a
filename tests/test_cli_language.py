"""The command line on a language model: a Hugging Face folder and a text file, through every verb, to text from ONNX Runtime."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planish import cli

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")

SENTENCE = "the cat sat on mat and dog ran to tree then it slept under big red sun"
WORDS = SENTENCE.split()
RECIPE = "name: low\npasses:\n  - quantize.rtn: {bits: 4, group: 16}\n"


def planish(*words):
    """Run a command line in this process: exit code."""
    sys.argv = ["planish", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def said(capsys, *words):
    """The JSON object that a command prints."""
    assert planish(*words, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def make_tokenizer():
    """One token a word; 0 ends a text."""
    vocabulary = {w: i for i, w in enumerate(["</s>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>", "<unk>"])
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a small Llama that has learnt a few sentences, its text, and the compressed model and artifact."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    made = make_tokenizer()
    ids = torch.tensor([made.encode(f"{SENTENCE} {SENTENCE}", add_special_tokens=False).ids])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "llama")
    made.save(str(folder / "llama" / "tokenizer.json"))
    (folder / "text.txt").write_text(f"{SENTENCE} " * 20)
    (folder / "short.txt").write_text("the cat sat")
    (folder / "low.yaml").write_text(RECIPE)
    shutil.copytree(folder / "llama", folder / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def compressed(place):
    """compress and export, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert planish("compress", "llama", "--data", "text.txt", "-r", "low.yaml", "-o", "small") == 0
        assert planish("export", "small", "-o", "artifact") == 0
    return place


def test_perplexity_is_the_same_on_every_runtime(compressed, capsys):
    windows = ("--data", "text.txt", "--length", "16")
    original = said(capsys, "evaluate", "llama", *windows)
    assert original["metric"] == "perplexity" and original["runtime"] == "pt2"
    assert 1 < original["value"] < 3  # it knows the sentence, and not where a window begins
    assert original["n"] == len(WORDS) * 20 // 16 * 15
    small, artifact = (said(capsys, "evaluate", m, *windows) for m in ("small", "artifact"))
    assert artifact["runtime"] == "ort" and small["n"] == artifact["n"] == original["n"]
    assert artifact["value"] == pytest.approx(small["value"], rel=0.02)
    assert small["value"] == pytest.approx(original["value"], rel=0.2)


def test_tokens_serve_as_data_too(compressed, capsys):
    rows = np.tile(np.arange(2, 18), (3, 1))
    np.savez("tokens.npz", input_ids=rows)
    for model in ("llama", "artifact"):
        assert said(capsys, "evaluate", model, "--data", "tokens.npz")["n"] == 3 * 15


def test_without_data_the_golden_answers_are_compared(compressed, capsys):
    for model in ("small", "artifact"):
        report = said(capsys, "evaluate", model)
        assert report["metric"] == "cosine" and 0.9 < report["value"] < 1
        assert 0 < report["kl"] < 0.1 and report["agreement"] > 0.9


def test_the_compress_report_has_perplexity(compressed, capsys):
    quality = json.loads(Path("small/manifest.json").read_text())["quality"]
    assert quality["metric"] == "perplexity" and quality["n"] > 100
    assert quality["compressed"] == pytest.approx(quality["original"], rel=0.2)
    assert 0 <= quality["kl"] < 0.1 and quality["agreement"] > 0.9
    assert json.loads(Path("artifact/manifest.json").read_text())["quality"] == quality


def test_a_short_text_serves_with_a_smaller_length(compressed, capsys, tmp_path):
    """What the message about a text shorter than a window advises."""
    short = ("--data", "short.txt", "--length", "3")
    assert said(capsys, "compress", "llama", *short, "-r", "low.yaml", "-o", tmp_path / "out")["quality"]["n"] == 2
    report = said(capsys, "inspect", "llama", *short)
    assert report["samples"] == 1 and report["quality"]["n"] == 2


@pytest.mark.parametrize("verb, takes", [("compress", True), ("inspect", True), ("export", False), ("run", False)])
def test_only_verbs_that_read_text_say_so(capsys, verb, takes):
    assert planish(verb, "--help") == 0
    shown = capsys.readouterr().out
    assert (".txt" in shown) == ("--length" in shown) == takes


@pytest.mark.parametrize("model, runtime", [("llama", "pt2"), ("small", "pt2"), ("artifact", "ort")])
def test_generation_goes_on_with_the_sentence(compressed, capsys, model, runtime):
    report = said(capsys, "generate", model, "--prompt", "the cat sat", "--tokens", "6")
    assert report["text"].split() == ["on", "mat", "and", "dog", "ran", "to"]
    assert (report["tokens"], report["prompt_tokens"], report["runtime"]) == (6, 3, runtime)
    assert report["tokens_per_second"] > 0


def test_generation_prints_prompt_and_continuation(compressed, capsys):
    assert planish("generate", "artifact", "-p", "the cat sat", "-n", "2") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "the cat sat on mat"
    assert "tokens/s" in shown[1]


def test_inspect_shows_layers_outliers_and_what_was_done(compressed, capsys):
    report = said(capsys, "inspect", "llama", "--data", "text.txt", "--samples", "2")
    rows = {r["name"]: r for r in report["layers"]}
    row = rows["model.layers.0.self_attn.q_proj"]
    assert row["op"] == "linear" and row["shape"] == [32, 32] and row["bytes"] == 32 * 32 * 4
    assert {"peak", "kurtosis", "columns", "ratio"} == set(row["input"])
    assert row["sensitivity"]["2"] > row["sensitivity"]["8"]
    assert [a["name"] for a in report["attention"]] == ["model.layers.0.self_attn"]
    after = said(capsys, "inspect", "small")
    stored = {r["name"]: r for r in after["layers"]}["model.layers.0.self_attn.q_proj"]
    assert stored["op"] == "linear_wna16" and stored["bits"] in (8, 4, 3, 2) and 0 < stored["error"] < 1
    assert after["bytes"] < report["bytes"]
    assert planish("inspect", "small") == 0
    assert "q_proj" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (("generate", "artifact", "-p", "the", "-n", "64"), "exceed the 64"),
        (("generate", "artifact", "-n", "4"), "no token that begins a text"),
        (("inspect", "artifact"), "is an artifact"),
        (("evaluate", "llama"), "carries no answers of an original model"),
        (("evaluate", "artifact", "--data", "none.txt"), "'none.txt' does not exist"),
        (("evaluate", "artifact", "--data", "text.txt", "--length", "100"), "the model takes 2 to 64"),
        (("evaluate", "artifact", "--data", "short.txt"), "has 3 tokens, fewer than one window of 64"),
        (("compress", "llama", "--data", "short.txt", "-r", "low.yaml", "-o", "none"), "fewer than one window of 64"),
        (("compress", "mute", "--data", "text.txt", "-r", "low.yaml", "-o", "none"), "'mute' has no tokenizer.json"),
    ],
)
def test_bad_input_is_one_line(compressed, capsys, words, message):
    assert planish(*words) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not Path("none").exists()
