"""Static int8 quantization of ResNet-20 and MLPerf Tiny ResNet-8 on CIFAR-10: accuracy, bytes, and speed in ONNX Runtime.

    python benchmarks/ptq.py [--json]

Accuracy on the 4,937 test images of the development half, in ONNX Runtime and in the generated C (compiled for this machine).
Speed is one thread, one process, the sessions in turn, medians. `peer` is the same network by onnxruntime.quantization
(QDQ, per channel, uint8 activations); `float` is ONNX Runtime's float session, `float, plain layout` the same without its
AVX-512 blocked layout (graph optimization level 'extended').
"""

import argparse
import json
import tempfile
import time
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
from planish.export import artifact
from planish.export.c import C
from planish.export.format import Source
from planish.export.lowering import to_onnx
from planish.runtimes import c as c_runtime
from planish.runtimes import ort
from planish.targets import target

TEST = 4937


def accuracy(scores, labels):
    return 100 * float((scores.argmax(1) == labels).mean())


def in_c(proto, x, folder):
    """Outputs of the generated C, compiled for this machine; the pipeline's own manifest is not needed for that."""
    from planish.common import files

    folder.mkdir()
    written = C().write(Source(proto, {"x": x[:2]}, "net"), target.load("stm32h743"), folder)
    manifest = {
        "format": "c", "format_version": 1, "target": "stm32h743", "name": "net", "inputs": written.inputs,
        "outputs": written.outputs, "details": dict(written.details), "files": {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(files.to_json(manifest))
    with c_runtime.C().open(artifact.load(folder), 1) as session:
        return next(iter(session.run({"x": x}).values()))


def peer(path, calibration, folder):
    """The same float file quantized by ONNX Runtime's own tool."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": calibration[i : i + 64]} for i in range(0, len(calibration), 64)])

        def get_next(self):
            return next(self.batches, None)

    quant_pre_process(path, folder / "pre.onnx", skip_symbolic_shape=True)
    quantize_static(
        folder / "pre.onnx", folder / "peer.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return folder / "peer.onnx"


def in_turn(sessions, x, rounds):
    """Median milliseconds of each session, one call of each per round."""
    times = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, {"x": x})
    for _ in range(rounds):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"x": x})
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(t)) for name, t in times.items()}


def network(name, folder):
    x, y = models.images(name, TEST), models.labels(TEST)
    calibration = models.images(name, 1024, "train")
    model = trace(getattr(models, name)(), {"x": torch.from_numpy(x[:2])}, name)
    context = Context(
        model, Data({"x": calibration}, None, "train"), target.load("host"), torch.Generator().manual_seed(0)
    )
    original, quantized = to_onnx(model), to_onnx(Static().apply(model, context))
    paths = {"float": folder / f"{name}.onnx", "int8": folder / f"{name}_int8.onnx"}
    onnx.save(original, paths["float"])
    onnx.save(quantized, paths["int8"])
    plain = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    sessions = {
        "float": ort.create(paths["float"], 1),
        "int8": ort.create(paths["int8"], 1),
        "peer": ort.create(peer(paths["float"], calibration[:512], folder), 1),
        "float, plain layout": ort.create(paths["float"], 1, graph_optimization_level=plain),
    }
    result = {"n": TEST}
    for key in ("float", "int8", "peer"):
        result[f"accuracy_{key}"] = accuracy(ort.run(sessions[key], {"x": x})[sessions[key].get_outputs()[0].name], y)
    outputs = in_c(quantized, x, folder / f"{name}_c")
    result["accuracy_c"] = accuracy(outputs, y)
    result["c_equals_onnxruntime"] = bool(np.array_equal(outputs, ort.run(sessions["int8"], {"x": x})["output"]))
    sizes = {k: p.stat().st_size for k, p in paths.items()}
    result["bytes_ratio"] = sizes["int8"] / sizes["float"]
    for batch, rounds in ((1, 300), (16, 60)):
        median = in_turn(sessions, x[:batch], rounds)
        result[f"batch_{batch}"] = {
            **{f"ms_{k}": v for k, v in median.items()},
            "speedup": median["float"] / median["int8"],
            "speedup_of_peer": median["float"] / median["peer"],
            "speedup_over_plain_layout": median["float, plain layout"] / median["int8"],
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        report = {name: network(name, Path(scratch)) for name in ("resnet20", "resnet8")}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, r in report.items():
        print(f"{name}: accuracy float {r['accuracy_float']:.2f}, int8 {r['accuracy_int8']:.2f} in ONNX Runtime, "
              f"{r['accuracy_c']:.2f} in C (equal: {r['c_equals_onnxruntime']}), peer {r['accuracy_peer']:.2f}; "
              f"file {r['bytes_ratio']:.3f} of float")  # fmt: skip
        for batch in (1, 16):
            b = r[f"batch_{batch}"]
            print(f"  batch {batch:2}: float {b['ms_float']:.3f} ms, int8 {b['ms_int8']:.3f} ms, {b['speedup']:.2f}x faster "
                  f"(peer {b['speedup_of_peer']:.2f}x; over float in plain layout {b['speedup_over_plain_layout']:.2f}x)")  # fmt: skip


if __name__ == "__main__":
    main()
