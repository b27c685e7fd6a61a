"""ResNet-20 on CIFAR-10: channel pruning, recovery on 15,000 training images, then int8. Accuracy, MACs and CPU time.

    python benchmarks/prune.py [--json] [--macs 0.526] [--multiple 8] [--epochs 24] [--criterion taylor] [--threads 1]

Accuracy on the 4,937 test images of the development half. CPU seconds are user + system time of the process over all
cores, for pruning and recovery together; wall seconds depend on what else the machine does.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import models
import numpy as np
import onnx
import torch
from planish.compress import cost
from planish.compress.data import Data
from planish.compress.distill import Distill
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.prune.channels import Channels
from planish.compress.quantize.static import Static
from planish.export.lowering import to_onnx
from planish.runtimes import ort
from planish.targets import target

TRAIN, TEST = 15000, 4937


def accuracy(scores, labels):
    return 100 * float((scores.argmax(1) == labels).mean())


def answers(model, x):
    with torch.inference_mode():
        return np.concatenate([model(torch.from_numpy(x[i : i + 500])).numpy() for i in range(0, len(x), 500)])


def widths(model):
    """Output channels of every convolution."""
    return {n.removesuffix(".weight"): p.shape[0] for n, p in model.graph.named_parameters() if p.ndim == 4}


def measure(options):
    torch.set_num_threads(options.threads)
    x, y = models.images("resnet20", TEST), models.labels(TEST)
    data = Data({"x": models.images("resnet20", TRAIN, "train")}, models.labels(TRAIN, "train"), "cifar10_train_15k")
    model = trace(models.resnet20(), {"x": torch.from_numpy(x[:2])}, "resnet20")
    context = Context(model, data, target.load("host"), torch.Generator().manual_seed(options.seed))
    start = {"cpu": time.process_time(), "wall": time.perf_counter()}
    pruned = Channels(
        macs=options.macs, criterion=options.criterion, ranking=options.ranking, multiple=options.multiple
    ).apply(model, context)
    seconds_prune = time.process_time() - start["cpu"]
    recovered = Distill(
        epochs=options.epochs, learning_rate=options.rate, temperature=options.temperature, crop=4, flip=True
    ).apply(pruned, context)
    report = {
        "n": TEST,
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "macs": [cost.total_macs(m) for m in (model, recovered)],
        "params": [m.parameters() for m in (model, recovered)],
        "cpu_seconds": time.process_time() - start["cpu"],
        "cpu_seconds_pruning": seconds_prune,
        "wall_seconds": time.perf_counter() - start["wall"],
        "accuracy_float": accuracy(answers(model, x), y),
        "accuracy_pruned": accuracy(answers(pruned, x), y),
        "accuracy_recovered": accuracy(answers(recovered, x), y),
        "widths": [widths(model), widths(recovered)],
    }
    report["times_fewer_macs"] = report["macs"][0] / report["macs"][1]
    calibration = Data({"x": data.inputs["x"][:1024]}, None, "cifar10_train_15k")
    quantized = Static().apply(recovered, Context(recovered, calibration, context.target, context.generator))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        onnx.save(to_onnx(quantized), path)
        session = ort.create(path, 1)
        report["accuracy_int8"] = accuracy(ort.run(session, {"x": x})[session.get_outputs()[0].name], y)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--macs", type=float, default=0.526, help="fraction that may remain (1.9 times fewer)")
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--ranking", default="global")
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = measure(options)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"multiply-accumulates  {report['macs'][0]:>12,} -> {report['macs'][1]:>12,}  {report['times_fewer_macs']:.2f}x fewer"
    )
    print(f"parameters            {report['params'][0]:>12,} -> {report['params'][1]:>12,}")
    print(f"accuracy (n = {report['n']})   float {report['accuracy_float']:.2f} %, pruned {report['accuracy_pruned']:.2f} %, "
          f"recovered {report['accuracy_recovered']:.2f} %, int8 {report['accuracy_int8']:.2f} %")  # fmt: skip
    print(f"time                  {report['cpu_seconds']:.0f} CPU seconds ({report['cpu_seconds_pruning']:.0f} for pruning), "
          f"{report['wall_seconds']:.0f} wall")  # fmt: skip
    for name, before in report["widths"][0].items():
        print(f"  {name:16} {before:3} -> {report['widths'][1][name]:3} channels")


if __name__ == "__main__":
    main()
