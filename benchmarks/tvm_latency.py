"""TVM libraries against ONNX Runtime: latency on this machine, and instructions on an emulated Cortex-A72.

    python benchmarks/tvm_latency.py [--json] [--runs 200] [--no-emulation]

ResNet-20 (CIFAR-10), float and int8 (planish's static quantization), MobileNetV1-0.25 and DS-CNN (MLPerf Tiny shapes, float).
Latency: batch 1, one thread, one process, the sessions in turn, medians. `plain` is TVM with its own loops, `default` the register
tiling without tuning, `records` with the shipped tuning database. Instructions need qemu-aarch64 and are exact.
"""

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path

import models
import numpy as np
import torch
from planish.common.errors import Missing
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export import _tvm_compat, tuning, tvm_import, tvm_schedule
from planish.export.lowering import to_onnx
from planish.export.tvm import compile_model, link
from planish.runtimes import ort, qemu_user
from planish.runtimes.tvm import bound_main
from planish.targets import target

RASPBERRY = "raspberry-pi-4"


def sources():
    """{name: (ONNX model, one sample)}."""
    host = target.load("host")
    found = {}
    nets = {
        "resnet20": ("ResNet-20", models.resnet20),
        "mobilenet_v1_025": ("MobileNetV1-0.25", models.mobilenet_v1_025),
        "dscnn": ("DS-CNN", models.dscnn),
    }
    for key, (name, build) in nets.items():
        net, x = build(), models.images(key, 64)
        model = trace(net, {"x": torch.from_numpy(x[:2])}, name)
        found[f"{name} float"] = to_onnx(model), x[:1]
        if name == "ResNet-20":
            context = Context(model, Data({"x": x}, None, name), host, torch.Generator().manual_seed(0))
            found[f"{name} int8"] = to_onnx(Static().apply(model, context)), x[:1]
    return found


def contenders(proto, name, x):
    """{label: callable} for one model: ONNX Runtime and the ways of compiling it."""
    from tvm import cpu, relax, runtime

    host = target.load("host")
    fixed = tvm_import.fix_batch(proto)
    session = ort.create(proto.SerializeToString(), 1)
    records = tuning.shipped(tvm_schedule.vector_unit(host).lanes)
    found = {"ONNX Runtime": lambda: session.run(None, {"x": x})}
    want = session.run(None, {"x": x})[0]
    for label, kwargs in (
        ("plain", {"plain": True, "records": {}}),
        ("default", {"records": {}}),
        ("records", {"records": records}),
    ):
        with _tvm_compat.quiet():
            main = bound_main(relax.VirtualMachine(compile_model(fixed, host, **kwargs).executable, cpu()))
        tensor = runtime.tensor(x)
        got = main(tensor).numpy()
        if np.abs(got - want).max() > (0.1 if "int8" in name else 1e-4) * np.abs(want).max():
            raise SystemExit(f"{name}, {label}: wrong answer")
        found[label] = lambda main=main, tensor=tensor: main(tensor)
    return found


def medians(found, runs):
    """Median milliseconds of each, in turn; the plain loops run a tenth as often."""
    times = {label: [] for label in found}
    for i in range(runs):
        for label, call in found.items():
            if label == "plain" and i % 10:
                continue
            start = time.perf_counter()
            call()
            times[label].append((time.perf_counter() - start) * 1e3)
    return {label: float(np.median(t)) for label, t in times.items()}


def instructions(proto, x, kit, folder):
    """Exact instructions of one inference on the emulated Cortex-A72, with TVM's loops and with the default tiling."""
    device = target.load(RASPBERRY)
    fixed = tvm_import.fix_batch(proto)
    shape = [d.dim_value for d in fixed.graph.output[0].type.tensor_type.shape.dim]
    counts = {}
    for label in ("plain", "default"):
        library = folder / "model.so"
        with _tvm_compat.quiet():
            link(compile_model(fixed, device, {}, label == "plain").executable, device, library)
        result = [(tuple(shape), np.dtype(np.float32))]
        _, counted = qemu_user.run(kit, library, device.emulator_cpu or "max", [[x]], result, count=True)
        counts[label] = counted.total if counted else None
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--no-emulation", action="store_true")
    chosen = parser.parse_args()
    kit = None
    if not chosen.no_emulation:
        with contextlib.suppress(Missing):
            kit = qemu_user.kit()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (proto, x) in sources().items():
            row = {"model": name, "latency_ms": medians(contenders(proto, name, x), chosen.runs)}
            base = row["latency_ms"]["ONNX Runtime"]
            row["ratio_to_onnx_runtime"] = {k: v / base for k, v in row["latency_ms"].items() if k != "ONNX Runtime"}
            if kit is not None and kit.plugin is not None:
                row["cortex_a72_instructions"] = instructions(proto, x, kit, Path(scratch))
            rows.append(row)
    if chosen.json:
        print(json.dumps({"rows": rows}))
        return
    print(
        f"{'model':24}{'ORT ms':>9}{'plain':>9}{'default':>9}{'records':>9}   (times ORT)   Cortex-A72 instructions: plain, default"
    )
    for row in rows:
        ratio = row["ratio_to_onnx_runtime"]
        line = f"{row['model']:24}{row['latency_ms']['ONNX Runtime']:9.3f}"
        line += "".join(f"{ratio[k]:8.2f}x" for k in ("plain", "default", "records"))
        counts = row.get("cortex_a72_instructions")
        print(line + (f"{'':17}{counts['plain']:>14,} {counts['default']:>14,}" if counts else ""))


if __name__ == "__main__":
    main()
