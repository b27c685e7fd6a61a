"""Fused ops in a TVM library for CUDA: the Triton kernels that planish::gpu_<op> launches, carried as cubins.

The op's file in kernels/gpu packs the layer, its `run` in kernels/triton is recorded for the shape that x has (kernels/triton/record.py), every
kernel is compiled ahead of time, and a function on the host launches them in that order. Memory that `run` allocates is planned by TVM
with everything else. x is rounded to 16 bits before the layer, and y is 16 bits behind it; TVM fuses these casts with their neighbours.

Triton's kernels end in two parameters for scratch memory in which it was given none to plan (triton/backends/nvidia/driver.c): they are null,
and a kernel that reads them is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import PlanishError
from ..kernels import fused as fused_ops
from ..kernels.gpu import op as gpu
from ..kernels.gpu.core import Core
from ..kernels.tvm import lowering
from ..kernels.tvm.lowering import OP, OPAQUE, Lowering, Use
from . import _tvm_compat, fused, tvm_cuda_code
from .tvm_cuda_code import BLOCK, GRID, SHARED, TYPES, Function, Module

PROGRAM = "planish.program"
"""attribute of a host function: what it launches"""
X, BIAS = "x", "bias"
"""the computed argument of a linear op; the one that its epilogue adds"""
WARP = 32
SCRATCH = 2
"""parameters behind a Triton kernel's own"""


@dataclass(frozen=True)
class Site:
    """One layer whose kernels are carried."""

    layer: str
    op: str
    function: str
    """the host function that launches its kernels"""
    program: Any
    """kernels.triton.record.Program"""
    inputs: tuple[str, ...]
    """arguments of the host function by the names of `run`, before the memory that it allocates"""
    macs: int


@dataclass(frozen=True)
class Kernel:
    """A carried kernel, for the manifest."""

    name: str
    source: str
    """file and function in kernels/triton"""
    registers: int
    shared_bytes: int
    spills: int
    threads: int
    tensor_cores: bool


@dataclass
class Carrier:
    """Lowers fused ops to carried kernels, for one core."""

    core: Core
    dtype: torch.dtype
    """of activations at the layers"""
    sites: list[Site] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)
    """why a layer has no carried kernel, by its name"""

    def lowerings(self) -> dict[str, Lowering]:
        """For TVM's importer, by op: linear ops are carried, others are as on a CPU, for TVM to schedule."""
        found = lowering.lowerings()
        return {name: _Carried(self, low) if name.startswith("linear_") else low for name, low in found.items()}


class _Carried(Lowering):
    """One linear op."""

    def __init__(self, carrier: Carrier, cpu: Lowering) -> None:
        self.carrier, self.cpu = carrier, cpu

    def rounds(self, attributes: Mapping[str, Any]) -> bool:
        return self.cpu.rounds(attributes)

    def lower(self, use: Use) -> Sequence[Any]:
        """The expression of y (..., out) float32."""
        tensors = {n: torch.from_numpy(use.array(n).copy()) for n in use.tensors if n != X}
        layer = gpu.Layer(use.op, use.name, tensors, use.attributes)
        op = gpu.ops().get(use.op)
        reason = "there is none for the op" if op is None else op.refuses(layer, self.carrier.core)
        if op is None or reason is not None:
            self.carrier.plain[use.name] = reason or ""
            return [self._dense(use, layer, reason or "")]
        packed = op.pack(layer, self.carrier.core)
        return self._carry(use, layer, packed)

    def _carry(self, use: Use, layer: gpu.Layer, packed: gpu.Packed) -> list[Any]:
        """Outputs of the layer: y in float32, and what else the op gives."""
        from ..kernels.triton import record

        relax, shape = use.ir.relax, use.shape(X)
        x = torch.empty(shape, dtype=self.carrier.dtype)
        arguments = _arguments(use.op, x, layer, packed)
        program = record.record(use.op, gpu.kernel(use.op).run, arguments, self.carrier.core)
        inputs = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor)}
        read = {a.buffer for launch in program.launches for a in launch.arguments if isinstance(a, record.Pointer)}
        names = tuple(n for n in inputs if n in read)
        by_name = {b.name: b for b in program.buffers}
        out = by_name[program.results[0]]
        operands = []
        for name in names:
            if name == X:
                operands.append(use.emit(relax.op.astype(use.tensors[X], _name(x.dtype))))
            else:
                operands.append(use.constant(_bytes(inputs[name])))
        types = [relax.TensorType(*_stored(b, b.name in program.results)) for b in program.buffers]
        macs = math.prod(shape[:-1]) * out.shape[-1] * shape[-1]
        attributes = {  # equal layers share a function, which the digest makes sure of
            PROGRAM: _digest(repr(program)),
            "tirx.is_scheduled": True,
            "tirx.noalias": True,
            "op_pattern": OPAQUE,
            OP: use.op,
            lowering.MACS: macs,
        }
        stub = _function(use.ir, operands, program, {}, attributes)
        reference = use.builder.add_func(stub, use.op)
        made = use.emit(relax.call_tir(reference, relax.Tuple(operands), out_ty=types if len(types) > 1 else types[0]))
        places = [[b.name for b in program.buffers].index(r) for r in program.results]
        results = [made] if len(types) == 1 else [use.emit(relax.TupleGetItem(made, p)) for p in places]
        self.carrier.sites.append(Site(use.name, use.op, reference.name_hint, program, names, macs))
        return [use.emit(relax.op.astype(results[0], "float32")), *results[1:]]

    def _dense(self, use: Use, layer: gpu.Layer, reason: str) -> Any:
        """A product with the decoded weight in 16 bits. Raises PlanishError for an op that rounds its input."""
        if self.cpu.rounds(use.attributes):
            raise PlanishError(
                f"'{use.name}': format tvm has no kernel of {use.op} for {self.carrier.core.name} ({reason}), and TVM has no schedule for an "
                "op that rounds its input; format onnx or pt2 runs it"
            )
        relax, channels = use.ir.relax, use.shape(X)[-1]
        bias = layer.tensors.get(BIAS)
        weight = _reference(use.op, torch.eye(channels), layer)  # (in, out)
        weight = weight if bias is None else weight - bias
        x = use.emit(relax.op.astype(use.tensors[X], "float16"))
        y = use.emit(relax.op.matmul(x, relax.const(weight.to(torch.float16).numpy()), out_dtype="float32"))
        return y if bias is None else use.emit(relax.op.add(y, relax.const(bias.float().numpy())))


def _reference(op: str, x: torch.Tensor, layer: gpu.Layer) -> torch.Tensor:
    """The result (..., out) of planish::<op> itself."""
    fused_ops.ops()
    call = fused.overload(op)
    given: dict[str, Any] = {X: x, **layer.tensors, **layer.attributes}
    return call(*(given.get(a.name) for a in call._schema.arguments))


def _arguments(op: str, x: torch.Tensor, layer: gpu.Layer, packed: gpu.Packed) -> dict[str, Any]:
    """The arguments of planish::gpu_<op> by name, in the order of its schema. Its epilogue adds the bias and nothing else."""
    call = getattr(torch.ops.planish, f"gpu_{op}").default
    given: dict[str, Any] = {
        BIAS: layer.tensors.get(BIAS),
        "activation": "",
        **packed.tensors,
        **packed.attributes,
        X: x,
    }
    return {a.name: given.get(a.name) for a in call._schema.arguments}


def finish(module: Any, carrier: Carrier) -> tuple[Any, list[Module], list[Kernel]]:
    """The IRModule with the host functions of all sites, and the kernels that they launch, compiled."""
    ir = _tvm_compat.load()
    if not carrier.sites:
        return module, [], []
    variants = {kernel_name(v): v for s in carrier.sites for v in (launch.variant for launch in s.program.launches)}
    modules, kernels = compiled(variants, carrier.core)
    shared = {k.name: (k.threads, k.shared_bytes) for k in kernels}
    for site in {s.function: s for s in carrier.sites}.values():
        reference = module.get_global_var(site.function)
        stub = module[reference]
        filled = _function(
            ir, _calls(module, site.function)[0], site.program, shared, dict(stub.attrs.items()), site.inputs
        )
        module.update_func(reference, filled)
    return module, modules, kernels


def _calls(module: Any, function: str) -> list[list[Any]]:
    """Operands of the calls of a host function."""
    from .tvm_layers import kernel_calls

    return [operands for name, operands in kernel_calls(module["main"]) if name == function]


def kernel_name(variant: Any) -> str:
    """Equal for equal variants: the function and a hash of what it was specialized for."""
    facts = {k: v for k, v in asdict(variant).items() if k not in ("label", "matrix")}
    return f"{variant.module}_{variant.kernel}_{_digest(json.dumps(facts, sort_keys=True))}".strip("_")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def compiled(variants: Mapping[str, Any], core: Core) -> tuple[list[Module], list[Kernel]]:
    """One module a kernel, for a core, under the names given."""
    from ..kernels.triton.ahead import compile_all

    modules, kernels = [], []
    with tempfile.TemporaryDirectory() as scratch:
        found = compile_all(list(variants.values()), core.name, Path(scratch))
        for (name, variant), made in zip(variants.items(), found, strict=True):
            ptx = tvm_cuda_code.renamed(Path(made.files["ptx"]).read_text(encoding="utf-8"), made.name, name)
            types = [_type(t) for t in variant.types.values()]
            given = tvm_cuda_code.parameters(ptx)
            _check_scratch(ptx, given, len(types), name)
            tags = (*GRID, BLOCK[0], *((SHARED,) if made.shared_bytes else ()))
            function = Function(name, tuple([*types, *[TYPES["handle"]] * SCRATCH]), tags)
            modules.append(Module((function,), tvm_cuda_code.assemble(ptx, core.name, f"'{name}'")))
            source = f"{variant.module}.{variant.kernel}"
            kernels.append(
                Kernel(
                    name, source, made.registers, made.shared_bytes, made.spills, made.threads, bool(made.tensor_cores)
                )
            )
    return modules, kernels


def _check_scratch(ptx: str, parameters: Sequence[str], known: int, name: str) -> None:
    """Raise PlanishError unless the kernel has two parameters behind its own, and reads neither."""
    hidden = parameters[known:]
    if len(hidden) != SCRATCH:
        raise PlanishError(
            f"kernel '{name}' has {len(parameters)} parameters, {known + SCRATCH} are expected of this Triton"
        )
    body = ptx.partition("{")[2]
    if any(re.search(rf"\b{p}\b", body) for p in hidden):
        raise PlanishError(f"kernel '{name}' needs scratch memory from Triton's launcher, which TVM does not have")


def _type(kind: str) -> tuple[int, int, int]:
    return TYPES["handle"] if kind.startswith("*") else TYPES[kind]


def _function(
    ir: Any,
    operands: Sequence[Any],
    program: Any,
    shared: Mapping[str, tuple[int, int]],
    attributes: Mapping[str, Any],
    inputs: Sequence[str] = (),
) -> Any:
    """The host function: launches the kernels in order. Without `inputs` one that launches nothing, until they are compiled."""
    te, tirx = ir.te, ir.tirx
    given = [
        te.placeholder([int(d) for d in v.ty.shape], str(v.ty.dtype), name=f"a{i}") for i, v in enumerate(operands)
    ]
    shapes = [_stored(b, b.name in program.results) for b in program.buffers]

    def body(ins: Any, outs: Any) -> Any:
        if not inputs:
            return tirx.Evaluate(tirx.const(0, "int32"))
        buffers = dict(zip([*inputs, *(b.name for b in program.buffers)], [*ins, *outs], strict=True))
        null = tirx.reinterpret("handle", tirx.const(0, "uint64"))
        calls = []
        for launch in program.launches:
            name = kernel_name(launch.variant)
            threads, size = shared[name]
            values = [
                _value(tirx, kind, value, buffers)
                for kind, value in zip(launch.variant.types.values(), launch.arguments, strict=True)
            ]
            sizes = [*launch.grid, threads, *([size] if size else [])]
            launched = [tirx.const(v, "int64") for v in sizes]
            calls.append(tirx.Evaluate(tirx.call_packed(name, *values, null, null, *launched)))
        return calls[0] if len(calls) == 1 else tirx.SeqStmt(calls)

    made = te.extern([s for s, _ in shapes], given, body, name="launch", dtype=[t for _, t in shapes])
    results = [made] if len(shapes) == 1 else list(made)
    function = te.create_prim_func([*given, *results])
    return function.without_attr("global_symbol").with_attrs(dict(attributes))


def _value(tirx: Any, kind: str, value: Any, buffers: Mapping[str, Any]) -> Any:
    """An argument of a launch as an expression on the host."""
    if kind.startswith("*"):
        if not value.buffer:
            return tirx.reinterpret("handle", tirx.const(0, "uint64"))
        buffer = buffers[value.buffer]
        if not value.offset:
            return buffer.data
        size = np.dtype(str(buffer.dtype)).itemsize
        return buffer.access_ptr("rw", offset=value.offset // size)
    return tirx.const(value, {"i32": "int32", "i64": "int64", "fp32": "float32"}[kind])


def _stored(buffer: Any, result: bool) -> tuple[tuple[int, ...], str]:
    """(shape, type) of a buffer in TVM: temporaries are bytes."""
    if result:
        return buffer.shape, _name(buffer.dtype)
    return (math.prod(buffer.shape) * buffer.dtype.itemsize,), "uint8"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The values as bytes: kernels read memory, whatever type TVM gives it."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
