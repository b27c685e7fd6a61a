"""`tvm`: a shared library compiled for the target by TVM, every kernel with a schedule; runs on the TVM runtime.

Cross compiling needs no system toolchain: LLVM inside TVM makes the objects, the `ziglang` wheel links them.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..common.errors import PlanishError, listed, missing_extra
from ..kernels.tvm import lowering
from ..targets.target import Target
from . import _tvm_compat, fused, tuning, tvm_import, tvm_layers, tvm_schedule, tvm_weights
from .format import Format, Source, Written
from .lowering import lowered

LIBRARY = "model.so"
FLOAT_TOLERANCE = 1e-4
"""of the largest output: float32 sums in another order"""
ROUNDED_TOLERANCE = 2e-2
"""of the largest output, where fused ops round activations at run time: a float's last bit may move a code, and that later ones"""
CARRIED_TOLERANCE = 0.1
"""of the largest output: the most that is ever accepted of a model whose quantizers carry a float's last bit that far"""
UNSCHEDULED_FACTOR = "18 to 120"
"""how many times slower than ONNX Runtime TVM's own loops are: four networks, one thread, AVX-512 (benchmarks/tvm_latency.py)"""


@dataclass(frozen=True)
class Compiled:
    """A model ready to be written as a library."""

    executable: Any
    """relax.VMExecutable"""
    kernels: dict[str, tvm_schedule.Scheduled]
    """by the name under which the virtual machine calls them"""
    rewritten: tvm_import.Rewritten
    """the ONNX model that was imported, and how each op of a quantized one is computed"""
    layout: str
    """of the tensors between kernels"""
    workspace_bytes: int
    """activations and temporaries that are alive at once, as TVM planned them"""
    calls: list[tuple[str, str | None]]
    """(kernel, layer whose weights it reads) in the order in which the virtual machine calls them"""
    code_bytes: int
    """quantized weights in the library, as integer codes"""
    widened_bytes: int
    """the same in memory, as float32"""
    outputs: list[dict[str, Any]]
    """{name, shape, dtype} each"""
    fused: tuple[str, ...]
    """fused ops that the model uses, sorted"""
    rounds: bool
    """whether one of them rounds activations to codes while the model runs"""
    packed_bytes: int
    """constants that the kernels of fused ops read"""


@dataclass(frozen=True)
class Tvm(Format):
    """Writes model.so. Quantized models compute with whole numbers carried in float32 (see tvm_import)."""

    tune_trials: int = 0
    """tilings to measure for each workload without a record; only where the target is this machine"""
    seed: int = 0
    """of the choice of tilings"""

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Compile for `target`, batch 1, and link `model.so`. Raises as `Format.write` does, and Missing without TVM or zig."""
        if target.kind == "gpu":
            from . import tvm_cuda

            return tvm_cuda.write(source, target, folder)
        llvm = llvm_target(target)
        graph = source.fused or source.onnx
        fixed, sizes = (
            tvm_import.fix_batch(graph, source.golden_inputs),
            tvm_import.sizes_of(graph, source.golden_inputs),
        )
        records = tuning.shipped(tvm_schedule.vector_unit(target).lanes)
        if self.tune_trials:
            if target.kind != "host":
                raise PlanishError(f"tune_trials measures on this machine; target '{target.name}' is another one")
            records |= tuning.tune(fixed, target, self.tune_trials, self.seed).tilings()
        with _tvm_compat.quiet():
            compiled = compile_model(fixed, target, records)
        measured = measure(fixed, compiled.rewritten, source.golden_inputs)
        library = folder / LIBRARY
        link(compiled.executable, target, library)
        kernels = compiled.kernels
        rows = [_row(name, s) for name, s in sorted(kernels.items())]
        bare = [name for name, s in kernels.items() if s.origin == "none" and s.workload is not None]
        warnings = []
        if sizes:
            said = ", ".join(f"{name} {size}" for name, size in sizes.items())
            warnings.append(f"compiled for the sizes of the golden samples ({said}) and no others, each state empty")
        if any(s.workload and s.workload.macs for n, s in kernels.items() if n in bare):
            warnings.append(
                f"no schedule fits {listed(bare)}: they keep TVM's plain loops, about {UNSCHEDULED_FACTOR} times slower "
                "than ONNX Runtime"
            )
        measured_here = target.kind == "host"
        tuned = sum(s.origin == "record" for s in kernels.values())
        if not measured_here:
            warnings.append(
                f"the schedule was not measured on '{target.name}': it is the template's for its vector registers"
                + (f", with {tuned} tilings measured on another CPU" if tuned else "")
            )
        if compiled.code_bytes:
            warnings.append(
                f"quantized weights ({compiled.code_bytes:,} bytes as codes) are widened to float32 when the model is loaded "
                f"({compiled.widened_bytes:,} bytes of RAM) and multiplied at float speed: TVM has no 8-bit kernels here yet"
            )
        accepted = _max_error(compiled, measured)
        share = measured.largest_difference / (measured.largest_output or 1.0)
        if compiled.rewritten.layers and share > ROUNDED_TOLERANCE:
            warnings.append(
                f"rounding carries the last bit of a float32 to {share:.1%} of the largest output: measured on the golden samples "
                "between two correct orders of computation"
            )
        if measured.largest_difference > accepted:
            warnings.append(
                f"on the golden samples TVM differs from ONNX Runtime by {measured.largest_difference:.6g}, more than the "
                f"{accepted:.6g} that verify accepts: this artifact will not pass"
            )
        return Written(
            inputs=described(fixed.graph.input, {t.name for t in fixed.graph.initializer}),
            outputs=compiled.outputs,
            ram_bytes=compiled.workspace_bytes + compiled.widened_bytes,
            details={
                "batch": 1,
                "sizes": sizes,
                "tvm": _tvm_compat.load().tvm.__version__,
                "llvm_target": llvm,
                "features": list(target.features),
                "layout": compiled.layout,
                "schedule": dict(Counter(s.origin for s in kernels.values())),
                "schedule_measured_on_target": measured_here and tuned > 0,
                "kernels": rows,
                "calls": [{"kernel": k, "layer": layer} for k, layer in compiled.calls],
                "weights": _storage(compiled),
                "fused": {"ops": list(compiled.fused), "packed_bytes": compiled.packed_bytes}
                if compiled.fused
                else None,
                "quantized": _arithmetic(compiled.rewritten.layers, measured),
            },
            warnings=tuple(warnings),
            max_error=accepted,
            answers=None if source.fused is None else measured.answers,
        )


def llvm_target(target: Target) -> dict[str, Any]:
    """TVM's target for a device. Raises PlanishError for one that LLVM on Linux does not serve here."""
    ir = _tvm_compat.load()
    if target.kind == "host":
        cpu = str(ir.tvm.get_global_func("target.llvm_get_system_cpu")())
        return {"kind": "llvm", "mtriple": _linux(target), "mcpu": cpu}
    if target.kind != "cpu" or not target.triple or not target.cpu:
        raise PlanishError(
            f"target '{target.name}' is a {target.kind} without triple and cpu; the tvm format compiles for CPUs"
        )
    return {"kind": "llvm", "mtriple": _linux(target), "mcpu": target.cpu}


def compile_model(
    fixed: onnx.ModelProto, target: Target, records: dict[str, tvm_schedule.Tiling], plain: bool = False
) -> Compiled:
    """Import, schedule and compile a model of fixed shapes (see tvm_import.fix_batch). `plain` leaves TVM's own loops, to compare."""
    ir = _tvm_compat.load()
    rewritten = tvm_import.whole_numbers(fixed)
    unit = tvm_schedule.vector_unit(target)
    imported = tvm_import.to_relax(rewritten.model, unit)
    module = imported.module
    kernels: dict[str, tvm_schedule.Scheduled] = {}
    for variable, function in list(module.functions_items()):
        if isinstance(function, ir.PrimFunc) and not plain:
            kernels[variable.name_hint] = tvm_schedule.schedule(function, unit, records)
            module.update_func(variable, kernels[variable.name_hint].function)
    views = ir.relax.transform.RewriteDataflowReshape()(module)  # a reshape moves nothing and is no call
    calls = tvm_layers.called(views, rewritten.model, imported.packed)
    working, results = workspace(module, kernels), outputs(fixed, module["main"].ret_ty)
    stored = tvm_weights.store_codes(module) if rewritten.layers else tvm_weights.Stored(module)
    executable = ir.tvm.compile(stored.module, target=ir.Target(llvm_target(target)))
    nodes, lowerings = [n for n in fixed.graph.node if n.domain == fused.DOMAIN], lowering.lowerings()
    return Compiled(
        executable=executable,
        kernels=kernels,
        rewritten=rewritten,
        layout=imported.layout,
        workspace_bytes=working,
        calls=calls,
        code_bytes=stored.code_bytes,
        widened_bytes=stored.widened_bytes,
        outputs=results,
        fused=tuple(sorted({n.op_type for n in nodes})),
        rounds=any(lowerings[n.op_type].rounds(fused.call(n).attributes) for n in nodes),
        packed_bytes=sum(a.nbytes for _, a in imported.packed),
    )


def link(executable: Any, target: Target, library: Path, pack: Callable[..., str] | None = None) -> None:
    """Link the compiled model to a shared library with zig. Same input, same bytes: no build id, no symbols, no paths.

    `pack` writes the file with the modules that the library carries, where TVM's own way does not serve.
    """
    try:
        import ziglang  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise missing_extra("ziglang", "tvm", "linking a TVM library") from error
    triple = target.zig_target or _linux(target)

    def with_zig(output: str, objects: list[str], **_: object) -> None:
        flags = ["-shared", "-fPIC", "-s", "-Wl,--build-id=none"]
        command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, *flags, "-o", output, *objects, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise PlanishError(f"zig could not link {LIBRARY} for '{target.name}': {lines[-1][:300]}")

    with_zig.object_format = "o"  # pyright: ignore[reportFunctionMemberAccess]  # TVM reads it
    carried = {} if pack is None else {"fpack_imports": pack}
    executable.export_library(str(library), fcompile=with_zig, **carried)


def _linux(target: Target) -> str:
    """The triple with the system spelled out; the libraries made here are for Linux with glibc."""
    triple = target.triple or ""
    if "linux" not in triple:
        raise PlanishError(f"target '{target.name}' has the triple '{triple}'; the tvm format links for linux-gnu")
    return triple


def workspace(module: Any, kernels: dict[str, tvm_schedule.Scheduled]) -> int:
    """Bytes of the activation buffers that TVM plans for one run, plus the largest padded copy inside a kernel."""
    ir = _tvm_compat.load()
    transform = ir.relax.transform
    passes = [
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
    ]
    planned = ir.tvm.transform.Sequential(passes)(module)
    sizes: list[int] = []

    def visit(node: Any) -> None:
        if isinstance(node, ir.relax.Call) and getattr(node.op, "name", "") == "relax.memory.alloc_storage":
            sizes.append(math.prod(int(d) for d in node.args[0].values))

    ir.relax.analysis.post_order_visit(planned["main"], visit)
    return sum(sizes) + max((s.padded_bytes for s in kernels.values()), default=0)


def _row(name: str, scheduled: tvm_schedule.Scheduled) -> dict[str, Any]:
    work, tiling = scheduled.workload, scheduled.tiling
    row: dict[str, Any] = {"kernel": name, "op": "elementwise", "schedule": scheduled.origin, "macs": 0}
    if scheduled.origin == "kernel":
        attributes = scheduled.function.attrs
        row |= {"op": str(attributes[lowering.OP]), "macs": int(attributes[lowering.MACS])}
    if work:
        row |= {"op": work.op if work.multiplies else "reduction", "macs": work.macs}
        row["workload"] = work.key
    if tiling:
        row["tiling"] = tvm_schedule.as_record(tiling)
    if scheduled.reason:
        row["reason"] = scheduled.reason
    return row


def _storage(compiled: Compiled) -> dict[str, Any] | None:
    """What the manifest says of weights that are stored as codes; None where there are none."""
    if not compiled.widened_bytes:
        return None
    return {
        "stored": "integer codes, widened to float32 in RAM once, when the library is loaded",
        "code_bytes": compiled.code_bytes,
        "widened_bytes": compiled.widened_bytes,
    }


@dataclass(frozen=True)
class Measured:
    """Golden samples in ONNX Runtime: the source itself, and the whole-number graph that TVM compiles."""

    samples: int
    largest_output: float
    largest_difference: float
    answers: dict[str, np.ndarray]
    """(n, ...) of the source, by output name"""

    def described(self) -> dict[str, Any]:
        """What the manifest says of them."""
        return {k: getattr(self, k) for k in ("samples", "largest_output", "largest_difference")}


def measure(fixed: onnx.ModelProto, rewritten: tvm_import.Rewritten, golden: Mapping[str, np.ndarray]) -> Measured:
    """How large the outputs are, and how far the whole-number graph is from the quantized one (0 for a float model)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    models = [fixed, *([rewritten.model] if rewritten.layers else [])]
    sessions = [ort.InferenceSession(lowered(m).SerializeToString(), options) for m in models]
    names = [o.name for o in fixed.graph.output]
    batch = fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    count = len(next(iter(golden.values()))) // batch if golden else 0
    rows: list[list[np.ndarray]] = []
    difference = 0.0
    for i in range(0, count * batch, batch):
        feeds = {name: np.ascontiguousarray(a[i : i + batch]) for name, a in golden.items()}
        results = [[np.asarray(v) for v in s.run(names, feeds)] for s in sessions]
        rows.append(results[0])
        pairs = zip(results[0], results[-1], strict=True)
        difference = max([difference, *(float(np.abs(a.astype(float) - b).max(initial=0)) for a, b in pairs)])
    answers = {n: np.concatenate([r[i] for r in rows]) for i, n in enumerate(names)} if rows else {}
    largest = max((float(np.abs(np.asarray(a, np.float64)).max(initial=0)) for a in answers.values()), default=0.0)
    return Measured(count * batch, largest, difference, answers)


def _max_error(compiled: Compiled, measured: Measured) -> float:
    """Largest difference of an output to ONNX Runtime's that is accepted.

    Float: 1e-4 of the largest output, for sums in another order. Quantized: where a float32 layer may land one code off,
    that code can move later ones; accepted are four steps of the output's grid. Activations quantized by a fused op while the
    model runs have no fixed grid: one code off is accepted as a share of the largest output. How far moved codes carry depends on the
    model; it is measured as the distance of the whole-number graph to the quantized one, both in ONNX Runtime and both right, and
    twice that is accepted, up to CARRIED_TOLERANCE of the largest output.
    """
    rewritten = compiled.rewritten
    reordered = (ROUNDED_TOLERANCE if compiled.rounds else FLOAT_TOLERANCE) * (measured.largest_output or 1.0)
    if not rewritten.layers:
        return reordered
    if rewritten.output_step and all(layer.arithmetic.startswith("exact") for layer in rewritten.layers):
        return 0.0
    carried = min(2 * measured.largest_difference, CARRIED_TOLERANCE * measured.largest_output)
    return max(reordered, 4 * rewritten.output_step, carried)


def _arithmetic(layers: list[tvm_import.Layer], measured: Measured) -> dict[str, Any] | None:
    """What the manifest says of quantized layers; None for a float model."""
    if not layers:
        return None
    inexact = sorted({layer.op for layer in layers if layer.arithmetic == "float32"})
    return {
        "carrier": "codes are float32 whole numbers (code minus zero point); no 8-bit instructions are used",
        "bound": (
            "given equal input codes: 0 codes from the integer contract for layers marked exact; "
            f"at most 1 code per quantized tensor after float32 {', '.join(inexact) or 'layers'}"
        ),
        "measured_against_onnx_runtime": measured.described(),
        "layers": [
            {"node": x.node, "op": x.op, "arithmetic": x.arithmetic}
            | ({"largest_sum": x.largest_sum} if x.largest_sum is not None else {})
            for x in layers
        ],
    }


def outputs(model: onnx.ModelProto, types: Any) -> list[dict[str, Any]]:
    """{name, shape, dtype} of the outputs, from the type that `main` returns."""
    tensors = list(types.fields) if hasattr(types, "fields") else [types]
    return [
        {"name": o.name, "shape": [int(d) for d in t.shape], "dtype": str(t.dtype)}
        for o, t in zip(model.graph.output, tensors, strict=True)
    ]


def described(values: Any, skip: set[str]) -> list[dict[str, Any]]:
    """{name, shape, dtype} of graph inputs."""
    return [
        {
            "name": v.name,
            "shape": [int(d.dim_value) for d in v.type.tensor_type.shape.dim],
            "dtype": np.dtype(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)).name,
        }
        for v in values
        if v.name not in skip
    ]
