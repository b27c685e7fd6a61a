"""MLPerf Tiny on microcontrollers: instructions, memory and flash of planish's C, counted in emulators.

    python benchmarks/mcu.py [--json] [--cores cortex-m4 ...] [--models ic ...] [--widths int8 ...] [--layers] [--cycles] [--images 3]

Every number is of the whole network, all layers included, and the same in every run. `ratio` is to CMSIS-NN's instructions for
the same layers (main branch of July 2026, GCC 12.2 -Ofast, QEMU; on Cortex-M0+ its portable C counted on a Cortex-M3). int4 and int2
are widths of the weights, activations keep 8 bits. `different` counts outputs that differ from the integer reference. `beyond` is the
flash besides the weights at their width and 8 bytes an output for bias and scale: code, start-up, tables, structs, padding.

`--cycles` holds the cycle model against boards: cycles an instruction that it gives for our code, and those of CMSIS-NN on real
boards (MLPerf Tiny closed division, cycles of the submission over CMSIS-NN's instructions; the submissions used older versions of it,
so the board's figure mixes cycles an instruction with the version).
"""

import argparse
import hashlib
import json
import logging
import tempfile
from pathlib import Path

import models
import onnx
import torch
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export import c as c_format
from planish.export import qdq
from planish.export.artifact import Artifact
from planish.export.lowering import to_onnx
from planish.export.narrow import bits, narrow
from planish.runtimes.emulator import Emulator
from planish.targets import target as targets

CORES = {
    "cortex-m0plus": "rp2040",
    "cortex-m4": "stm32f446",
    "cortex-m7": "stm32f746",
    "cortex-m33": "rp2350",
    "cortex-m55": "corstone-300",
}
"""the target that stands for each core"""
MODELS = {"ic": "resnet8", "kws": "dscnn", "vww": "mobilenet_v1_025", "ad": "autoencoder"}
WIDTHS = {"int8": 8, "int4": 4, "int2": 2}
CALIBRATION = 128
CMSIS_NN = {
    "cortex-m0plus": {"ic": 3.34, "kws": 3.97, "vww": 4.28, "ad": 3.60},
    "cortex-m4": {"ic": 2.38, "kws": 2.89, "vww": 3.23, "ad": 2.19},
    "cortex-m7": {"ic": 2.38, "kws": 2.89, "vww": 3.24, "ad": 2.19},
    "cortex-m33": {"ic": 2.39, "kws": 2.93, "vww": 3.28, "ad": 2.19},
    "cortex-m55": {"ic": 0.384, "kws": 0.669, "vww": 0.857, "ad": 0.555},
}
"""instructions per MAC of CMSIS-NN"""
GOALS = {
    "cortex-m0plus": {"ic": 3.3, "kws": 4.0, "vww": 4.3, "ad": 3.6},
    "cortex-m4": {"ic": 1.6, "kws": 2.0, "vww": 1.6, "ad": 1.8},
    "cortex-m55": {"ic": 0.36, "kws": 0.60, "vww": 0.75, "ad": 0.50},
}
"""what this project set out to reach"""
BOARDS = {
    "cortex-m4": {
        "L4R5 120 MHz, microTVM": {"ic": 3.74, "kws": 4.51, "vww": 4.83, "ad": 3.91},
        "L4R5 120 MHz, ONNC": {"ic": 2.85, "kws": 4.23, "vww": 3.17, "ad": 3.64},
    },
    "cortex-m33": {"nRF5340 128 MHz, microTVM": {"ic": 3.24, "kws": 3.67, "vww": 3.97, "ad": 3.04}},
    "cortex-m55": {"EK-RA8D1 (M85) 480 MHz, TFLM": {"ic": 0.33, "kws": 0.63, "vww": 0.86, "ad": 0.96}},
}
"""cycles per MAC of CMSIS-NN on boards (MLPerf Tiny 1.0 to 1.2)"""
ARENA_GOALS = {"ic": 49152, "kws": 16000, "vww": 55296, "ad": 768}
"""bytes of activations that are alive at once, by tensor lifetimes alone"""


def quantized(name):
    """The int8 QDQ model of one network. Kept in the temporary folder, so that a series of runs quantizes once."""
    network = MODELS[name]
    folder = Path(__file__).resolve().parent.parent
    parts = [folder / "compress" / "quantize" / "static.py", folder / "export" / "lowering.py", Path(models.__file__)]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"planish-mcu-{network}-{key}.onnx"
    if not cache.is_file():
        x = models.images(network, CALIBRATION, "test" if network == "dscnn" else "train")
        module = models.autoencoder() if network == "autoencoder" else getattr(models, network)(softmax=True)
        model = trace(module, {"x": torch.from_numpy(x[:2])}, "benchmark")
        target = targets.load("stm32f446")
        context = Context(model, Data({"x": x}, None, "calibration"), target, torch.Generator().manual_seed(0))
        cache.write_bytes(to_onnx(Static().apply(model, context)).SerializeToString())
    return onnx.load(cache)


def measure(graph, name, core, samples, folder):
    """Figures of one graph on one core, and its layers."""
    target = targets.load(CORES[core])
    facts, flash, _ = c_format.write_project(graph, name, target, {"x": samples[:1]}, folder, [])
    expected = next(iter(graph.reference({"x": samples}).values()))
    with Emulator().open(Artifact(folder, {"format": "c", "target": target.name}), 1) as session:
        got = next(iter(session.run({"x": samples}).values()))
        profile = session.profile({"x": samples[:1]}, 1, 0)
    sizes, memory = facts["sizes"], facts["memory"]
    weighted = [n for n in graph.nodes if "weight" in n.constants]
    packed = sum(n.constants["weight"].size * bits(n) // 8 + 8 * len(n.constants["bias"]) for n in weighted)
    row = {
        "instructions_per_mac": round(profile.instructions / graph.macs, 4),
        "instructions": profile.instructions,
        "arena_bytes": memory["arena"],
        "stack_bytes": profile.stack_bytes,
        "flash_bytes": flash,
        "code_bytes": sizes["code"],
        "packed_bytes": packed,
        "different": int((got != expected).sum()),
        "cycles_estimate": profile.cycles_estimate,
    }
    kernels = {x["name"]: x["kernel"] for x in facts["layers"]}
    return row, [(x.name, kernels[x.name], x.macs, x.instructions) for x in profile.layers]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cores", nargs="+", choices=CORES, default=list(CORES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--layers", action="store_true", help="print every layer too")
    parser.add_argument("--cycles", action="store_true", help="print the cycle model beside published boards")
    parser.add_argument("--images", type=int, default=3, help="samples whose outputs are compared")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    result = {core: {name: {} for name in args.models} for core in args.cores}
    if not args.json:
        print(
            f"{'core':15}{'model':6}{'width':7}{'instructions':>13}{'/ MAC':>8}{'goal':>7}{'ratio':>7}{'/ int8':>8}"
            f"{'arena':>8}{'goal':>8}{'stack':>7}{'flash':>8}{'code':>7}{'beyond':>8}{'different':>10}"
        )
    for name in args.models:
        graph = qdq.read(quantized(name))
        samples = models.images(MODELS[name], args.images)
        for width in args.widths:
            narrowed = graph if width == "int8" else narrow(graph, WIDTHS[width])
            for core in args.cores:
                with tempfile.TemporaryDirectory() as folder:
                    row, layers = measure(narrowed, name, core, samples, Path(folder))
                result[core][name][width] = row
                if args.json:
                    continue
                base = result[core][name].get("int8", {}).get("instructions")
                goal = GOALS.get(core, {}).get(name)
                print(
                    f"{core:15}{name:6}{width:7}{row['instructions']:>13}{row['instructions_per_mac']:>8.3f}"
                    f"{goal if goal and width == 'int8' else '':>7}"
                    f"{row['instructions_per_mac'] / CMSIS_NN[core][name]:>7.2f}"
                    f"{row['instructions'] / base if base else float('nan'):>8.2f}"
                    f"{row['arena_bytes']:>8}{ARENA_GOALS[name]:>8}{row['stack_bytes']:>7}{row['flash_bytes']:>8}{row['code_bytes']:>7}"
                    f"{row['flash_bytes'] - row['packed_bytes']:>8}{row['different']:>10}",
                    flush=True,
                )
                if args.cycles and row["cycles_estimate"]:
                    low, high = (c / row["instructions"] for c in row["cycles_estimate"])
                    print(f"    cycles an instruction {low:.2f} to {high:.2f} by the model", end="")
                    for board, figures in BOARDS.get(core, {}).items():
                        print(f"; {figures[name] / CMSIS_NN[core][name]:.2f} on {board}", end="")
                    print()
                if args.layers:
                    for layer, kernel, macs, instructions in layers:
                        each = f"{instructions / macs:8.3f}" if macs else ""
                        print(f"    {layer:24}{kernel:28}{macs:>9}{instructions:>10}{each}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
