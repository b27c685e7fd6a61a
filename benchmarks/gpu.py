"""Low-bit layers on an NVIDIA GPU against bfloat16 `torch.matmul`, and a 1B decoder end to end.

    python benchmarks/gpu.py [--only weight_only,w8a8,...] [--quick] [--json benchmarks/results/gpu-<card>.json]

Every ratio is of medians of CUDA-graph replays in one run, ours and the baseline alternating. Weights rotate through copies of three
times the L2 cache, as consecutive layers of a model do, so that each call reads them from memory. Results are compared with the definition
of each op first. Ceilings (a large copy, large matrix products) are measured in the same run. Without a GPU: the compile-only part, the
machine code of every kernel for three architectures (benchmarks/sass.py).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from planish.kernels.gpu.core import CORES, of_device
from planish.kernels.gpu.op import Layer
from planish.runtimes import cuda_device
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import gpu_attention
import gpu_cases as cases
import gpu_decoder
import sass

RESULTS = Path(__file__).parent / "results"
SQUARE = (4096, 8192, 16384)
LLAMA = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(out, in) of the layers of Llama-3-8B"""
BATCHES = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
ROUNDS, REPLAYS = 7, 5
TOLERANCE = 0.02
"""largest error of a checked output, of the largest true value: bfloat16 in and out"""


@dataclass(frozen=True)
class Row:
    """One measured layer."""

    section: str
    what: str
    out: int
    channels: int
    batch: int
    ms: float
    baseline_ms: float
    ratio: float
    """baseline / ours: more is better"""
    bytes_per_second: float
    copy_share: float
    """of the measured copy"""
    operations_per_second: float
    error: float


@dataclass(frozen=True)
class Goal:
    """A line of the numbers to reach."""

    section: str
    text: str
    least: float
    takes: Callable[[Row], bool]
    value: Callable[[Row], float] = lambda r: r.ratio


GOALS = (
    Goal("w4a16", "batch 1, 4096: >= 2.6x", 2.6, lambda r: r.batch == 1 and r.out == r.channels == 4096),
    Goal("w4a16", "batch 1, 8192: >= 3.0x", 3.0, lambda r: r.batch == 1 and r.out == r.channels == 8192),
    Goal("w4a16", "batch 1, 16384: >= 3.3x", 3.3, lambda r: r.batch == 1 and r.out == r.channels == 16384),
    Goal("w4a16", "to batch 16: >= 2.2x", 2.2, lambda r: r.batch <= 16 and r.out == r.channels),
    Goal("w4a16", "to batch 128: >= 1.0x", 1.0, lambda r: r.batch <= 128),
    Goal("w4a16", "beyond: >= 0.9x", 0.9, lambda r: r.batch > 128),
    Goal("w4a16", "batch 1, from 8192: >= 80 % of the copy", 0.8, lambda r: r.batch == 1 and r.out == r.channels >= 8192, lambda r: r.copy_share),
    Goal("w8a8 with quantization", "from batch 256: >= 1.5x", 1.5, lambda r: r.batch >= 256),
    Goal("LLM.int8", "from batch 64: >= 1.0x", 1.0, lambda r: r.batch >= 64),
    Goal("LLM.int8 against w8a8", ">= 0.9x", 0.9, lambda r: True),
    Goal("SVDQuant without its branch", "<= 12 % for the branch", 1 / 1.12, lambda r: True),
    Goal("decoder", "w4a16, batch 1: >= 2.2x tokens/s", 2.2, lambda r: True),
)  # fmt: skip


class Bench:
    """Timing on one device."""

    def __init__(self, quick: bool) -> None:
        self.device = torch.device("cuda")
        self.core = of_device(self.device)
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.rounds = 3 if quick else ROUNDS
        self.copy = cuda_device.copy_rate()
        self.product = cuda_device.product_rate(torch.bfloat16) or 0.0

    def environment(self) -> dict[str, Any]:
        """What a figure needs to be understood."""
        ceilings = {"copy_bytes_per_second": self.copy, "bf16_operations_per_second": self.product}
        return {**cuda_device.environment(), "core": self.core.name, **ceilings}

    def times(self, contenders: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
        """Median milliseconds of one call of each contender; a contender is a list of calls that are run one behind the other."""
        graphs = [cuda_device.Captured(lambda calls=calls: [call() for call in calls]) for calls in contenders]
        found: list[list[float]] = [[] for _ in contenders]
        for _ in range(self.rounds):
            for index, graph in enumerate(graphs):
                found[index] += [t / len(contenders[index]) for t in cuda_device.times(graph.replay, REPLAYS, 1)]
        return [statistics.median(f) for f in found]

    def copies(self, size: int) -> int:
        """Weights of `size` bytes that together are three times the cache, at least two."""
        return max(2, -(-3 * self.cache_bytes // size))


def shapes(quick: bool) -> Iterator[tuple[int, int]]:
    """(out, in): squares, then the layers of a model."""
    yield from ((n, n) for n in (SQUARE[:2] if quick else SQUARE))
    if not quick:
        yield from LLAMA.values()


def linear(bench: Bench, section: str, make: Callable[[int, int], Layer], sizes: Sequence[tuple[int, int]], batches: Sequence[int], against: Callable[[int, int], Layer] | None = None) -> Iterator[Row]:  # fmt: skip
    """Rows of one kind of layer, against bfloat16 or another layer."""
    for out, channels in sizes:
        layer = make(out, channels)
        ours = cases.case(layer, bench.core, bench.device, bench.copies)
        if against is None:
            count = bench.copies(2 * out * channels)
            dense = [torch.randn(out, channels, dtype=torch.bfloat16, device=bench.device) for _ in range(count)]
            base: Sequence[Callable[[torch.Tensor], torch.Tensor]] = [partial(F.linear, weight=w) for w in dense]
        else:
            other = cases.case(against(out, channels), bench.core, bench.device, lambda _, ours=ours: len(ours.calls))
            base = other.calls
        for batch in batches:
            x = torch.randn(batch, channels, dtype=torch.bfloat16, device=bench.device)
            error = ours.check(x)
            ms, baseline = bench.times([[partial(call, x) for call in calls] for calls in (ours.calls, base)])
            moved = ours.stored_bytes + 2 * batch * (channels + out)
            yield Row(
                section, f"{out} x {channels}", out, channels, batch, ms, baseline, baseline / ms, moved / ms * 1e3,
                moved / ms * 1e3 / bench.copy, 2 * batch * out * channels / ms * 1e3, error,
            )  # fmt: skip
        del ours, base
        gc.collect()
        torch.cuda.empty_cache()


def attention(bench: Bench, quick: bool) -> Iterator[Row]:
    """Decoding over a key/value cache in 8 bits, against torch's attention over one in bfloat16."""
    for context in (1024, 8192) if quick else (1024, 8192, 32768):
        for batch, form in itertools.product((1, 8), ("int8", "e4m3")):
            made = gpu_attention.Decode(batch, context, form, bench.device, bench.copies)
            ms, baseline = bench.times([made.ours, made.base])
            rate = made.stored_bytes / ms * 1e3
            yield Row(
                f"attention, {form} cache", f"context {context}", 0, context, batch, ms, baseline, baseline / ms, rate,
                rate / bench.copy, made.operations / ms * 1e3, made.check(),
            )  # fmt: skip
            del made
            torch.cuda.empty_cache()


def decoder(bench: Bench, quick: bool) -> Iterator[Row]:
    """Tokens a second of a Llama-shaped decoder of 1B parameters, batch 1, from artifacts."""
    ours, base = gpu_decoder.measure(
        gpu_decoder.TINY if quick else gpu_decoder.LARGE, f"cuda-{bench.core.name.replace('_', '')}", "cuda"
    )
    yield Row("decoder", "w4a16, a token", 0, 0, 1, 1e3 / ours, 1e3 / base, ours / base, 0.0, 0.0, 0.0, 0.0)


def sections(bench: Bench, quick: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    """What --only chooses from."""
    sizes = list(shapes(quick))
    square = [(n, n) for n in SQUARE[: 1 if quick else 2]]
    few, all_batches = (1, 16, 64, 256, 1024), BATCHES if not quick else (1, 16, 128, 1024)

    def part(section: str, make: Callable[[int, int], Layer], where: Sequence[tuple[int, int]], batches: Sequence[int], against: Callable[[int, int], Layer] | None = None) -> Callable[[], Iterator[Row]]:  # fmt: skip
        return lambda: linear(bench, section, make, where, batches, against)

    return {
        "w4a16": part("w4a16", cases.weight_only, sizes, all_batches),
        "w8a16": part("w8a16", lambda n, k: cases.weight_only(n, k, 8), square, few),
        "w2a16": part("w2a16", lambda n, k: cases.weight_only(n, k, 2), square, few),
        "nf4": part("nf4", cases.nf4, square, few),
        "w8a8": part("w8a8 with quantization", cases.w8a8, sizes, (1, 16, 64, 256, 1024, 4096)),
        "fp8": part("fp8", cases.fp8, square, few),
        "llm_int8": part("LLM.int8", cases.llm_int8, square, few),
        "llm_int8_w8a8": part("LLM.int8 against w8a8", cases.llm_int8, square, (64, 256, 1024), cases.w8a8),
        "svd": part("SVDQuant w4a8", cases.svd, square, few),
        "svd_branch": part("SVDQuant without its branch", cases.svd, square, (1, 16, 256, 1024), lambda n, k: cases.svd(n, k, 0)),
        "svd_w8a8": part("SVDQuant w8a8", lambda n, k: cases.svd(n, k, bits=8), square, few),
        "ovp": part("OliVe", cases.ovp, square, few),
        "sparse": part("2:4", cases.sparse, square, few),
        "attention": lambda: attention(bench, quick),
        "decoder": lambda: decoder(bench, quick),
    }  # fmt: skip


def show(row: Row) -> None:
    """One line."""
    print(
        f"{row.section:<30}{row.what:<16}{row.batch:>6}{row.ms:>10.4f}{row.baseline_ms:>10.4f}{row.ratio:>7.2f}x"
        f"{row.bytes_per_second / 1e9:>9.0f}{row.copy_share:>7.0%}{row.operations_per_second / 1e12:>8.1f}{row.error:>9.1e}",
        flush=True,
    )


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was reached: the worst row of each goal."""
    found = []
    for goal in GOALS:
        values = [(goal.value(r), r) for r in rows if r.section == goal.section and goal.takes(r)]
        if values:
            worst, row = min(values, key=lambda v: v[0])
            found.append({"section": goal.section, "goal": goal.text, "worst": worst, "at": f"{row.what}, batch {row.batch}", "reached": worst >= goal.least})  # fmt: skip
    return found


def main() -> None:
    """Measure, or compile where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: kernels are compiled for each architecture, nothing is timed")
        rows = [r for core in CORES.values() for r in sass.report(core, None)]
        sass.show(rows)
        _write(options.json or RESULTS / "gpu-compiled.json", {"kind": "compiled, not run", "kernels": rows})
        return
    bench = Bench(options.quick)
    parts = sections(bench, options.quick)
    wanted = options.only.split(",") if options.only else list(parts)
    if unknown := [w for w in wanted if w not in parts]:
        sys.exit(f"unknown section {unknown[0]}; accepted: {', '.join(parts)}")
    said = bench.environment()
    print(json.dumps(said))
    print(
        f"{'':<30}{'out x in':<16}{'batch':>6}{'ms':>10}{'bf16 ms':>10}{'ratio':>8}{'GB/s':>9}{'copy':>7}{'TOP/s':>8}{'error':>9}"
    )
    file = options.json or RESULTS / f"gpu-{said['card'].lower().replace(' ', '-')}.json"
    rows: list[Row] = []
    wrong = []
    for name in wanted:
        try:
            for row in parts[name]():
                show(row)
                rows.append(row)
                if row.error > TOLERANCE:
                    wrong.append(f"{row.section}, {row.what}, batch {row.batch}: error {row.error:.2g}")
                _write(
                    file,
                    {"kind": "measured", "environment": said, "rows": [asdict(r) for r in rows], "goals": goals(rows)},
                )
        except Exception as error:  # a section that fails is told, and the others are still measured
            wrong.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
            print(f"FAILED      {wrong[-1]}", flush=True)
    for goal in goals(rows):
        print(f"{'REACHED' if goal['reached'] else 'NOT reached':<12}{goal['section']}, {goal['goal']}: worst {goal['worst']:.2f} ({goal['at']})")  # fmt: skip
    if wrong:
        sys.exit("wrong or failed:\n" + "\n".join(wrong))


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
