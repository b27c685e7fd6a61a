"""Measured tilings: the shipped database, and the tool that makes its records.

`python -m planish.export.tuning model.onnx [--trials 48] [-o records.json]` measures on this machine. To add a model's
records to planish, give `-o export/schedules/<model>-<lanes>.json`; every file of that folder is read, the name is free.
A record is keyed by the workload (shapes of the sum), so it serves any model that has the same layer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..common import files
from ..common.errors import PlanishError
from ..common.progress import say, track
from ..targets import target as targets
from ..targets.target import Target
from . import _tvm_compat, tvm_import, tvm_schedule

FOLDER = Path(__file__).parent / "schedules"
FORMAT_VERSION = 1
WORTHWHILE = 0.03
"""part of the time that a tiling must save to displace the default: less is within the noise of a shared machine"""


@dataclass(frozen=True)
class Record:
    """What one workload's search found."""

    tiling: tvm_schedule.Tiling
    default_us: float
    """microseconds of the default tiling"""
    best_us: float
    """microseconds of `tiling`, measured in the same final round"""
    trials: int


@dataclass(frozen=True)
class Database:
    """Records for one vector length, and the machine that measured them."""

    lanes: int
    cpu: str
    records: dict[str, Record] = field(default_factory=dict)

    def tilings(self) -> dict[str, tvm_schedule.Tiling]:
        """{workload key: tiling}, as `tvm_schedule.schedule` takes it."""
        return {key: r.tiling for key, r in self.records.items()}

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        rows = {
            key: tvm_schedule.as_record(r.tiling)
            | {"default_us": round(r.default_us, 2), "best_us": round(r.best_us, 2), "trials": r.trials}
            for key, r in self.records.items()
        }
        return {"format_version": FORMAT_VERSION, "lanes": self.lanes, "cpu": self.cpu, "records": rows}


def read(path: Path) -> Database:
    """A database file. Raises PlanishError for one of another format version or with a malformed record."""
    content = files.read_json(path)
    if content.get("format_version") != FORMAT_VERSION:
        raise PlanishError(f"'{path}' has format version {content.get('format_version')}; {FORMAT_VERSION} is accepted")
    records: dict[str, Record] = {}
    for key, row in content["records"].items():
        times = [row.pop("default_us"), row.pop("best_us"), row.pop("trials")]
        try:
            records[key] = Record(tvm_schedule.Tiling(**row), *times)
        except TypeError as error:
            raise PlanishError(f"'{path}', record '{key}': {error}") from None
    return Database(content["lanes"], content["cpu"], records)


def shipped(lanes: int) -> dict[str, tvm_schedule.Tiling]:
    """Tilings of every shipped record for vectors of `lanes` float32 values."""
    found: dict[str, tvm_schedule.Tiling] = {}
    for path in sorted(FOLDER.glob("*.json")):
        database = read(path)
        if database.lanes == lanes:
            found |= database.tilings()
    return found


def tune(model: onnx.ModelProto, target: Target, trials: int, seed: int = 0, deadline_s: float = 600.0) -> Database:
    """Measure up to `trials` tilings of every convolution and matrix product of `model` on this machine, one thread.

    The choice of tilings is fixed by `seed`; the winner depends on the machine. Stops measuring new tilings after
    `deadline_s` seconds and keeps what it has. Raises PlanishError when `target` is not this machine.
    """
    if target.kind != "host":
        raise PlanishError(f"tuning measures on this machine; target '{target.name}' is another one")
    from .tvm import llvm_target

    ir = _tvm_compat.load()
    llvm = llvm_target(target)
    unit = tvm_schedule.vector_unit(target)
    module = tvm_import.to_relax(tvm_import.whole_numbers(tvm_import.fix_batch(model)).model).module
    functions: dict[str, Any] = {}
    for _, function in module.functions_items():
        work = tvm_schedule.workload(function) if isinstance(function, ir.PrimFunc) else None
        if work is not None and work.macs:
            functions.setdefault(work.key, function)
    end = time.monotonic() + deadline_s
    records: dict[str, Record] = {}
    for key in track(sorted(functions), f"tuning {len(functions)} kernels, up to {trials} tilings each"):
        record = _search(functions[key], llvm, unit, trials, seed, end)
        if record is not None:
            records[key] = record
    return Database(unit.lanes, str(llvm["mcpu"]), records)


def _search(
    function: Any, llvm: dict[str, Any], unit: tvm_schedule.VectorUnit, trials: int, seed: int, end: float
) -> Record | None:
    """The fastest tiling of one kernel; None when the template does not fit it."""
    ir = _tvm_compat.load()
    work = tvm_schedule.workload(function)
    assert work is not None
    arguments = _arguments(function, seed)
    runs: list[tuple[float, tvm_schedule.Tiling, Any]] = []
    for tiling in tvm_schedule.tilings(work, unit, trials, seed):
        if runs and time.monotonic() > end:
            break
        try:
            kernel = tvm_schedule.tile(function, unit, tiling)
        except ir.ScheduleError:
            continue
        public = ir.tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
        compiled = ir.tvm.compile(public, target=ir.Target(llvm))["main"]
        runs.append((_microseconds(compiled, arguments, 5), tiling, compiled))
    if not runs:
        return None
    # the few best again, alternating, so that noise does not choose
    finalists = [runs[0], *sorted(runs[1:], key=lambda r: r[0])[:4]]
    times: list[list[float]] = [[] for _ in finalists]
    for _ in range(7):
        for index, (_, _, compiled) in enumerate(finalists):
            times[index].append(_microseconds(compiled, arguments, 3))
    medians = [statistics.median(t) for t in times]
    best = min(range(len(medians)), key=medians.__getitem__)
    if medians[best] > medians[0] * (1 - WORTHWHILE):
        best = 0
    return Record(finalists[best][1], medians[0], medians[best], len(runs))


def _arguments(function: Any, seed: int) -> list[Any]:
    """Random tensors for a kernel's parameters, its output last."""
    ir = _tvm_compat.load()
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal([int(d) for d in b.shape]).astype(str(b.ty.dtype)) for b in function.params]
    return [ir.tvm.runtime.tensor(a) for a in arrays]


def _microseconds(compiled: Any, arguments: list[Any], repeats: int) -> float:
    """Smallest mean over `repeats` rounds of at least two milliseconds each."""
    compiled(*arguments)
    start = time.perf_counter()
    compiled(*arguments)
    count = max(1, int(0.002 / max(time.perf_counter() - start, 1e-7)))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            compiled(*arguments)
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m planish.export.tuning", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", type=Path, help="ONNX file, float or quantized")
    parser.add_argument("--trials", type=int, default=48, help="tilings measured for each kernel")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of tilings")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds after which no new tiling is measured")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="database file; existing records are kept unless measured anew"
    )
    chosen = parser.parse_args(arguments)
    try:
        host = targets.load("host")
        database = tune(onnx.load(chosen.model), host, chosen.trials, chosen.seed, chosen.deadline)
        if chosen.output.exists():
            old = read(chosen.output)
            if old.lanes != database.lanes:
                raise PlanishError(f"'{chosen.output}' is for {old.lanes} lanes, this machine has {database.lanes}")
            database = Database(database.lanes, database.cpu, old.records | database.records)
        with files.new_file(chosen.output, force=True) as path:
            path.write_text(files.to_json(database.to_json()), encoding="utf-8")
    except (PlanishError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    for key, record in database.records.items():
        say(f"{record.default_us:9.1f} us -> {record.best_us:9.1f} us  {key}")


if __name__ == "__main__":
    main()
