"""Does the generated C equal ONNX Runtime bit for bit? Four networks on this machine and in the emulated microcontroller.

    python benchmarks/c_exact.py [--json] [--target stm32f746] [--images 1000] [--emulated 10] [--quantizer planish]

`host` and `emulated` count the output values that differ from ONNX Runtime's, of all compared. `arena / bound` compares the
planned memory with the most bytes that are alive at one step, below which no plan can go. `--quantizer onnxruntime` takes
models made by onnxruntime.quantization (QDQ, per channel, uint8 activations) instead of planish's own.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import models
import numpy as np
import onnx
import onnxruntime
import torch
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export.artifact import Artifact
from planish.export.c import C
from planish.export.format import Source
from planish.export.lowering import to_onnx
from planish.runtimes import c as host
from planish.runtimes import emulator
from planish.targets import target as targets

NETWORKS = ("resnet20", "resnet8", "dscnn", "mobilenet_v1_025")
CALIBRATION = 128


def by_planish(module, x, target):
    model = trace(module, {"x": torch.from_numpy(x[:2])}, "benchmark")
    context = Context(model, Data({"x": x}, None, "calibration"), target, torch.Generator().manual_seed(0))
    return to_onnx(Static().apply(model, context))


def by_onnxruntime(module, x, target):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": x[i : i + 16]} for i in range(0, len(x), 16)])

        def get_next(self):
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        floating, prepared, quantized = (str(Path(folder) / f"{n}.onnx") for n in ("float", "prepared", "quantized"))
        torch.onnx.export(
            module,
            (torch.from_numpy(x[:2]),),
            floating,
            input_names=["x"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        quant_pre_process(floating, prepared)
        quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(quantized)


def by_ort(model, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": x[i : i + 50]})[0] for i in range(0, len(x), 50)])


def measure(name, quantizer, target, images, emulated, folder):
    x = models.images(name, max(images, CALIBRATION))
    model = quantizer(getattr(models, name)(), x[:CALIBRATION], target)
    x = x[:images]
    want = by_ort(model, x)
    written = C().write(Source(model, {"x": x[:1]}, name), target, folder)
    artifact = Artifact(folder, {"format": "c", "target": target.name})
    output = written.outputs[0]["name"]
    with host.C().open(artifact, 1) as session:
        start = time.perf_counter()
        on_host = session.run({"x": x})[output]
        seconds = time.perf_counter() - start
    with emulator.Emulator().open(artifact, 1) as session:
        on_device = session.run({"x": x[:emulated]})[output]
        profile = session.profile({"x": x[:1]}, 1, 0)
    memory = written.details["memory"]
    return {
        "network": name,
        "outputs": want.size,
        "host_different": int((on_host != want).sum()),
        "host_seconds": round(seconds, 2),
        "emulated_outputs": on_device.size,
        "emulated_different": int((on_device != want[:emulated]).sum()),
        "arena_bytes": memory["arena"],
        "bound_bytes": memory["bound"],
        "arena_over_bound": memory["arena"] / memory["bound"],
        "flash_bytes": profile.flash_bytes,
        "ram_bytes": profile.ram_bytes,
        "stack_bytes": profile.stack_bytes,
        "macs": profile.macs,
        "instructions": profile.instructions,
        "instructions_per_mac": round(profile.instructions / profile.macs, 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--target", default="stm32f746")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--emulated", type=int, default=10)
    parser.add_argument("--quantizer", choices=("planish", "onnxruntime"), default="planish")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    target = targets.load(args.target)
    quantizer = {"planish": by_planish, "onnxruntime": by_onnxruntime}[args.quantizer]
    rows = []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, quantizer, target, args.images, args.emulated, Path(folder)))
    result = {
        "target": target.name,
        "quantizer": args.quantizer,
        "images": args.images,
        "emulated_images": args.emulated,
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{target.name}, quantized by {args.quantizer}: {args.images} images on this machine, {args.emulated} emulated"
    )
    print(
        f"{'network':18}{'host':>12}{'emulated':>12}{'arena':>9}{'/ bound':>9}{'flash':>9}{'stack':>7}{'instructions':>14}{'/ MAC':>7}"
    )
    for r in rows:
        print(
            f"{r['network']:18}{r['host_different']:>5} /{r['outputs']:>5}{r['emulated_different']:>6} /{r['emulated_outputs']:>4}"
            f"{r['arena_bytes']:>9}{r['arena_over_bound']:>9.3f}{r['flash_bytes']:>9}{r['stack_bytes']:>7}"
            f"{r['instructions']:>14}{r['instructions_per_mac']:>7.2f}"
        )


if __name__ == "__main__":
    main()
