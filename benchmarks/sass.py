"""What a GPU kernel's machine code says about its speed: its main loop, counted.

For every variant that the ops of kernels/triton choose: registers, shared memory, blocks that fit one multiprocessor, and the instructions
of the innermost loop with the matrix instruction (or with the most loads). One warp instruction issues a cycle on each of four schedulers, so
`instructions an iteration * warps / 4` cycles is the least time of one iteration of one block on one multiprocessor: an estimate
from below, not a measurement.

    python benchmarks/sass.py [--core sm_90] [--only linear_wna16] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import planish.kernels.triton
from planish.kernels.gpu.core import CORES, Core
from planish.kernels.triton import ahead
from planish.kernels.triton.ahead import TENSOR_CORES, Compiled

LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", re.MULTILINE)
REGISTERS, THREADS, WARP = 65536, 2048, 32
"""of one multiprocessor, sm_80 and sm_90 (sm_89 has 1536 threads)"""
SCHEDULERS = 4


@dataclass(frozen=True)
class Loop:
    """One iteration of the main loop, as one warp executes it."""

    instructions: int
    mnemonics: Counter[str]
    wide_loads: int
    """loads and asynchronous copies of 16 bytes a thread"""
    loads: int


def main_loop(sass: str) -> Loop | None:
    """The innermost loop with the most matrix instructions, else with the most loads; None for straight code."""
    labels: dict[str, int] = {}
    rows: list[tuple[str, str]] = []
    for line in sass.splitlines():
        label = re.match(r"^(\.L_\S+):", line)
        if label:
            labels[label[1]] = len(rows)
        found = LINE.match(line)
        if found:
            rows.append((found[2], found[3]))
    spans = set()
    for end, (name, rest) in enumerate(rows):
        target = re.search(r"`\((\.L_[^)]+)\)", rest)
        if name == "BRA" and target and labels.get(target[1], end + 1) < end:
            spans.add((labels[target[1]], end))
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]

    def weight(span: tuple[int, int]) -> tuple[int, int]:
        names = [n for n, _ in rows[span[0] : span[1] + 1]]
        return sum(n in TENSOR_CORES for n in names), sum(n in ("LDG", "LDGSTS", "LDS") for n in names)

    if not inner:
        return None
    start, end = max(inner, key=weight)
    body = rows[start : end + 1]
    copies = [(n, r) for n, r in body if n in ("LDG", "LDGSTS", "UTMALDG")]
    wide = sum(".128" in r or n == "UTMALDG" for n, r in copies)
    return Loop(len(body), Counter(n for n, _ in body), wide, len(copies))


def blocks(made: Compiled, core: Core) -> int:
    """Blocks that one multiprocessor holds at once, by registers, threads and shared memory."""
    threads = THREADS if core.name != "sm_89" else 1536
    registers = -(-made.registers // 8) * 8 * made.threads
    return max(
        1,
        min(REGISTERS // registers, threads // made.threads, core.shared_bytes // max(1, made.shared_bytes + 1024), 32),
    )


def report(core: Core, only: str | None) -> list[dict[str, object]]:
    """One row a variant."""
    rows: list[dict[str, object]] = []
    for info in pkgutil.iter_modules(planish.kernels.triton.__path__):
        if info.name == "worker" or (only and info.name != only):
            continue
        module = importlib.import_module(f"planish.kernels.triton.{info.name}")
        if not hasattr(module, "variants"):
            continue
        variants = module.variants(core)
        with tempfile.TemporaryDirectory() as scratch:
            for variant, made in zip(variants, ahead.compile_all(variants, core.name, Path(scratch)), strict=True):
                loop = main_loop(Path(made.files["sass"]).read_text())
                rows.append(
                    {
                        "file": info.name,
                        "for": variant.label,
                        "kernel": variant.kernel,
                        "core": core.name,
                        "warps": variant.warps,
                        "stages": variant.stages,
                        "registers": made.registers,
                        "shared_bytes": made.shared_bytes,
                        "spills": made.spills,
                        "blocks": blocks(made, core),
                        "tensor_cores": dict(made.tensor_cores),
                        "loop_instructions": loop and loop.instructions,
                        "loop_cycles": loop and loop.instructions * variant.warps / SCHEDULERS,
                        "loop_loads": loop and f"{loop.wide_loads}/{loop.loads}",
                        "loop": dict(loop.mnemonics.most_common(8)) if loop else {},
                    }
                )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """The table."""
    print(
        f"{'kernel':<44}{'core':<7}{'warps':>6}{'regs':>6}{'shared':>8}{'spill':>6}{'blocks':>7}{'loop':>6}  16-byte loads, matrix instructions"
    )
    for r in rows:
        name = f"{r['file']}: {r['for']}"
        loop = "-" if r["loop_instructions"] is None else str(r["loop_instructions"])
        matrix = ", ".join(f"{k} {v}" for k, v in dict(r["tensor_cores"]).items())  # type: ignore[call-overload]
        print(
            f"{name[:43]:<44}{r['core']:<7}{r['warps']:>6}{r['registers']:>6}{r['shared_bytes']:>8}{r['spills']:>6}{r['blocks']:>7}{loop:>6}  {r['loop_loads']}  {matrix}"
        )


def main() -> None:
    """Read the options, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", action="append", choices=list(CORES))
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [r for name in options.core or CORES for r in report(CORES[name], options.only)]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if any(r["spills"] for r in rows):
        sys.exit("a kernel spills registers")


if __name__ == "__main__":
    main()
