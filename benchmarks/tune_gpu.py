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
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
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
    usual: Mapping[str, Any] = field(default_factory=dict)
    """arguments of `default` alone"""


SUBJECTS = {
    "w4a16": Subject(gpu_cases.weight_only, "linear_wna16", "linear_wna16.w4.g128", (4, 128)),
    "w8a16": Subject(lambda n, k: gpu_cases.weight_only(n, k, 8), "linear_wna16", "linear_wna16.w8.g128", (8, 128)),
    "w2a16": Subject(lambda n, k: gpu_cases.weight_only(n, k, 2), "linear_wna16", "linear_wna16.w2.g128", (2, 128)),
    "w8a8": Subject(gpu_cases.w8a8, "linear_int8", "linear_int8.8.g0", (8, 0)),
    "llm_int8": Subject(gpu_cases.llm_int8, "linear_int8_outlier", "linear_int8_outlier"),
    "svd": Subject(gpu_cases.svd, "linear_svd", "linear_svd.w4a8.g64", (4, 64, 8)),
    "ovp": Subject(gpu_cases.ovp, "linear_ovp", "linear_ovp.int4.x8", ("int4", torch.int8)),
    "sparse": Subject(gpu_cases.sparse, "linear_sparse", "linear_sparse.16", (16, torch.bfloat16), {"usable": True}),
}
"""each is timed by its whole node: what quantizes x before the product is the same for every candidate"""


class Tuned:
    """One layer of one subject on the device, for every number of tokens."""

    def __init__(self, bench: gpu.Bench, subject: Subject, out: int, channels: int) -> None:
        self.bench, self.subject, self.out, self.channels = bench, subject, out, channels
        self.module = importlib.import_module(f"planish.kernels.triton.{subject.module}")
        self.case = gpu_cases.case(subject.make(out, channels), bench.core, bench.device, bench.copies)

    def best(self, batch: int) -> tuple[Config, float, float] | None:
        """(the fastest candidate, its milliseconds, those of the default); None where the default stays."""
        given = (self.bench.core, batch, self.out, self.channels, *self.subject.more)
        default = self.module.default(*given, **self.subject.usual)
        x = torch.randn(batch, self.channels, dtype=torch.bfloat16, device=self.bench.device)
        truth = self.case.truth(x)
        found: list[tuple[float, bool, Config]] = []
        for candidate in [default, *(c for c in self.module.candidates(*given) if c != default)]:
            ms = self._milliseconds(candidate, x, truth)
            if ms is not None:
                found.append((ms, candidate == default, candidate))
        if not found:
            return None
        ms, _, first = min(found, key=lambda f: f[0])
        usual = next((t for t, own, _ in found if own), float("inf"))
        return None if usual < ms * GAIN else (first, ms, usual)

    def _milliseconds(self, candidate: Config, x: torch.Tensor, truth: torch.Tensor) -> float | None:
        with configs.forced(self.subject.key, candidate) as choice:
            try:
                error = self.case.check(x, truth)
                (ms,) = self.bench.times([[partial(call, x) for call in self.case.calls]])
            except (
                Exception
            ) as error:  # a candidate may ask for more than the card has; Triton raises many types for that
                print(f"  left out: {candidate}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                torch.cuda.synchronize()
                return None
        if not choice.uses:
            sys.exit(f"'{self.subject.module}' never asked for '{self.subject.key}': the key of this subject is wrong")
        if error > gpu.TOLERANCE:
            print(f"  WRONG by {error:.2g}: {candidate}")
            return None
        return ms


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
    layers: dict[tuple[str, int, int], Tuned] = {}
    for batch in gpu.BATCHES:
        for name, (out, channels) in itertools.product(wanted, gpu.shapes(quick=False)):
            if time.monotonic() > end:
                sys.exit(f"time is up; {path} holds what was tuned")
            subject = SUBJECTS[name]
            if (name, out, channels) not in layers:
                layers[name, out, channels] = Tuned(bench, subject, out, channels)
            found = layers[name, out, channels].best(batch)
            entries = table["entries"].setdefault(subject.key, {})
            key = configs.bucket(batch, out, channels)
            entries.pop(key, None)
            if found is not None:
                config, ms, usual = found
                entries[key] = {**asdict(config), "ms": round(ms, 5), "default_ms": round(usual, 5)}
                print(f"{name} {key}: {usual:.4f} -> {ms:.4f} ms  {config}", flush=True)
            path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
