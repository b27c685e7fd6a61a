"""MobileNetV2-0.35 in patches: peak memory and additional work beside whole maps.

    python benchmarks/patches.py [--json] [--sizes 96 160 224] [--core cortex-m4] [--extra 0.15] [--run]

`alive` is the memory of the tensors that live at once in the fullest step, the input included: what a planner without overlaps needs at
least. `whole` is planish's arena without patches, work memory of the kernels included; `patches` the same in patches, and
`ratio` what is saved of `alive`. `proven`: no plan of the same layers is smaller. `--run` compiles both for the core's
target where they fit it, runs them in the emulator and counts codes that differ from whole maps in the integer reference. Weights are random: memory and counts do not depend on them.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import mcu
import numpy as np
import torch
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export import c_project, firmware, memory, patches, qdq
from planish.export.lowering import to_onnx
from planish.targets import target as targets
from torch import nn

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""expansion, channels at width 1, blocks, stride of the first block (Sandler et al. 2018, table 2)"""
CLASSES = 10
CALIBRATION = 8


def rounded(channels):
    """Channels in multiples of 8, at most 10 % less than asked for."""
    found = max(8, int(channels + 4) // 8 * 8)
    return found + 8 if found < 0.9 * channels else found


class Inverted(nn.Module):
    """Expand, depthwise convolution, project; a shortcut where shapes allow it."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        layers = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        ]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = self.body(x)
        return x + y if self.shortcut else y


def mobilenet_v2(width=0.35):
    """Random weights, from a fixed seed."""
    torch.manual_seed(0)
    channels = rounded(32 * width)
    layers = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()]
    for expansion, outputs, blocks, stride in STAGES:
        for i in range(blocks):
            layers.append(Inverted(channels, rounded(outputs * width), stride if i == 0 else 1, expansion))
            channels = rounded(outputs * width)
    layers += [nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES)).eval()


def quantized(size):
    """The int8 deployment graph at `size` x `size` pixels, and images (n, 3, size, size)."""
    x = np.random.default_rng(0).normal(0, 1, (CALIBRATION, 3, size, size)).astype(np.float32)
    model = trace(mobilenet_v2(), {"x": torch.from_numpy(x[:2])}, "mobilenet_v2")
    data = Data({"x": x}, None, "calibration")
    context = Context(model, data, targets.load("stm32f446"), torch.Generator().manual_seed(0))
    return qdq.read(to_onnx(Static(samples=CALIBRATION).apply(model, context))), x


def measure(size, core, extra, run):
    """Figures at one size."""
    graph, x = quantized(size)
    target = targets.load(mcu.CORES[core])
    known = {}

    def calls(g):
        return c_project.calls_of(g, target.features, known)

    found = patches.choose(graph, calls, extra=extra)
    if found is None:
        raise SystemExit(f"no patches lower the peak at {size} x {size} for {extra:.0%} more MACs")
    whole, split = memory.of(graph, calls(graph)), memory.of(found.graph, calls(found.graph))
    stage = next(s for s in patches.stages(graph) if s.output.name == found.until)
    counted = stage.macs(found.grid) - sum(graph.ops[n.op].macs(n) for n in stage.nodes)
    row = {
        "input_bytes": graph.inputs[0].tensor.bytes,
        "alive_bytes": whole.bound,
        "whole_bytes": whole.plan.arena,
        "patches_bytes": split.plan.arena,
        "proven": split.plan.optimal,
        "least_bytes": split.plan.least,
        "ratio": round(whole.bound / split.plan.arena, 3),
        "macs": graph.macs,
        "extra_macs": found.extra_macs,
        "extra_macs_from_boxes": counted,
        "extra": round(found.share, 4),
        "layers": found.layers,
        "grid": list(found.grid),
    }
    if run:
        for name, made, arena in (("whole", graph, whole.plan.arena), ("patches", found.graph, split.plan.arena)):
            if arena + firmware.STACK <= target.ram.length:
                with tempfile.TemporaryDirectory() as folder:
                    row[name], _ = mcu.measure(made, "mobilenet", core, x[:2], Path(folder))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 160, 224])
    parser.add_argument("--core", choices=mcu.CORES, default="cortex-m4")
    parser.add_argument("--extra", type=float, default=0.15, help="additional MACs at most, as a share")
    parser.add_argument("--run", action="store_true", help="compile, emulate and compare too")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    result = {}
    if not args.json:
        print(
            f"{'pixels':>7}{'input':>8}{'alive':>8}{'whole':>8}{'patches':>9}{'proven':>8}{'ratio':>7}{'MACs':>10}{'more':>9}"
            f"{'%':>6}  first layers in patches"
        )
    for size in args.sizes:
        row = result[size] = measure(size, args.core, args.extra, args.run)
        if args.json:
            continue
        print(
            f"{size:>7}{row['input_bytes']:>8}{row['alive_bytes']:>8}{row['whole_bytes']:>8}{row['patches_bytes']:>9}"
            f"{'yes' if row['proven'] else row['least_bytes']:>8}{row['ratio']:>7.2f}{row['macs']:>10}{row['extra_macs']:>9}"
            f"{100 * row['extra']:>6.1f}  {row['layers']} layers, {row['grid'][0]} x {row['grid'][1]}",
            flush=True,
        )
        for name in ("whole", "patches") if args.run else ():
            r = row.get(name)
            print(f"{'':7}{name}: does not fit {mcu.CORES[args.core]}") if r is None else print(
                f"{'':7}{name}: {r['instructions']} instructions, arena {r['arena_bytes']}, flash {r['flash_bytes']}, code "
                f"{r['code_bytes']}, different {r['different']}",
                flush=True,
            )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
