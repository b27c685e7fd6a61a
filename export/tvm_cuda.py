"""Format `tvm` for NVIDIA GPUs: compiled ahead of time without a GPU and without NVIDIA's toolkit.

Fused low-bit layers run in Triton kernels (tvm_cuda_triton.py), everything else in float32 kernels that TVM schedules by its rules for GPUs
(dlight: Matmul, GEMV, Reduction, GeneralReduction, Transpose, Fallback). One library, model.so, holds the weights, the machine code of all kernels
for one architecture, and the program of TVM's virtual machine that launches them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from ..common.errors import PlanishError, listed
from ..kernels.gpu import core as cores
from ..kernels.tvm import lowering
from ..targets.target import Target
from . import _tvm_compat, fused, tvm_cuda_code, tvm_cuda_triton, tvm_import, tvm_layers
from .format import Source, Written
from .tvm_cuda_code import Module
from .tvm_cuda_triton import Carrier, Kernel

TRIPLE = "x86_64-linux-gnu"
"""of the computer that the GPU is in, where the target names none"""
SHARED_BYTES, THREADS = 49_152, 1024
"""of one block, that every GPU gives without being asked; TVM's schedules keep to it"""
ACTIVATIONS = torch.float16
"""type of activations at fused layers: sums and everything between the layers stay float32"""
HALF = TensorProto.FLOAT16
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Compiled:
    """A model ready to be linked."""

    executable: Any
    """relax.VMExecutable without device code"""
    modules: list[Module]
    """the device code: TVM's kernels, then Triton's"""
    carrier: Carrier
    kernels: list[Kernel]
    """Triton's, with what they use"""
    scheduled: dict[str, str]
    """name of each of TVM's kernels, and what it computes"""
    calls: list[tuple[str, str | None]]
    """(function, layer) in the order in which the virtual machine calls them"""
    workspace_bytes: int
    outputs: list[dict[str, Any]]
    rewritten: tvm_import.Rewritten


def write(source: Source, target: Target, folder: Path) -> Written:
    """Compile for one GPU architecture, batch 1, and link model.so. Raises as `Format.write` does, and Missing without TVM, Triton or zig."""
    from . import tvm

    core = cores.core(target.core)
    graph = source.fused or source.onnx
    fixed = tvm_import.fix_batch(graph, source.golden_inputs)
    sizes = tvm_import.sizes_of(graph, source.golden_inputs)
    with _tvm_compat.quiet():
        compiled = compile_model(fixed, core, host_triple(target))
    measured = tvm.measure(fixed, compiled.rewritten, source.golden_inputs)
    rounded = _rounded_difference(fixed, measured.answers, source.golden_inputs)
    library = folder / tvm.LIBRARY
    tvm.link(
        compiled.executable,
        target.model_copy(update={"triple": host_triple(target)}),
        library,
        tvm_cuda_code.carry(compiled.modules),
    )
    largest = measured.largest_output or 1.0
    accepted = max(
        tvm.ROUNDED_TOLERANCE * largest if _rounds(fixed) else tvm.FLOAT_TOLERANCE * largest,
        2 * rounded,
        2 * measured.largest_difference,
        4 * compiled.rewritten.output_step,
    )
    warnings = ["no kernel of this artifact ran when it was made: it was compiled without a GPU"]
    if sizes:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        warnings.append(f"compiled for the sizes of the golden samples ({said}) and no others, each state empty")
    plain = compiled.carrier.plain
    for reason in sorted(set(plain.values())):
        names = [n for n, r in plain.items() if r == reason]
        warnings.append(
            f"{listed(names)}: no Triton kernel takes the layer ({reason}); its weight is decoded to float16 in the artifact and multiplied by "
            "TVM's own schedule, without tensor cores"
        )
    if compiled.rewritten.layers:
        warnings.append(
            "statically quantized layers are computed in whole numbers carried in float32, without the GPU's integer units; "
            "format onnx uses them"
        )
    floats = [k for k, what in compiled.scheduled.items() if what == "product"]
    if floats:
        warnings.append(
            f"{len(floats)} float products ({listed(floats)}) run in float32 without tensor cores: TVM's tensor-core schedules need CUDA's compiler"
        )
    spilled = [k.name for k in compiled.kernels if k.spills]
    if spilled:
        warnings.append(f"{listed(spilled)}: registers are spilled to memory")
    return Written(
        inputs=tvm.described(fixed.graph.input, {t.name for t in fixed.graph.initializer}),
        outputs=compiled.outputs,
        ram_bytes=compiled.workspace_bytes,
        details=_details(compiled, core, target, sizes, rounded),
        warnings=tuple(warnings),
        max_error=accepted,
        answers=None if source.fused is None else measured.answers,
    )


def _details(
    compiled: Compiled, core: cores.Core, target: Target, sizes: Mapping[str, int], rounded: float
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"kernel": name, "op": what, "schedule": "dlight", "macs": 0} for name, what in compiled.scheduled.items()
    ]
    rows += [
        {
            "kernel": s.function,
            "op": s.op,
            "schedule": "triton",
            "macs": s.macs,
            "launches": [
                {"kernel": tvm_cuda_triton.kernel_name(launch.variant), "grid": list(launch.grid)}
                for launch in s.program.launches
            ],
        }
        for s in {s.function: s for s in compiled.carrier.sites}.values()
    ]
    return {
        "batch": 1,
        "sizes": dict(sizes),
        "tvm": _tvm_compat.load().tvm.__version__,
        "core": core.name,
        "host": host_triple(target),
        "activations": str(compiled.carrier.dtype).removeprefix("torch."),
        "rounding_of_activations": rounded,
        "schedule": dict(Counter(r["schedule"] for r in rows)),
        "schedule_measured_on_target": False,
        "kernels": rows,
        "triton": [asdict(k) for k in compiled.kernels],
        "calls": [{"kernel": k, "layer": layer} for k, layer in compiled.calls],
        "plain": dict(compiled.carrier.plain),
        "cubin_bytes": sum(len(m.cubin) for m in compiled.modules),
    }


def host_triple(target: Target) -> str:
    """LLVM triple of the computer that the GPU is in."""
    return target.triple or TRIPLE


def compile_model(fixed: onnx.ModelProto, core: cores.Core, triple: str = TRIPLE) -> Compiled:
    """Import, schedule and compile a model of fixed shapes (see tvm_import.fix_batch) for a core."""
    from . import tvm

    ir = _tvm_compat.load()
    rewritten = tvm_import.whole_numbers(fixed)
    carrier = Carrier(core, ACTIVATIONS)
    imported = tvm_import.to_relax(rewritten.model, kernels=carrier.lowerings())
    module = schedule(_without_cpu_schedules(imported.module, carrier), core, triple)
    names = {s.function for s in carrier.sites}
    module, modules, kernels = tvm_cuda_triton.finish(module, carrier)
    views = ir.relax.transform.RewriteDataflowReshape()(module)
    calls = tvm_layers.called(views, rewritten.model, imported.packed)
    scheduled = {
        v.name_hint: _what(v.name_hint) for v, f in module.functions_items() if isinstance(f, ir.PrimFunc) and v.name_hint not in names
    }  # fmt: skip
    workspace, outputs = tvm.workspace(module, {}), tvm.outputs(fixed, module["main"].ret_ty)
    executable, own = _build(module, core, triple)
    return Compiled(
        executable=executable,
        modules=[*([own] if own else []), *modules],
        carrier=carrier,
        kernels=kernels,
        scheduled=dict(sorted(scheduled.items())),
        calls=calls,
        workspace_bytes=workspace,
        outputs=outputs,
        rewritten=rewritten,
    )


def _without_cpu_schedules(module: Any, carrier: Carrier) -> Any:
    """The kernels that lowerings of kernels/tvm made, for TVM to schedule: only carried ones are finished."""
    ir = _tvm_compat.load()
    carried = {s.function for s in carrier.sites}
    for variable, function in list(module.functions_items()):
        if isinstance(function, ir.PrimFunc) and variable.name_hint not in carried and lowering.OP in function.attrs:
            module.update_func(variable, function.without_attr("tirx.is_scheduled"))
    return module


def schedule(module: Any, core: cores.Core, triple: str) -> Any:
    """The IRModule with a GPU schedule for every kernel that has none. Raises PlanishError for one that no rule takes."""
    ir = _tvm_compat.load()
    from tvm.s_tir import dlight

    rules = [dlight.gpu.Matmul(), dlight.gpu.GEMV(), dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Transpose(), dlight.gpu.Fallback()]  # fmt: skip
    with _cuda(core, triple):
        made = ir.tvm.transform.Sequential([dlight.ApplyDefaultSchedule(*rules)])(module)
    left = [v.name_hint for v, f in made.functions_items() if isinstance(f, ir.PrimFunc) and "tirx.is_scheduled" not in f.attrs]  # fmt: skip
    if left:
        raise PlanishError(f"TVM has no schedule for a GPU for {listed(sorted(left))}")
    return made


def _cuda(core: cores.Core, triple: str) -> Any:
    """The target that TVM's rules look at."""
    facts = {
        "arch": core.name,
        "max_threads_per_block": THREADS,
        "max_shared_memory_per_block": SHARED_BYTES,
        "thread_warp_size": 32,
    }
    return _tvm_compat.load().Target({"kind": "cuda", **facts}, host=_host(triple))


def _host(triple: str) -> dict[str, str]:
    return {"kind": "llvm", "mtriple": triple}


def _what(name: str) -> str:
    """Whether a scheduled kernel multiplies matrices or convolves, by the name that TVM gave it."""
    return "product" if any(w in name for w in ("matmul", "conv")) else "elementwise"


def _build(module: Any, core: cores.Core, triple: str) -> tuple[Any, Module | None]:
    """(virtual machine's executable, TVM's own kernels) of a scheduled module."""
    ir = _tvm_compat.load()
    from tvm.relax import vm_build

    t = ir.relax.transform
    passes = [
        t.RewriteDataflowReshape(),
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]
    target = ir.Target(
        {"kind": "nvptx", "mcpu": core.name, "thread_warp_size": 32, "max_num_threads": THREADS}, host=_host(triple)
    )
    with target:
        lowered = ir.tvm.transform.Sequential(passes)(module)
    builder = ir.relax.ExecBuilder()
    functions = vm_build._filter_tir(vm_build._vmcodegen(builder, lowered))
    if functions is None:
        raise PlanishError("the model has no kernel to compile: its outputs are its inputs or constants")
    host, own = tvm_cuda_code.build(functions, target, core.name)
    return ir.relax.VMExecutable(
        vm_build._ffi_api.VMLink(builder, target, host, [], {})  # pyright: ignore[reportAttributeAccessIssue]
    ), own


def _rounds(fixed: onnx.ModelProto) -> bool:
    """Whether a fused op rounds activations to codes while the model runs."""
    known = lowering.lowerings()
    nodes = [n for n in fixed.graph.node if n.domain == fused.DOMAIN]
    return any(known[n.op_type].rounds(fused.call(n).attributes) for n in nodes)


def _rounded_difference(
    fixed: onnx.ModelProto, answers: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]
) -> float:
    """How far 16-bit inputs and outputs of fused layers move the outputs on the golden samples, in ONNX Runtime.

    Raises PlanishError where an activation is too large for the type.
    """
    from . import tvm

    made = in_half(fixed)
    if made is None:
        return 0.0
    found = tvm.measure(made, tvm_import.Rewritten(made), golden).answers
    if any(not np.isfinite(np.asarray(a, np.float64)).all() for a in found.values()):
        raise PlanishError(
            f"an activation at a low-bit layer is beyond float16 ({LARGEST_HALF:.0f}) on the golden samples; format pt2 computes in bfloat16"
        )
    return max((float(np.abs(answers[n].astype(np.float64) - a).max(initial=0)) for n, a in found.items()), default=0.0)


def in_half(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The graph with x and y of every fused linear node rounded to float16; None where there is no such node."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    changed = False
    for node in made.graph.node:
        if node.domain != fused.DOMAIN or not node.op_type.startswith("linear_"):
            nodes.append(node)
            continue
        changed = True
        x, y = node.input[0], node.output[0]
        nodes += [
            helper.make_node("Cast", [x], [f"{y}.x16"], to=HALF),
            helper.make_node("Cast", [f"{y}.x16"], [f"{y}.x"], to=TensorProto.FLOAT),
        ]
        node.input[0], node.output[0] = f"{y}.x", f"{y}.y"
        nodes += [
            node,
            helper.make_node("Cast", [f"{y}.y"], [f"{y}.y16"], to=HALF),
            helper.make_node("Cast", [f"{y}.y16"], [y], to=TensorProto.FLOAT),
        ]
    kept = list(nodes)
    del made.graph.node[:]
    made.graph.node.extend(kept)
    return made if changed else None
