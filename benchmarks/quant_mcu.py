"""QuantMCU on a trained network: widths of feature maps, work, memory, accuracy and instructions.

    python benchmarks/quant_mcu.py [--json] [--images 500] [--grid 3 3] [--phi 1.0] [--shares 0.8 0.6] [--core cortex-m4]

ResNet-8 of MLPerf Tiny on CIFAR-10, int8 weights. The first layers run in patches up to the map that `--until` counts (0: no patches).
`BitOPs` are MACs times bits of weights and activations, as a share of those with all maps in 8 bits. They are not time: where a core has
no narrow arithmetic, codes are unpacked first, so instructions are counted in the emulator beside them. `alive` are bytes of tensors that
live at once, `arena` what the planner needs with overlaps and work memory. The first lines are whole maps and patches of 8 bits.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import mcu
import models
import torch
from planish.export import memory, patches, qdq, quant_mcu

CALIBRATION = 64


def accuracy(graph, x, labels):
    """The share of images (n, ...) whose highest score is their label."""
    (scores,) = graph.reference({"x": x}).values()
    return float((scores.argmax(1) == labels).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--until", type=int, default=2, help="the stage that runs in patches, counted from 1")
    parser.add_argument("--grid", type=int, nargs=2, default=[3, 3])
    parser.add_argument("--phi", type=float, default=1.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--core", choices=mcu.CORES, default="cortex-m4")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    graph = qdq.read(mcu.quantized("ic"))
    calibration = {"x": models.images("resnet8", CALIBRATION, "train")}
    x, labels = models.images("resnet8", args.images), models.labels(args.images)
    stage = patches.stages(graph)[args.until - 1] if args.until else None
    grid = (args.grid[0], args.grid[1])
    variants = [("whole maps", graph, 1.0, None)]
    if stage is not None:
        variants.append(("patches", patches.split(stage, grid), 1.0, None))
    for widths in ((8, 4), (8, 4, 2)):
        for share in args.shares:
            found = quant_mcu.search_for_work(graph, calibration, 1 << 20, share, stage, grid, args.phi, widths)
            name = f"{'/'.join(map(str, widths))}, {share} of the work"
            variants.append((name, found.graph, found.bitops / found.bitops_int8, found))
    rows = {}
    if not args.json:
        print(
            f"{'':24}{'BitOPs':>7}{'outliers':>10}{'8/4/2 bits':>12}{'alive':>7}{'arena':>7}{'accuracy':>9}{'instructions':>13}{'flash':>7}{'different':>10}"
        )
    for name, made, work, found in variants:
        with tempfile.TemporaryDirectory() as folder:
            row, _ = mcu.measure(made, "ic", args.core, x[:2], Path(folder))
        counts = [sum(w == b for w in found.widths.values()) for b in quant_mcu.WIDTHS] if found else None
        rows[name] = {
            "bitops": round(work, 4),
            "outlier_patches": sum(found.outliers) if found else 0,
            "widths": counts,
            "weight": found.weight if found else None,
            "alive_bytes": memory.bound(made),
            "accuracy": accuracy(made, x, labels),
            **{k: row[k] for k in ("arena_bytes", "instructions", "flash_bytes", "different")},
        }
        if not args.json:
            r = rows[name]
            print(
                f"{name:24}{r['bitops']:>7.2f}{r['outlier_patches']:>10}{'/'.join(map(str, counts)) if counts else '':>12}"
                f"{r['alive_bytes']:>7}{r['arena_bytes']:>7}{100 * r['accuracy']:>8.1f}%{r['instructions']:>13}{r['flash_bytes']:>7}"
                f"{r['different']:>10}",
                flush=True,
            )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
