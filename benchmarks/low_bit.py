"""Low-bit methods on language models: perplexity, bytes and seconds, on the plain weights and with outliers put in.

    python benchmarks/low_bit.py [story|decoder|mamba ...] [--only TEXT] [--json]

`story` is the 260K-parameter Llama-style story model of the data folder, `decoder` and `mamba` the models of
benchmarks/weights. All methods get the same weights, the same calibration windows (of the training text; for `story`, of text
that the model made itself) and are measured on the same held-out windows. `outliers` is the same function with a few
norm gains scaled by 20 to 60 and the next weights' columns divided (benchmarks/outliers.py): what is lost there is lost to outliers.
One thread; seconds are wall time of the recipe, weights loaded.
"""

import argparse
import json
import time
from pathlib import Path

import models
import numpy as np
import outliers
import torch
from planish.compress import evaluation, load, recipe
from planish.compress.data import Data, check
from planish.compress.passes import Context
from planish.targets import target

LENGTH = 128
CALIBRATION, EVALUATION = 64, 160
"""windows"""

METHODS = {
    # label: (bits of weights and activations, passes)
    "rtn W8A8": ("W8A8", ["quantize.dynamic: {clip: false}"]),
    "llm.int8": ("W8A8", ["quantize.llm_int8"]),
    "smoothquant": ("W8A8", ["quantize.smoothquant", "quantize.dynamic: {clip: false}"]),
    "hadamard": ("W8A8", ["quantize.rotate", "quantize.dynamic: {clip: false}"]),
    "klt x hadamard": ("W8A8", ["quantize.rotate: {kind: klt-hadamard}", "quantize.dynamic: {clip: false}"]),
    "rtn W4A4": ("W4A4", ["quantize.dynamic: {bits: 4, activations: 4, group: auto, clip: false}"]),
    "hadamard W4A4": ("W4A4", ["quantize.rotate", "quantize.dynamic: {bits: 4, activations: 4, group: auto}"]),
    "ovp W4A4": ("W4A4", ["quantize.ovp"]),
    "svdquant W4A4": ("W4A4", ["quantize.svdquant"]),
    "rtn W4A16": ("W4A16", ["quantize.rtn: {bits: 4, group: auto, clip: false}"]),
    "rtn clip W4A16": ("W4A16", ["quantize.rtn: {bits: 4, group: auto}"]),
    "hqq W4A16": ("W4A16", ["quantize.hqq: {bits: 4, group: auto}"]),
    "awq W4A16": ("W4A16", ["quantize.awq: {bits: 4, group: auto}", "quantize.rtn: {bits: 4, group: auto}"]),
    "gptq W4A16": ("W4A16", ["quantize.gptq: {bits: 4, group: auto}"]),
    "nf4": ("W4A16", ["quantize.nf4"]),
    "mxfp4": ("W4A16", ["quantize.mxfp4"]),
    "nvfp4": ("W4A16", ["quantize.nvfp4"]),
    "fp8": ("W8A16", ["quantize.fp8"]),
    "rtn clip W3A16": ("W3A16", ["quantize.rtn: {bits: 3, group: auto}"]),
    "gptq W3A16": ("W3A16", ["quantize.gptq: {bits: 3, group: auto}"]),
    "rtn clip W2A16": ("W2A16", ["quantize.rtn: {bits: 2, group: auto}"]),
    "gptq W2A16": ("W2A16", ["quantize.gptq: {bits: 2, group: auto}"]),
    "mambaquant": ("W8A8", ["quantize.mambaquant"]),
    "mambaquant, hadamard only": ("W8A8", ["quantize.mambaquant: {klt: false, smooth: false}"]),
}
ONLY = {"mambaquant": "mamba", "mambaquant, hadamard only": "mamba"}
"""methods for one kind of model"""
WITHIN = ("llm.int8", "smoothquant", "hadamard", "mambaquant")
"""methods whose perplexity with outliers must be within 1 % of float"""


def story():
    """(model, calibration windows, evaluation windows) of the story model."""
    import story_model

    tokens = story_model.tokens()
    begin = np.int64(1)

    def windows(flat):
        body = flat[: len(flat) // (LENGTH - 1) * (LENGTH - 1)].reshape(-1, LENGTH - 1).astype(np.int64)
        return np.concatenate([np.full((len(body), 1), begin), body], axis=1)

    rows = tokens["generated"].astype(np.int64)[:, :LENGTH]
    stories = np.concatenate([windows(v[1:]) for k, v in sorted(tokens.items()) if k != "generated"])
    return story_model.model(), rows[: CALIBRATION // 2], np.concatenate([stories, rows[CALIBRATION // 2 :]])


def trained(name):
    """(model, calibration windows, evaluation windows) of a model of benchmarks/weights."""
    import text
    import tokenizers

    folder = Path(__file__).parent / "weights" / name
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def windows(string, count):
        flat = torch.tensor(tokenizer.encode(string).ids)
        rows = text.windows(flat, LENGTH).numpy()
        return rows[:: max(1, len(rows) // count)][:count]

    return load.load(str(folder)), windows(text.training_text(), CALIBRATION), windows(text.held_out_text(), EVALUATION)


def quantize(model, passes, data):
    """(compressed model, seconds) of a list of passes given as YAML lines."""
    plan = recipe.parse("name: x\npasses:\n" + "".join(f"  - {p}\n" for p in passes), "benchmark")
    context = Context(model, data, target.load("host"), torch.Generator().manual_seed(0))
    started = time.perf_counter()
    for _, step in plan.passes:
        model = step.apply(model, context)
    return model, time.perf_counter() - started


def measure(name, only):
    """Rows of the table for one model."""
    plain, calibration, held_out = story() if name == "story" else trained(name)
    data = check(Data({"input_ids": calibration}, None, "calibration"), plain.inputs)
    rows = []
    for kind in ("plain", "outliers"):
        model = plain if kind == "plain" else outliers.inject(plain)[0]
        original = evaluation.perplexity(evaluation.language(model), held_out).value
        rows.append({"model": name, "weights": kind, "method": "float", "bits": "32", "perplexity": original, "bytes": model.bytes()})  # fmt: skip
        show(rows[-1], original)
        for label, (bits, passes) in METHODS.items():
            if ONLY.get(label, name) != name or (only and only not in label):
                continue
            compressed, seconds = quantize(model, passes, data)
            value = evaluation.perplexity(evaluation.language(compressed), held_out).value
            row = {"model": name, "weights": kind, "method": label, "bits": bits, "perplexity": value}
            rows.append(row | {"bytes": compressed.bytes(), "seconds": seconds, "lost": value / original - 1})
            show(rows[-1], original)
    return rows


def show(row, original, file=None):
    lost = "" if "lost" not in row else f"{row['lost']:+9.2%}{row['seconds']:8.1f} s"
    print(f"{row['model']:8}{row['weights']:10}{row['method']:27}{row['bits']:7}{row['perplexity']:12.4f}{row['bytes']:13,}{lost}", flush=True)  # fmt: skip


def verdicts(rows):
    """The bars: what must hold with outliers put in."""
    found = {(r["model"], r["weights"], r["method"]): r for r in rows}
    for model in sorted({r["model"] for r in rows}):
        for method in WITHIN:
            row = found.get((model, "outliers", method))
            if row:
                print(
                    f"{model}: {method} within 1 % of float: {'REACHED' if row['lost'] <= 0.01 else 'NOT REACHED'} ({row['lost']:+.2%})"
                )
        keys = [(model, "outliers", m) for m in ("float", "rtn W4A4", "svdquant W4A4")]
        if all(k in found for k in keys):
            exact, nearest, svd = (np.log(found[k]["perplexity"]) for k in keys)
            closed = (nearest - svd) / (nearest - exact)
            print(
                f"{model}: svdquant W4A4 closes >= 80 % of the gap (in log perplexity): {'REACHED' if closed >= 0.8 else 'NOT REACHED'} ({closed:.1%})"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["story", "decoder", "mamba"])
    parser.add_argument("--only", help="methods whose label holds this text")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not models.data_folder().is_dir():
        raise SystemExit(f"the data folder '{models.data_folder()}' is missing; PLANISH_DATA names another")
    rows = [row for name in arguments.models for row in measure(name, arguments.only)]
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        verdicts(rows)


if __name__ == "__main__":
    main()
