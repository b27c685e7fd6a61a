"""Low-bit methods on language models: perplexity, bytes and seconds, on the plain weights and with outliers put in.

    python benchmarks/low_bit.py [story|decoder|mamba ...] [--weights KIND ...] [--only TEXT ...] [--json]

`story` is the 260K-parameter Llama-style story model of the data folder, `decoder` and `mamba` the models of
benchmarks/weights. All methods get the same weights, the same calibration windows (of the training text; for `story`, of text
that the model made itself) and are measured on the same held-out windows.

Kinds of weights: `plain`; `outliers`, the same function with a few norm gains scaled by 20 to 60 and the next weights' columns divided
(benchmarks/outliers.py), so that what is lost there is lost to outliers; and for `mamba` the same inside its blocks
(benchmarks/mamba_outliers.py): `convolution`, `step`, `state`, each when asked for, and `all` of them with the norms.

Behind the table: outlier-victim pairs against the best clipped int4 on the tensors that the norms give, in dB, at several shares
of outlier channels; and which of the bars hold. One thread; seconds are wall time of the recipe, weights loaded. With --json
the table goes to standard error and one JSON document to standard output.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import mamba_outliers
import models
import numpy as np
import outliers
import torch
from planish.common.errors import PlanishError
from planish.compress import evaluation, load, recipe
from planish.compress.data import Data, check
from planish.compress.moments import Moments
from planish.compress.passes import Context
from planish.compress.quantize.mamba_rotations import observe
from planish.kernels.outlier_victim import codec, search
from planish.targets import target

LENGTH = 128
CALIBRATION, EVALUATION = 64, 160
"""windows"""

FOUR = "bits: 4, activations: 4, group: auto, granularity: group"
"""weights and activations with a scale for each group of 64 columns, as in SVDQuant"""
METHODS = {
    # label: (bits of weights and activations, passes)
    "rtn W8A8": ("W8A8", ["quantize.dynamic: {clip: false}"]),
    "rtn W8A8 per tensor": ("W8A8", ["quantize.dynamic: {clip: false, granularity: tensor}"]),
    "llm.int8": ("W8A8", ["quantize.llm_int8"]),
    "llm.int8, dequantized": ("W8A8", ["quantize.llm_int8: {exact: false}"]),
    "smoothquant": ("W8A8", ["quantize.smoothquant", "quantize.dynamic: {clip: false}"]),
    "hadamard": ("W8A8", ["quantize.rotate", "quantize.dynamic: {clip: false}"]),
    "klt x hadamard": ("W8A8", ["quantize.rotate: {kind: klt-hadamard}", "quantize.dynamic: {clip: false}"]),
    "rtn W4A8": ("W4A8", ["quantize.dynamic: {bits: 4, group: auto, clip: false}"]),
    "hadamard W4A8": ("W4A8", ["quantize.rotate", "quantize.dynamic: {bits: 4, group: auto}"]),
    "rtn W4A4": ("W4A4", [f"quantize.dynamic: {{{FOUR}, clip: false}}"]),
    "hadamard W4A4": ("W4A4", ["quantize.rotate", f"quantize.dynamic: {{{FOUR}}}"]),
    "ovp W4A4": ("W4A4", ["quantize.ovp"]),
    "ovp int or flint W4A4": ("W4A4", ["quantize.ovp: {grid: auto}"]),
    "svdquant W4A4": ("W4A4", ["quantize.svdquant"]),
    "svdquant gptq W4A4": ("W4A4", ["quantize.svdquant: {gptq: true}"]),
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
}
STATIC = {
    # label: fields of quantize.mambaquant, W8A8 with one range for a tensor, scan operands too; `hadamard` turns as QuaRot does
    "static nearest": {"smooth": False, "rotate": False},
    "static hadamard": {"smooth": False, "klt": False},
    "static smooth": {"rotate": False},
    "static klt x hadamard": {"smooth": False},
    "mambaquant": {},
    "mambaquant, scan in float": {"scan": False},
}
SITES = {"convolution": ("convolution",), "step": ("step",), "state": ("state",), "all": mamba_outliers.SITES}
"""kinds of weights with outliers inside Mamba blocks"""
KINDS = ("plain", "outliers", "all")
"""measured when no --weights are given"""
WITHIN = ("llm.int8", "smoothquant", "hadamard", "klt x hadamard", "mambaquant")
"""methods whose perplexity with outliers must be within 1 % of float"""
COLLAPSE = 0.1
"""perplexity lost from which on rounding to nearest has collapsed"""
ROWS = 512
"""of each tensor, that outlier-victim pairs are compared on"""
GAIN = 7
"""dB that outlier-victim pairs must be better by where at most 1 % of the elements are outliers"""
CLOSED = 0.8
"""share of the gap of log perplexity that SVDQuant must close"""


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


def perplexity(model, windows):
    return evaluation.perplexity(evaluation.language(model), windows).value


def weights(plain, kind):
    """The model with the outliers of a kind."""
    model = outliers.inject(plain)[0] if kind in ("outliers", "all") else plain
    return mamba_outliers.inject(model, SITES[kind]) if kind in SITES else model


def methods(name, kind, only):
    """{label: (bits, passes)} of what is measured on one kind of weights of one model."""
    found = {} if kind in SITES else dict(METHODS)
    if name == "mamba":  # JSON is YAML
        found |= {label: ("W8A8", [f"quantize.mambaquant: {json.dumps(fields)}"]) for label, fields in STATIC.items()}
        found["mamba rotations W4A8"] = (
            "W4A8",
            ["quantize.mamba_rotations", "quantize.dynamic: {bits: 4, group: auto}"],
        )
    return {label: method for label, method in found.items() if not only or any(o in label for o in only)}


def measure(name, kinds, only, say):
    """(rows of the table, gains of outlier-victim pairs) of one model."""
    plain, calibration, held_out = story() if name == "story" else trained(name)
    data = check(Data({"input_ids": calibration}, None, "calibration"), plain.inputs)
    rows = []
    for kind in kinds:
        if kind in SITES and name != "mamba":
            continue
        model = weights(plain, kind)
        exact = perplexity(model, held_out)
        base = {"model": name, "weights": kind}
        rows.append(base | {"method": "float", "bits": "32", "perplexity": exact, "bytes": model.bytes()})
        say(line(rows[-1]))
        for label, (bits, passes) in methods(name, kind, only).items():
            row = base | {"method": label, "bits": bits}
            try:
                compressed, seconds = quantize(model, passes, data)
            except PlanishError as error:  # a block size that does not divide the story model's 172 channels
                row |= {"refused": str(error)}
            else:
                found = perplexity(compressed, held_out)
                row |= {"perplexity": found, "bytes": compressed.bytes(), "seconds": seconds, "lost": found / exact - 1}
            rows.append(row)
            say(line(row))
    shares = [] if only and "ovp" not in only else (1, 2, 4)
    return rows, [pairs(name, plain, data, channels, say) for channels in shares]


def line(row):
    """One row as text."""
    begin = f"{row['model']:8}{row['weights']:12}{row['method']:27}{row['bits']:7}"
    if "refused" in row:
        return begin + f"refused: {row['refused']}"
    lost = "" if "lost" not in row else f"{row['lost']:+12.2%}{row['seconds']:8.1f} s"
    return begin + f"{row['perplexity']:12.4f}{row['bytes']:13,}{lost}"


def decibels(x, y):
    """Signal over squared error, of y for x."""
    return float(10 * torch.log10(x.double().square().sum() / (x - y).double().square().sum()))


def best_clip(x):
    """x in symmetric int4 with one step for the tensor, the one of 200 with the least squared error."""
    steps = x.abs().max() / 7 * torch.linspace(0.005, 1, 200)
    found = ((x / step).round().clamp(-7, 7) * step for step in steps)
    return min(found, key=lambda y: float((y - x).double().square().sum()))


def paired(x, kind):
    """x as 4-bit outlier-victim pairs with one step for the tensor."""
    format = codec(4, kind)
    step, _ = search(x, format, by_row=False)
    return format.round_trip(x / step) * step


def pairs(name, plain, data, channels, say):
    """dB of 4-bit outlier-victim pairs over the best clipped int4 with `channels` outlier channels at each norm.

    Of the tensors that the norms give, one step for each; and of the outputs of the layers that read them, where errors in
    channels count as the function counts them. All searches look at the tensor's own squared error. `gain` takes for each tensor the
    grid with less error, as the paper does; `gain_of_int` the int4 grid alone.
    """
    model = outliers.inject(plain, channels=channels)[0]
    groups = outliers.behind_norms(model.graph)
    width = groups[0][0].weight.shape[1]
    seen = [Moments(width, keep=ROWS) for _ in groups]
    batches = list(data.sample(16, torch.Generator().manual_seed(0)).batches(model, 8))
    observe(model.graph, {g[0].source: m.add for g, m in zip(groups, seen, strict=True)}, lambda: batches)
    found = []
    for group, moments in zip(groups, seen, strict=True):
        x, weight = moments.kept, torch.cat([item.weight for item in group])
        int4, flint4 = paired(x, "int"), paired(x, "flint")
        best, clip = max(int4, flint4, key=lambda y, x=x: decibels(x, y)), best_clip(x)
        row = {"layer": group[0].name, "clip": decibels(x, clip), "ovp": decibels(x, best)}
        row |= {"gain": row["ovp"] - row["clip"], "gain_of_int": decibels(x, int4) - row["clip"]}
        after = decibels(x @ weight.T, best @ weight.T) - decibels(x @ weight.T, clip @ weight.T)
        found.append(row | {"gain_of_outputs": after})
    report = {"model": name, "channels": channels, "of": width, "tensors": found}
    for key in ("ovp", "clip", "gain", "gain_of_int", "gain_of_outputs"):
        report[key] = statistics.median(f[key] for f in found)
        report[f"least_{key}"] = min(f[key] for f in found)
    say(
        f"{name:8}pairs, {channels} outlier channels of {width} ({channels / width:.1%}): best clip {report['clip']:.1f} dB, pairs "
        f"{report['ovp']:.1f}, gain {report['gain']:+.1f} (least {report['least_gain']:+.1f}), int grid alone {report['gain_of_int']:+.1f}; "
        f"of outputs {report['gain_of_outputs']:+.1f} (least {report['least_gain_of_outputs']:+.1f}); medians of {len(found)}"
    )
    return report


def share_closed(exact, ruined, found):
    """Share of the gap of log perplexity between float and rounding to nearest that a method closes, from the three perplexities."""
    return float(np.log(ruined / found) / np.log(ruined / exact))


def verdicts(rows, gains):
    """[(statement, whether it holds, figure)]: what must hold with outliers put in."""
    found = {(r["model"], r["weights"], r["method"]): r for r in rows if "perplexity" in r}
    made = []
    for model, kind in dict.fromkeys((r["model"], r["weights"]) for r in rows):
        own = {m: r for (a, b, m), r in found.items() if (a, b) == (model, kind)}
        if kind == "plain":
            continue
        where = f"{model}, {kind}"
        if (model, "plain", "float") in found:
            moved = own["float"]["perplexity"] / found[model, "plain", "float"]["perplexity"] - 1
            made.append((f"{where}: float unchanged", abs(moved) <= 1e-4, f"{moved:+.4%}"))
        for method in ("rtn W8A8", "rtn W8A8 per tensor", "rtn W4A4", "static nearest"):
            if method in own:
                lost = own[method]["lost"]
                made.append((f"{where}: {method} loses more than {COLLAPSE:.0%}", lost > COLLAPSE, f"{lost:+.2%}"))
        for method in WITHIN:
            if method in own:
                lost = own[method]["lost"]
                made.append((f"{where}: {method} within 1 % of float", lost <= 0.01, f"{lost:+.2%}"))
        if "static hadamard" in own:
            lost = own["static hadamard"]["lost"]
            made.append((f"{where}: static hadamard not within 1 %", lost > 0.01, f"{lost:+.2%}"))
        if {"rtn W4A4", "svdquant W4A4"} <= set(own):
            closed = share_closed(*(own[m]["perplexity"] for m in ("float", "rtn W4A4", "svdquant W4A4")))
            made.append((f"{where}: svdquant W4A4 closes {CLOSED:.0%} of the gap of log perplexity", closed >= CLOSED, f"{closed:.1%}"))  # fmt: skip
    for g in gains:
        if g["channels"] <= 0.01 * g["of"]:
            share = f"{g['channels'] / g['of']:.1%} outliers"
            for key, what in (("gain", "tensors"), ("gain_of_outputs", "outputs")):
                made.append((f"{g['model']}, {share}: pairs {GAIN} dB over best-clip int4, median of {what}", g[key] >= GAIN, f"{g[key]:+.1f} dB"))  # fmt: skip
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["story", "decoder", "mamba"])
    parser.add_argument("--weights", nargs="+", default=KINDS, choices=("plain", "outliers", *SITES))
    parser.add_argument("--only", nargs="+", default=[], help="methods whose label holds one of these texts")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not models.data_folder().is_dir():
        raise SystemExit(f"the data folder '{models.data_folder()}' is missing; PLANISH_DATA names another")
    say = functools.partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    rows, gains = [], []
    for name in arguments.models:
        more, better = measure(name, arguments.weights, arguments.only, say)
        rows += more
        gains += better
    found = verdicts(rows, gains)
    for statement, holds, figure in found:
        say(f"{'REACHED' if holds else 'NOT REACHED':12}{statement} ({figure})")
    if arguments.json:
        bars = [{"bar": s, "reached": bool(h), "figure": f} for s, h, f in found]
        print(json.dumps({"rows": rows, "pairs": gains, "bars": bars}))


if __name__ == "__main__":
    main()
