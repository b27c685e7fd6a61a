"""Device code for CUDA made without NVIDIA's toolkit, and its place in a TVM library.

TVM's LLVM writes PTX for the kernels that TVM scheduled, Triton writes PTX for ours; the assembler in Triton's wheel makes a cubin of each.
TVM itself would store CUDA C++ here, to be compiled on the user's machine at every start.

Three faults of TVM 0.27's PTX generator with LLVM 22 are mended on the way: a barrier lacks its number (and one of a warp is dropped),
vectors are given to functions of scalars (loops are not vectorized, therefore), and kernels are written as functions that no host can
launch, without their block size, by which the assembler limits registers.

A library carries the modules of a program as one constant (tvm-ffi, src/ffi/extra/library_module.cc):

    bytes: u64 | tree: indptr, children (vectors of u64) | for each module its kind: string, and unless that is "_lib" its bytes: string

where a vector or string is its u64 length and its elements. A module of kind `cuda` is (TVM, CUDAModuleNode::SaveToBytes)

    format: string | functions: u64, then for each its name, and again: name, argument types, launch tags, extra tags | code: string
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import PlanishError, missing_extra
from . import _tvm_compat

SHARED = "tirx.use_dyn_shared_memory"
"""TVM's tag of the launch parameter that is a number of bytes of shared memory"""
SYMBOL = "__tvm_ffi__library_bin"
"""of the constant that holds the modules"""
TYPES = {"handle": (3, 64, 1), "i32": (0, 32, 1), "i64": (0, 64, 1), "fp32": (2, 32, 1)}
"""DLDataType (code, bits, lanes) of a kernel's argument"""
CODES = {"int": 0, "uint": 1, "float": 2, "bool": 1}
GRID = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
BLOCK = ("threadIdx.x", "threadIdx.y", "threadIdx.z")
SYNC = "tirx.tvm_storage_sync"


@dataclass(frozen=True)
class Function:
    """One kernel as TVM's runtime launches it: arguments, then one number for each tag."""

    name: str
    types: tuple[tuple[int, int, int], ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """Kernels in one cubin."""

    functions: tuple[Function, ...]
    cubin: bytes

    def stored(self) -> bytes:
        """As TVM's runtime reads it."""
        table = struct.pack("<Q", len(self.functions))
        for f in self.functions:
            types = struct.pack("<Q", len(f.types)) + b"".join(struct.pack("<BBH", *t) for t in f.types)
            tags = struct.pack("<Q", len(f.tags)) + b"".join(_string(t) for t in f.tags)
            extra = struct.pack("<Q", len(f.types)) + struct.pack("<i", 0) * len(f.types)
            table += _string(f.name) + _string(f.name) + types + tags + extra
        return _string("cubin") + table + _string(self.cubin)


def architecture(core: str) -> str:
    """The name under which the assembler knows all of a core's instructions: sm_90a for sm_90."""
    return f"{core}a" if int(core.removeprefix("sm_")) >= 90 else core


def assemble(ptx: str, core: str, what: str) -> bytes:
    """The cubin of PTX, by the assembler that Triton uses for the core. Raises PlanishError with its last line."""
    number = int(core.removeprefix("sm_"))
    tool = tools() / ("bin/ptxas" if number < 90 else "bin/ptxas-blackwell")
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "kernel.ptx", Path(scratch) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        command = [
            str(tool),
            "--regAllocOptLevel=2",
            f"--gpu-name={architecture(core)}",
            "kernel.ptx",
            "-o",
            "kernel.cubin",
        ]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise PlanishError(f"ptxas cannot assemble {what} for {core}: {lines[-1][:300]}")
        return made.read_bytes()


def tools() -> Path:
    """Folder in Triton's wheel with NVIDIA's assembler (bin) and library of functions (lib)."""
    try:
        import triton
    except ImportError as error:
        raise missing_extra("triton", "gpu", "the assembler for NVIDIA GPUs") from error
    return Path(triton.__file__).parent / "backends" / "nvidia"


def renamed(ptx: str, old: str, new: str) -> str:
    """PTX of one kernel under another name, without what tells where its source was (lines, files, debug sections)."""
    lines = [line for line in ptx.splitlines() if not re.match(r"\s*\.(loc|file)\b", line)]
    text = re.sub(r"^\s*\.section\s+\.debug\w*\s*\{.*?^\s*\}", "", "\n".join(lines), flags=re.MULTILINE | re.DOTALL)
    return re.sub(rf"\b{re.escape(old)}(?=\b|_param_)", new, text) + "\n"


def parameters(ptx: str) -> list[str]:
    """Names of the parameters of the one kernel in PTX."""
    (head,) = re.findall(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    return re.findall(r"\b(\w+_param_\d+)\b", head)


def device_functions(module: Any) -> tuple[list[Function], dict[str, tuple[int, int, int]]]:
    """The kernels of a lowered IRModule, and the threads of their blocks by name."""
    functions, blocks = [], {}
    for _, function in module.functions_items():
        if int(function.attrs["calling_conv"]) != 2:  # a helper, not a kernel
            continue
        name = str(function.attrs["global_symbol"])
        tags = tuple(str(t) for t in function.attrs["tirx.kernel_launch_params"])
        functions.append(Function(name, tuple(_type(p) for p in function.params), tags))
        extents = _extents(function.body)
        x, y, z = (extents.get(axis, 1) for axis in BLOCK)
        blocks[name] = (x, y, z)
    return functions, blocks


def _type(parameter: Any) -> tuple[int, int, int]:
    """DLDataType of a kernel's parameter."""
    ir = _tvm_compat.load()
    if isinstance(parameter.ty, ir.tvm.ir.PointerType):
        return TYPES["handle"]
    kind, bits = re.fullmatch(r"([a-z]+)(\d+)", str(parameter.ty.dtype)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return CODES[kind], int(bits), 1


def _extents(body: Any) -> dict[str, int]:
    """Number of threads by axis."""
    found: dict[str, int] = {}
    pending = [body]
    while pending:
        node = pending.pop()
        if str(getattr(node, "attr_key", "")) == "thread_extent":
            found[str(node.node.thread_tag)] = int(node.value)
        pending += [p for p in (getattr(node, "body", None), *(getattr(node, "seq", None) or ())) if p is not None]
    return found


def entries(ptx: str, blocks: dict[str, tuple[int, int, int]]) -> str:
    """PTX with the named functions as kernels of a known block size."""
    for name, block in blocks.items():
        head = re.compile(rf"\.visible \.func {re.escape(name)}\s*(\(.*?\))", re.DOTALL)
        size = ", ".join(map(str, block))
        ptx, count = head.subn(rf".visible .entry {name}\1\n.reqntid {size}", ptx, count=1)
        if count != 1:
            raise PlanishError(f"TVM wrote no kernel '{name}' for this GPU")
    return ptx


@contextmanager
def mended() -> Iterator[None]:
    """TVM's registry with a lowering of barriers that LLVM 22 takes, and the library of functions from Triton's wheel."""
    ir = _tvm_compat.load()
    library = str(tools() / "lib" / "libdevice.10.bc")
    before = ir.tvm.get_global_func("tvm_callback_libdevice_path")
    ir.tvm.register_global_func("tvm_callback_libdevice_path", lambda _: library, override=True)
    _register_barrier()
    try:
        with ir.tvm.transform.PassContext(config={"tirx.disable_vectorize": True}):
            yield
    finally:
        ir.tvm.register_global_func("tvm_callback_libdevice_path", before, override=True)


@functools.cache
def _register_barrier() -> None:
    """Once in a process: TVM takes no second lowering. Nothing else here compiles for nvptx."""
    _tvm_compat.load().tirx.register_intrin_lowering(SYNC, target="nvptx", f=_barrier, level=99)


def _barrier(call: Any) -> Any:
    """A barrier of the block or of the warp, as LLVM's intrinsic with its argument."""
    tirx = _tvm_compat.load().tirx
    if str(call.args[0].value) == "warp":
        return tirx.call_llvm_intrin("void", "llvm.nvvm.bar.warp.sync", tirx.const(-1, "int32"))
    return tirx.call_llvm_intrin("void", "llvm.nvvm.barrier.cta.sync.aligned.all", tirx.const(0, "int32"))


def build(module: Any, target: Any, core: str) -> tuple[Any, Module | None]:
    """(host module, kernels) of the scheduled functions of an IRModule, for an `nvptx` target with a host."""
    ir = _tvm_compat.load()
    from tvm.tirx.build import codegen_build, split_host_device_mods
    from tvm.tirx.compilation_pipeline import get_tir_pipeline

    pipeline, host_passes, device_passes = get_tir_pipeline("default")  # pyright: ignore[reportGeneralTypeIssues]
    with mended():
        lowered = pipeline(ir.tirx.transform.BindTarget(target)(module))
        host, devices = split_host_device_mods(lowered)
        made = codegen_build(host_passes()(host), target.host)
        found = [m for m in devices.values() if list(m.functions_items())]
        if not found:
            return made, None
        (device,) = found
        functions, blocks = device_functions(device)
        built = codegen_build(device_passes()(device), target)
        ptx = entries(str(built.inspect_source("ptx") or built.inspect_source()), blocks)
    return made, Module(tuple(functions), assemble(ptx, core, "TVM's kernels"))


def carry(modules: Sequence[Module]) -> Any:
    """What `export_library` calls as `fpack_imports`: the library's constant with the modules added below its own code."""
    ir = _tvm_compat.load()

    def pack(executable: Any, _system: bool, _prefix: str, folder: str) -> str:
        packed = ir.tvm.get_global_func("runtime.ModulePackImportsToTensor")(executable)
        blob = with_modules(bytes(packed.numpy().tobytes()), [m.stored() for m in modules])
        Path(folder, "modules.bin").write_bytes(blob)
        source = Path(folder, "modules.s")
        # the comment tells zig's cache one blob from another
        at = Path(folder, "modules.bin")
        source.write_text(
            f'# {hashlib.sha256(blob).hexdigest()}\n.section .rodata,"a",@progbits\n.globl {SYMBOL}\n.type {SYMBOL}, @object\n.balign 64\n'
            f'{SYMBOL}:\n.incbin "{at}"\n.size {SYMBOL}, {len(blob)}\n.section .note.GNU-stack,"",@progbits\n',
            encoding="utf-8",
        )
        return str(source)

    return pack


def with_modules(blob: bytes, added: Sequence[bytes]) -> bytes:
    """A library's constant with modules of kind `cuda` added as imports of its code."""
    tree, modules = unpack(blob)
    parent = next(i for i, (kind, _) in enumerate(modules) if kind == "_lib")
    tree[parent] += range(len(modules), len(modules) + len(added))
    tree += [[] for _ in added]
    return pack(tree, [*modules, *(("cuda", data) for data in added)])


def unpack(blob: bytes) -> tuple[list[list[int]], list[tuple[str, bytes]]]:
    """(children of each module, its kind and bytes) of a library's constant."""
    size = struct.unpack_from("<Q", blob)[0]
    at = 8

    def number() -> int:
        nonlocal at
        at += 8
        return struct.unpack_from("<Q", blob, at - 8)[0]

    def take() -> bytes:
        nonlocal at
        length = number()
        at += length
        return blob[at - length : at]

    ends = [number() for _ in range(number())]
    children = [number() for _ in range(number())]
    tree = [children[a:b] for a, b in itertools.pairwise(ends)]
    modules = []
    for _ in tree:
        kind = take().decode()
        modules.append((kind, b"" if kind == "_lib" else take()))
    if at != 8 + size:
        raise PlanishError("TVM packed its modules in a form that is not known here")
    return tree, modules


def pack(tree: Sequence[Sequence[int]], modules: Sequence[tuple[str, bytes]]) -> bytes:
    """The inverse of `unpack`."""
    ends = [0]
    for children in tree:
        ends.append(ends[-1] + len(children))
    flat = [c for children in tree for c in children]
    body = b"".join(struct.pack(f"<Q{len(v)}Q", len(v), *v) for v in (ends, flat))
    for kind, data in modules:
        body += _string(kind) + (b"" if kind == "_lib" else _string(data))
    return struct.pack("<Q", len(body)) + body


def _string(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data
