"""The kernels that an op's `run` would launch, noted instead of launched: a program that another runtime can carry.

`run` allocates its temporaries with torch, makes views of its arguments, and launches through config.launch, which hands the launch to the
recorder that is open. The sizes are those of the tensors given, so a program holds for one shape.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...common.errors import PlanishError
from ..gpu.core import Core
from .ahead import Variant

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}
"""Triton's name of a pointer, by the tensor's type"""
EMPTY, ZEROS = (
    ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    ("zeros", "new_zeros", "zeros_like"),
)
"""what may make a temporary"""
ALIGNED = 16
"""bytes to which a pointer is known to be aligned, and divisor of integers that the compiler makes use of"""


@dataclass(frozen=True)
class Pointer:
    """A tensor argument of a kernel."""

    buffer: str
    """an argument of `run`, or a temporary"""
    offset: int
    """bytes"""


NOWHERE = Pointer("", 0)
"""of a tensor without elements: null"""


@dataclass(frozen=True)
class Launch:
    """One kernel on one grid."""

    variant: Variant
    grid: tuple[int, int, int]
    arguments: tuple[Pointer | int | float, ...]
    """the run-time ones, in the order of the kernel's parameters"""


@dataclass(frozen=True)
class Buffer:
    """Memory that `run` allocates."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool
    """whether it is zero before the first kernel"""


@dataclass(frozen=True)
class Program:
    """What `run` does for tensors of the given shapes on one core."""

    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    results: tuple[str, ...]
    """buffers that hold the outputs"""


class Recorder(TorchDispatchMode):
    """Notes launches, and where the memory that they read and write comes from."""

    def __init__(self, op: str, core: Core, arguments: Mapping[str, Any], interpreted: bool = False) -> None:
        super().__init__()
        self.op, self.core, self.interpreted = op, core, interpreted
        self.launches: list[Launch] = []
        self.buffers: dict[str, Buffer] = {}
        self.tensors: list[torch.Tensor] = []  # kept alive, so that no two have the same address
        self.owner: dict[int, str] = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.numel():
                self.owner[value.untyped_storage().data_ptr()] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in EMPTY + ZEROS and isinstance(made, torch.Tensor):
            buffer = Buffer(f"temporary{len(self.buffers)}", tuple(made.shape), made.dtype, name in ZEROS)
            self.buffers[buffer.name] = buffer
            self.tensors.append(made)
            self.owner[made.untyped_storage().data_ptr()] = buffer.name
        elif name in ("zero_", "fill_", "copy_", "_to_copy", "clone") or (
            isinstance(made, torch.Tensor) and made.numel() and made.untyped_storage().data_ptr() not in self.owner
        ):
            raise PlanishError(f"the kernels of '{self.op}' cannot be carried: torch computes '{name}' between them")
        return made

    def place(self, value: torch.Tensor) -> Pointer:
        """Where a tensor lies. Raises PlanishError for one that is neither an argument nor a temporary."""
        found = self.owner.get(value.untyped_storage().data_ptr())
        if found is None:
            raise PlanishError(f"the kernels of '{self.op}' cannot be carried: one reads a tensor of unknown origin")
        return Pointer(found, int(value.storage_offset()) * value.element_size())

    def launch(
        self,
        kernel: Any,
        grid: Sequence[int] | Callable[..., Sequence[int]],
        warps: int,
        stages: int,
        args: Sequence[Any],
        constants: Mapping[str, Any],
    ) -> None:
        """Note one launch."""
        names: list[str] = list(kernel.arg_names)
        values = dict(zip(names, args, strict=False)) | dict(constants)
        compile_time = _compile_time(kernel)
        types: dict[str, str] = {}
        fixed: dict[str, Any] = {}
        unaligned: list[str] = []
        arguments: list[Pointer | int | float] = []
        for name in names:
            value = values[name]
            if isinstance(value, torch.Tensor) and value.numel():
                pointer = self.place(value)
                types[name] = POINTERS[value.dtype]
                arguments.append(pointer)
                if pointer.offset % ALIGNED:
                    unaligned.append(name)
            elif isinstance(value, torch.Tensor):
                types[name] = POINTERS[value.dtype]
                arguments.append(NOWHERE)
            elif name in compile_time or value is None or isinstance(value, (bool, str)):
                fixed[name] = value
            elif isinstance(value, int):
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                arguments.append(value)
                if value % ALIGNED:
                    unaligned.append(name)
            else:
                types[name] = "fp32"
                arguments.append(float(value))
        file = kernel.fn.__module__.rpartition(".")[2]
        made = Variant(file, kernel.fn.__name__, types, fixed, warps, stages, unaligned=tuple(unaligned), label=self.op)
        x, y, z = (*(grid(values) if callable(grid) else grid), 1, 1)[:3]
        self.launches.append(Launch(made, (int(x), int(y), int(z)), tuple(arguments)))


OPEN: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)
"""the recorder that launches go to; None: they run"""


def record(
    op: str, run: Callable[..., Any], arguments: Mapping[str, Any], core: Core, interpreted: bool = False
) -> Program:
    """What `run` (of kernels/triton/<op>.py) does with these arguments, by their names in the order of its parameters.

    Tensors are on the CPU; their values are not read. `interpreted` leaves out what only a compiler takes (inline assembly), for
    `replay` under Triton's interpreter. Raises PlanishError where `run` does more than allocate, view and launch.
    """
    with _recording(Recorder(op, core, arguments, interpreted)) as recorder:
        found = run(*arguments.values())
    outputs = [recorder.place(t) for t in (found if isinstance(found, (tuple, list)) else (found,))]
    touched = {a.buffer for launch in recorder.launches for a in launch.arguments if isinstance(a, Pointer)}
    touched |= {o.buffer for o in outputs}
    buffers = tuple(b for b in recorder.buffers.values() if b.name in touched)
    if any(o.buffer not in recorder.buffers or o.offset for o in outputs):
        raise PlanishError(f"the kernels of '{op}' cannot be carried: an output is a part of another tensor")
    zeroing = [_zero(b) for b in buffers if b.zeroed]
    return Program(buffers, (*zeroing, *recorder.launches), tuple(o.buffer for o in outputs))


def _zero(buffer: Buffer) -> Launch:
    """The launch that zeroes a buffer before everything else."""
    from . import zero

    size = math.prod(buffer.shape) * buffer.dtype.itemsize
    unaligned = ("size",) if size % ALIGNED else ()
    types = {"at_ptr": "*u8", "size": "i32" if size < 2**31 else "i64"}
    variant = Variant("zero", "fill", types, {"BLOCK": zero.BLOCK}, matrix=False, unaligned=unaligned, label="zeroing")
    return Launch(variant, (-(-size // zero.BLOCK), 1, 1), (Pointer(buffer.name, 0), size))


@contextlib.contextmanager
def _recording(recorder: Recorder) -> Iterator[Recorder]:
    token = OPEN.set(recorder)
    try:
        with recorder:
            yield recorder
    finally:
        OPEN.reset(token)


def _compile_time(kernel: Any) -> set[str]:
    """Names of the parameters that are annotated as constants."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return {p.name for p in parameters if "constexpr" in str(p.annotation)}


def replay(program: Program, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """The results of a program, its kernels launched one by one on tensors by name, as another runtime would launch them.

    On CPU tensors under Triton's interpreter; the program must be `interpreted`.
    """
    memory: dict[str, torch.Tensor] = {
        n: v.contiguous().reshape(-1).view(torch.uint8) for n, v in arguments.items() if isinstance(v, torch.Tensor)
    }
    for b in program.buffers:  # what nobody zeroed is not zero
        memory[b.name] = torch.full((math.prod(b.shape) * b.dtype.itemsize,), 0xA5, dtype=torch.uint8)
    dtypes = {name: dtype for dtype, name in POINTERS.items()}
    memory[NOWHERE.buffer] = torch.empty(0, dtype=torch.uint8)
    for launch in program.launches:
        variant = launch.variant
        kernel = getattr(importlib.import_module(f".{variant.module}", __package__), variant.kernel)
        values: dict[str, Any] = dict(variant.constants)
        for (name, kind), value in zip(variant.types.items(), launch.arguments, strict=True):
            given = memory[value.buffer][value.offset :] if isinstance(value, Pointer) else value
            values[name] = given.view(dtypes[kind]) if isinstance(given, torch.Tensor) else given
        kernel[launch.grid](**values, num_warps=variant.warps, num_stages=variant.stages)
    by_name = {b.name: b for b in program.buffers}
    return [memory[n].view(by_name[n].dtype).reshape(by_name[n].shape) for n in program.results]
