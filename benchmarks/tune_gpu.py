"""Times the candidates of every kernel on this GPU and writes the table that ships: kernels/triton/tables/<core>.json.

    python benchmarks/tune_gpu.py [--only w4a16,w8a8] [--minutes 8]

For each kind of layer, shape and number of tokens the op's own candidates are run as the benchmark runs layers (CUDA graphs, weights that
rotate through more than the cache). A candidate whose result is not the definition's, or that does not compile, is left out; the op's
default is kept unless another one is at least 2 % faster. Entries of other subjects stay in the table. With --minutes the most important
shapes (one token, then more) come first, and what was reached by then is written.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from planish.kernels.gpu.op import Layer
from planish.kernels.triton import config as configs
from planish.kernels.triton.config import Config

sys.path.insert(0, str(Path(__file__).parent))
import gpu
import gpu_cases

GAIN = 1.02
"""a candidate must be this much faster than the default to be listed"""


@dataclass(frozen=True)
class Subject:
    """One kind of layer and the kernel that its table entries are for."""

    make: Callable[[int, int], Layer]
    module: str
    key: str
    """of the table"""
    more: tuple[Any, ...] = ()
    """arguments of `candidates` and `default` behind core, m, n, k"""


SUBJECTS = {
    "w4a16": Subject(gpu_cases.weight_only, "linear_wna16", "linear_wna16.w4.g128", (4, 128)),
    "w8a16": Subject(lambda n, k: gpu_cases.weight_only(n, k, 8), "linear_wna16", "linear_wna16.w8.g128", (8, 128)),
    "w2a16": Subject(lambda n, k: gpu_cases.weight_only(n, k, 2), "linear_wna16", "linear_wna16.w2.g128", (2, 128)),
    "w8a8": Subject(gpu_cases.w8a8, "linear_int8", "linear_int8.8.g0", (8, 0)),
    "llm_int8": Subject(gpu_cases.llm_int8, "linear_int8_outlier", "linear_int8_outlier"),
    "svd": Subject(gpu_cases.svd, "linear_svd", "linear_svd.w4a8.g64", (4, 64, 8)),
    "ovp": Subject(gpu_cases.ovp, "linear_ovp", "linear_ovp.int4.x8", ("int4", torch.int8)),
    "sparse": Subject(gpu_cases.sparse, "linear_sparse", "linear_sparse.16", (16, torch.bfloat16)),
}
"""each is timed by its whole node: what quantizes x before the product is the same for every candidate"""


def best(
    bench: gpu.Bench, subject: Subject, made: gpu_cases.Case, out: int, channels: int, batch: int
) -> tuple[Config, float, float] | None:
    """(the fastest candidate, its milliseconds, those of the default); None where the default stays."""
    module = importlib.import_module(f"planish.kernels.triton.{subject.module}")
    given = (bench.core, batch, out, channels, *subject.more)
    default = module.default(*given)
    x = torch.randn(batch, channels, dtype=torch.bfloat16, device=bench.device)
    found: list[tuple[float, Config]] = []
    for candidate in [default, *(c for c in module.candidates(*given) if c != default)]:
        with configs.forced(subject.key, candidate) as choice:
            try:
                error = made.check(x)
                (ms,) = bench.times([[lambda call=call: call(x) for call in made.calls]])
            except (
                Exception
            ) as error:  # a candidate may ask for more than the card has; Triton raises many types for that
                print(f"  left out: {candidate}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                torch.cuda.synchronize()
                continue
        if not choice.uses:
            sys.exit(f"'{subject.module}' never asked for '{subject.key}': the key of this subject is wrong")
        if error > gpu.TOLERANCE:
            print(f"  WRONG by {error:.2g}: {candidate}")
            continue
        found.append((ms, candidate))
    times = {id(c): t for t, c in found}
    ms, first = min(found, key=lambda f: f[0])
    usual = times.get(id(default), float("inf"))
    return None if usual < ms * GAIN else (first, ms, usual)


def main() -> None:
    """Tune what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SUBJECTS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [w for w in wanted if w not in SUBJECTS]:
        parser.error(f"unknown subject {unknown[0]}; accepted: {', '.join(SUBJECTS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device; tuning measures")
    end = time.monotonic() + 60 * options.minutes
    bench = gpu.Bench(quick=True)
    path = configs.TABLES / f"{bench.core.name}.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"entries": {}}
    said = bench.environment()
    table |= {"card": said["card"], "triton": said["triton"], "cuda": said["cuda"], "driver": said["driver"]}
    sizes = list(gpu.shapes(quick=False))
    for batch in gpu.BATCHES:
        for name in wanted:
            for out, channels in sizes:
                if time.monotonic() > end:
                    sys.exit(f"time is up; {path} holds what was tuned")
                subject = SUBJECTS[name]
                made = gpu_cases.case(subject.make(out, channels), bench.core, bench.device)
                made = gpu_cases.case(made.layer, bench.core, bench.device, bench.copies(made.stored_bytes))
                found = best(bench, subject, made, out, channels, batch)
                entries = table["entries"].setdefault(subject.key, {})
                key = configs.bucket(batch, out, channels)
                entries.pop(key, None)
                if found is not None:
                    config, ms, usual = found
                    entries[key] = {**asdict(config), "ms": round(ms, 5), "default_ms": round(usual, 5)}
                    print(f"{name} {key}: {usual:.4f} -> {ms:.4f} ms  {config}", flush=True)
                path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                del made
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
