"""`.pt2` files: torch.export programs, written deterministically and read without running anything they hold.

torch.export.load trusts its file. It unpickles weights, constants and sample inputs, evaluates shape expressions with
sympify, imports modules named in tree specs, resolves operators by attribute lookup, and pastes names and guards into
Python source that it executes. So no foreign file reaches it here. `read` takes the archive apart with the zip module,
accepts what this page lists, drops what planish does not need (sample inputs, guards, stack traces, module
metadata, extra files), and `pack` builds a new archive from what is left. `save` and `load` both go through the two:
what planish writes is what planish accepts, and the same program gives the same bytes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import keyword
import math
import re
import struct
import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import (
    _SERIALIZE_TO_TORCH_DTYPE,
    EnumEncoder,
    _bytes_to_dataclass,
    _dataclass_to_dict,
)
from torch._export.serde.union import _Union
from torch.export.pt2_archive import PT2ArchiveWriter
from torch.export.pt2_archive._package import load_pt2

from ..common.errors import PlanishError, listed
from ..kernels import affine, fused
from ..kernels.gpu import op as gpu_op
from .mapped import Mapped

_ = affine  # its import defines planish::quantize and planish::dequantize, which programs name

WEIGHTS, CONSTANTS, PROGRAM = "data/weights/", "data/constants/", "models/model.json"
WEIGHTS_CONFIG, CONSTANTS_CONFIG = WEIGHTS + "model_weights_config.json", CONSTANTS + "model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
NEEDED = ("archive_format", "archive_version", PROGRAM, WEIGHTS_CONFIG, CONSTANTS_CONFIG)
MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))"
    r"|data/sample_inputs/model\.pt|extra/[^/\\]+"
)
"""members of an archive, below its root folder; sample inputs and extra files are never read"""
RECORD = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
"""members that hold a tensor's raw bytes; they are read where they stand"""

Rule = Callable[[str], str | None]
"""what is wrong with a string, None when nothing is"""


class Refused(Exception):
    """A part of a file that planish does not accept; the message says which and why."""


Tensors = dict[str, tuple[torch.Tensor, schema.PayloadMeta]]


@dataclasses.dataclass(frozen=True)
class Contents:
    """An accepted archive: the program's JSON form, and its tensors by name."""

    program: schema.ExportedProgram
    weights: Tensors
    constants: Tensors
    hollow: bool = False
    """whether stand-ins of one element stand for the tensors"""


def save(program: torch.export.ExportedProgram, path: Path, written: Callable[[], None] | None = None) -> None:
    """Write a program: no sample inputs, no stack traces, no paths. The same program gives the same bytes.

    Tensors go to the file one by one, from where they are; `written` is called behind each. Raises PlanishError as `check` does.
    """
    skeleton = _skeleton(program, str(path))
    weights = {n: (program.state_dict[n].detach(), meta) for n, (_, meta) in skeleton.weights.items()}
    held = typing.cast("dict[str, torch.Tensor]", program.constants)  # `_skeleton` refuses whatever is no tensor
    constants = {n: (held[n].detach(), meta) for n, (_, meta) in skeleton.constants.items()}
    with path.open("wb", buffering=0) as file:
        target = _Postponing(file)
        pack(Contents(skeleton.program, weights, constants), typing.cast("typing.IO[bytes]", target), written)
        if target.error is not None:
            raise target.error


def check(program: torch.export.ExportedProgram, name: str) -> None:
    """Raise PlanishError for a program that `load` would refuse (custom classes, control flow, foreign operators).

    `name` is what the message calls the program. No tensor is read.
    """
    _skeleton(program, name)


def load(path: Path) -> torch.export.ExportedProgram:
    """As `open_mapped`, for who needs the program only."""
    return open_mapped(path)[0]


def open_mapped(path: Path) -> tuple[torch.export.ExportedProgram, Mapped]:
    """A program saved by planish or by torch.export.save (torch 2.8 or newer), and the mapped file that holds its tensors.

    Nothing in the file is executed. Raises PlanishError for a missing, truncated or foreign file and for every part that could
    run code.
    """
    try:
        mapped = Mapped(path)
        contents = read(mapped)
        clean = io.BytesIO()
        pack(Contents(contents.program, _stand_ins(contents.weights), _stand_ins(contents.constants), True), clean)
    except OSError as error:
        raise PlanishError(f"program '{path}' cannot be read: {error.strerror}") from None
    except Refused as error:
        raise PlanishError(f"program '{path}' is refused: {error}") from None
    try:
        program = load_pt2(io.BytesIO(clean.getvalue())).exported_programs["model"]
    except Exception as error:  # torch raises many types for a graph that contradicts itself
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        raise PlanishError(f"program '{path}' is not consistent: {reason}") from None
    _replace(program, {n: t for n, (t, _) in (contents.weights | contents.constants).items()})
    return program, mapped


# ---- tensors and their stand-ins


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and type that stores at most a single element."""
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _stand_ins(tensors: Tensors) -> Tensors:
    return {n: (_stand_in(t), meta) for n, (t, meta) in tensors.items()}


def _replace(program: torch.export.ExportedProgram, values: dict[str, torch.Tensor]) -> None:
    """Put tensors in the place of the program's, in place; a parameter stays one."""
    for owner in (program.state_dict, program.constants):
        for name, old in list(owner.items()):
            if name in values:
                new = values[name]
                if isinstance(old, torch.nn.Parameter):
                    new = new if isinstance(new, torch.nn.Parameter) else torch.nn.Parameter(new, old.requires_grad)
                owner[name] = new


def _plain(tensor: object) -> typing.TypeGuard[torch.Tensor]:
    """Whether the tensor is one that torch.export.save writes as raw bytes: no subclass, dense."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and getattr(tensor, "layout", None) is torch.strided


def _skeleton(program: torch.export.ExportedProgram, name: str) -> Contents:
    """What `read` accepts of the program, with stand-ins for its tensors."""
    every: dict[str, object] = {**program.state_dict, **program.constants}
    fitting = {n: t for n, t in every.items() if _plain(t)}
    raw = io.BytesIO()
    _replace(program, {n: _stand_in(t) for n, t in fitting.items()})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No complete tensor found")  # the stand-ins' single elements
            torch.export.save(program, raw)
    finally:
        _replace(program, fitting)
    try:
        return read(Mapped.of_bytes(raw.getbuffer()), hollow=True)
    except Refused as error:
        raise PlanishError(f"'{name}' cannot be written: {error}") from None


# ---- writing


class _Postponing:
    """A file that keeps the first error of a write for later: torch's archive writer ends the process at an exception."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self.error = file, typing.cast("OSError | None", None)

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while rest and self.error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return len(data)


def pack(contents: Contents, file: typing.IO[bytes], written: Callable[[], None] | None = None) -> None:
    """Write an archive; `written` is called behind each tensor. Tensors that share their data share a record; every record holds its tensor and no more."""
    with PT2ArchiveWriter(file) as writer:  # a file object gets the fixed root folder 'archive'
        done = written or (lambda: None)
        _pack_tensors(writer, contents.weights, WEIGHTS, WEIGHTS_CONFIG, "weight_", contents.hollow, done)
        _pack_tensors(writer, contents.constants, CONSTANTS, CONSTANTS_CONFIG, "tensor_", contents.hollow, done)
        writer.write_string(PROGRAM, _json(contents.program))
        writer.write_bytes(SAMPLES, b"")


def _pack_tensors(
    writer: PT2ArchiveWriter,
    tensors: Tensors,
    folder: str,
    config_file: str,
    prefix: str,
    hollow: bool,
    written: Callable[[], None],
) -> None:
    config: dict[str, schema.PayloadMeta] = {}
    records: dict[tuple[object, ...], str] = {}
    for name, (tensor, meta) in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        shared = tensor.numel() > 0 and key in records
        record = records[key] if shared else f"{prefix}{len(records)}"
        size = tensor.element_size() * (min(1, tensor.numel()) if hollow else tensor.numel())
        dense = hollow or tensor.is_contiguous() or tensor.untyped_storage().nbytes() == size
        kept = tensor if dense else tensor.contiguous()
        if not shared:
            records[key if tensor.numel() else (name,)] = record
            start = kept.storage_offset() * kept.element_size()
            data = kept.untyped_storage()[start : start + size] if size else b""
            writer.archive_file.write_record(folder + record, data, size)
            written()
        assert meta.tensor_meta is not None  # `read` refuses entries without
        tensor_meta = dataclasses.replace(
            meta.tensor_meta,
            strides=[schema.SymInt.create(as_int=s) for s in kept.stride()],
            storage_offset=schema.SymInt.create(as_int=0),
        )
        config[name] = dataclasses.replace(meta, path_name=record, tensor_meta=tensor_meta)
    writer.write_string(config_file, _json(schema.PayloadConfig(config)))


def _json(value: object) -> str:
    """A schema object without blanks: a third of a small model's file is this text."""
    return json.dumps(_dataclass_to_dict(value), cls=EnumEncoder, separators=(",", ":"), allow_nan=False)


# ---- reading


def read(source: Mapped, hollow: bool = False) -> Contents:
    """Take an archive apart. Raises Refused for anything that is not plainly a graph of known ops with raw tensors.

    `hollow`: the archive was made with stand-ins of one element for its tensors.
    """
    fused.ops()  # their files define the ops that a program may name
    gpu_op.ops()
    members = _members(source)
    if members.text.get("archive_format") != b"pt2" or members.text["archive_version"] != b"0":
        raise Refused("not a pt2 archive of version 0")
    if members.text.get("byteorder", b"little") != b"little":
        raise Refused("its tensors are stored big-endian; little-endian is accepted")
    program = _parse(schema.ExportedProgram, members.text[PROGRAM], PROGRAM)
    with _named(PROGRAM):
        _strip(program)
        _check(program, schema.ExportedProgram, _identifier)
    return Contents(
        program,
        _tensors(members, WEIGHTS_CONFIG, WEIGHTS, "weight_", hollow),
        _tensors(members, CONSTANTS_CONFIG, CONSTANTS, "tensor_", hollow),
        hollow,
    )


@dataclasses.dataclass(frozen=True)
class _Members:
    """An archive's members by their names below its root folder."""

    source: Mapped
    text: dict[str, bytes]
    """content of everything that is no tensor"""
    records: dict[str, tuple[int, int]]
    """offset and bytes of every tensor's record in the file"""


def _members(source: Mapped) -> _Members:
    """Members listed in MEMBER, stored without compression, each once, and their check sums right."""
    try:
        with source.file() as raw, zipfile.ZipFile(raw) as file:
            infos = file.infolist()
            names = [i.filename for i in infos]
            if "serialized_exported_program.json" in names:
                raise Refused("it has the format of torch 2.7 or older; load and save it again with a newer torch")
            root = names[0].split("/")[0] if names else ""
            foreign = [n for n in names if not (n.startswith(root + "/") and MEMBER.fullmatch(n[len(root) + 1 :]))]
            if foreign or root in ("", ".", ".."):
                raise Refused(
                    f"unexpected members {listed(foreign)}; one program called 'model' with raw tensors is accepted"
                )
            if len(set(names)) < len(names):
                raise Refused(f"members occur twice: {listed(sorted({n for n in names if names.count(n) > 1}))}")
            packed = [i.filename for i in infos if i.compress_type != zipfile.ZIP_STORED]
            if packed or sum(i.file_size for i in infos) > source.size:
                raise Refused(f"compressed members {listed(packed)}; torch.export.save stores them plainly")
            text: dict[str, bytes] = {}
            records: dict[str, tuple[int, int]] = {}
            for info in infos:
                name = info.filename[len(root) + 1 :]
                if RECORD.fullmatch(name):
                    records[name] = _place(source, file, info)
                elif name != SAMPLES and not name.startswith("extra/"):
                    text[name] = file.read(info)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise Refused(f"not a whole zip archive ({error})") from None
    lacking = [n for n in NEEDED if n not in text]
    if lacking:
        raise Refused(f"not a program saved by torch.export.save: {listed(lacking)} missing")
    return _Members(source, text, records)


def _place(source: Mapped, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Offset and size of a member's bytes, its check sum compared; `file.open` checks its header."""
    with file.open(info):
        lengths = struct.unpack("<HH", source.part(info.header_offset + 26, 4))  # of the name, of the extra field
    start = info.header_offset + 30 + sum(lengths)
    if start + info.file_size > source.size or source.crc32(start, info.file_size) != info.CRC:
        raise zipfile.BadZipFile(f"bad check sum of {info.filename!r}")
    return start, info.file_size


def _parse(kind: type[Any], text: bytes, name: str) -> Any:
    try:
        return _bytes_to_dataclass(kind, text)
    except Exception as error:  # whatever the JSON lacks, torch's reader raises its own way
        raise Refused(f"{name} does not follow the schema of torch {torch.__version__}: {error!r:.150}") from None


def _strip(program: schema.ExportedProgram) -> None:
    """Remove what planish has no use for, in place: guards, stack traces, module paths, call graph of submodules."""
    module = program.graph_module
    program.guards_code = []
    module.metadata = {}
    module.treespec_namedtuple_fields = {}
    module.module_call_graph = [e for e in module.module_call_graph if e.fqn == ""][:1]
    for node in module.graph.nodes:
        node.metadata = {}


def _tensors(members: _Members, config_file: str, folder: str, prefix: str, hollow: bool) -> Tensors:
    """Tensors by name, from raw records of exactly their dtype and within their bounds."""
    config = _parse(schema.PayloadConfig, members.text[config_file], config_file)
    with _named(config_file):
        _check(config, schema.PayloadConfig, _identifier)
    records: dict[tuple[str, torch.dtype], torch.Tensor] = {}
    found: Tensors = {}
    for name, meta in config.config.items():
        if meta.use_pickle or meta.tensor_meta is None:
            raise Refused(
                f"'{name}' is stored as a pickle, which can execute code; make it a plain tensor (no tensor subclass,"
                " no script object) and save the program again"
            )
        record = folder + meta.path_name
        if not re.fullmatch(prefix + r"\d+", meta.path_name) or record not in members.records:
            raise Refused(f"the record '{record}' of '{name}' is missing")
        dtype = _SERIALIZE_TO_TORCH_DTYPE.get(meta.tensor_meta.dtype)
        if dtype is None or meta.tensor_meta.layout != schema.Layout.Strided:
            raise Refused(f"'{name}' has an unknown dtype or is not a dense tensor")
        if (meta.path_name, dtype) not in records:
            offset, size = members.records[record]
            if size % dtype.itemsize:
                raise Refused(f"'{name}' has {size} bytes, which is no whole number of {dtype} elements")
            records[meta.path_name, dtype] = members.source.tensor(dtype, (size // dtype.itemsize,), offset)
        flat = records[meta.path_name, dtype]
        sizes, strides = _ints(meta.tensor_meta.sizes, name), _ints(meta.tensor_meta.strides, name)
        (offset,) = _ints([meta.tensor_meta.storage_offset], name)
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=False))
        numel = math.prod(sizes)
        if len(sizes) != len(strides) or (numel > flat.numel() and not hollow) or (numel > 0 and last >= flat.numel()):
            raise Refused(f"'{name}' has the shape {sizes}, which its {flat.numel()} stored elements do not fill")
        found[name] = (torch.as_strided(flat, sizes, strides, offset) if numel else flat.new_empty(sizes), meta)
    return found


def _ints(values: Iterable[schema.SymInt], name: str) -> tuple[int, ...]:
    found = tuple(v.value if v.type == "as_int" else -1 for v in values)
    if any(v < 0 or v >= 2**48 for v in found):
        raise Refused(f"'{name}' has no fixed shape")
    return found


# ---- what each string in a program may be


def _identifier(text: str) -> str | None:
    """Names of graph values become Python names in the code that torch.fx generates."""
    if text == "" or (re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) and not keyword.iskeyword(text)):
        return None
    return "is not a name"


def _tensor_name(text: str) -> str | None:
    """Names of parameters and buffers: layer paths. They become attribute paths in generated code."""
    parts = text.split(".")
    if all(re.fullmatch(r"[A-Za-z0-9_-]+", p) and not p.startswith("__") for p in parts):
        return None
    return "is not the name of a parameter (letters, digits, '_', '-' between dots)"


def _text(text: str) -> str | None:
    """String arguments of ops: modes ('floor', 'same') and einsum equations."""
    return None if re.fullmatch(r"[A-Za-z0-9_ ,.>-]{0,200}", text) else "is no mode or equation"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}")
FUNCTIONS = _words(
    "Symbol Integer Add Mul FloorDiv CeilDiv CleanDiv Mod PythonMod Max Min Identity ModularIndexing Equality Unequality"
    " LessThan StrictLessThan GreaterThan StrictGreaterThan And Or Not"
)
"""functions in the printed form of a shape expression; of powers, which could be huge, only those of a dimension (see POWERS)"""
POWERS = (2, 3, 4)
"""exponents that a dimension may have: attention has length x length scores"""


def _symbol(text: str) -> str | None:
    return None if SYMBOL.fullmatch(text) else "is not the name of a dimension"


def _expression(text: str) -> str | None:
    """Shape expressions are evaluated by sympify, so only nested calls of FUNCTIONS on small constants are accepted."""
    if not re.fullmatch(r"[A-Za-z0-9_(),=' -]{1,2000}", text):
        return "is not a shape expression of at most 2000 characters"
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "is not a shape expression"
    return None if _expression_ok(tree) else "is not a shape expression of dimensions, integers and their arithmetic"


def _expression_ok(tree: ast.expr) -> bool:
    if isinstance(tree, ast.Name):
        return tree.id in ("true", "false")
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in (*FUNCTIONS, "Pow")):
        return False
    if tree.func.id == "Pow":
        parts = [ast.unparse(a) for a in tree.args]
        symbol = len(parts) == 2 and parts[0].startswith("Symbol(") and not tree.keywords
        return symbol and parts[1] in [f"Integer({n})" for n in POWERS] and _expression_ok(tree.args[0])
    if tree.func.id == "Symbol":
        flags = all(
            k.arg and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool) for k in tree.keywords
        )
        name = tree.args[0] if len(tree.args) == 1 else None
        is_name = isinstance(name, ast.Constant) and isinstance(name.value, str) and SYMBOL.fullmatch(name.value)
        return flags and bool(is_name)
    if tree.func.id == "Integer":
        value = tree.args[0] if len(tree.args) == 1 and not tree.keywords else None
        if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
            value = value.operand
        return isinstance(value, ast.Constant) and type(value.value) is int and value.value < 2**62
    return not tree.keywords and all(_expression_ok(a) for a in tree.args)


SYM_OPS = _words(
    "_operator.eq _operator.ne _operator.le _operator.ge _operator.lt _operator.gt _operator.neg _operator.pos"
    " _operator.mul _operator.add _operator.sub _operator.floordiv _operator.mod _operator.and_ _operator.or_"
    " torch.sym_not torch.sym_int torch.sym_float torch.sym_ite torch.sym_max torch.sym_min"
)
"""arithmetic on shapes"""
INNER_OPS = _words(
    "_softmax _log_softmax _safe_softmax _to_copy _unsafe_view _native_batch_norm_legit_no_training _adaptive_avg_pool2d"
    " _assert_scalar _assert_tensor_metadata __and__ __or__ _scaled_dot_product_flash_attention_for_cpu _weight_norm"
    " _weight_norm_interface"
)
"""ATen ops with a leading underscore that programs contain; the others are internals of torch"""


def _target(text: str) -> str | None:
    """Operators: ATen and planish ops that exist, and arithmetic on shapes. Reading files (aten::from_file) is not one."""
    if text in SYM_OPS:
        return None
    if text.startswith("torch.ops.higher_order."):
        return "runs a graph within the graph (control flow, or torch.no_grad inside forward), which is not accepted"
    match = re.fullmatch(r"torch\.ops\.(aten|planish)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)", text)
    if match is None:
        return "is not an operator of torch.ops.aten or torch.ops.planish"
    space, name, overload = match.groups()
    if name == "from_file" or overload.startswith("__") or (name.startswith("_") and name not in INNER_OPS):
        return "is not an operator that a model needs"
    packet = getattr(getattr(torch.ops, space), name, None)
    if not isinstance(getattr(packet, overload, None), torch._ops.OpOverload):
        return f"does not exist in torch {torch.__version__}"
    return None


SEQUENCES = ("builtins.tuple", "builtins.list", "torch.fx.immutable_collections.immutable_list")
MAPPINGS = ("builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict")


def _treespec(text: str) -> str | None:
    """Nesting of inputs and outputs. Other containers name a module in their context, which torch would import."""
    wrong = "is not a nesting of tuples, lists and dicts"
    try:
        protocol, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return wrong
    return None if protocol == 1 and _treespec_ok(tree) else wrong


def _treespec_ok(tree: object) -> bool:
    if not isinstance(tree, dict) or set(tree) != {"type", "context", "children_spec"}:
        return False
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if not isinstance(children, list) or not all(_treespec_ok(c) for c in children):
        return False
    if kind is None:
        return context is None and not children
    if kind in SEQUENCES:
        return context == "null"
    if kind not in MAPPINGS or not isinstance(context, str):
        return False
    keys = json.loads(context)
    return isinstance(keys, list) and all(isinstance(k, str | int) for k in keys)


def _device(text: str) -> str | None:
    return None if text == "cpu" else "is no device for a saved program; move it to 'cpu' before torch.export.save"


def _one_of(*accepted: str) -> Rule:
    return lambda text: None if text in accepted else f"is not one of {', '.join(accepted)}"


def _pattern(pattern: str) -> Rule:
    return lambda text: None if re.fullmatch(pattern, text) else "is malformed"


RULES: dict[tuple[type, str], Rule] = {
    (schema.Node, "target"): _target,
    (schema.SymExpr, "expr_str"): _expression,
    (schema.Argument, "as_string"): _text,
    (schema.Argument, "as_strings"): _text,
    (schema.ConstantValue, "as_string"): _text,
    (schema.ModuleCallSignature, "in_spec"): _treespec,
    (schema.ModuleCallSignature, "out_spec"): _treespec,
    (schema.Device, "type"): _device,
    (schema.ExportedProgram, "verifiers"): _one_of("ATEN", "TRAINING"),
    (schema.ExportedProgram, "torch_version"): _pattern(r"[0-9A-Za-z.+]{1,60}"),
    (schema.ExportedProgram, "range_constraints"): _symbol,
    (schema.InputToParameterSpec, "parameter_name"): _tensor_name,
    (schema.InputToBufferSpec, "buffer_name"): _tensor_name,
    (schema.InputToTensorConstantSpec, "tensor_constant_name"): _tensor_name,
    (schema.BufferMutationSpec, "buffer_name"): _tensor_name,
    (schema.PayloadConfig, "config"): _tensor_name,
    (schema.PayloadMeta, "path_name"): _pattern(r"[a-z_]+\d+"),
}
"""the rule for the strings of a field (keys, for a mapping); every other string is a Python name"""
FORBIDDEN = {
    (schema.Argument, "as_graph"): "a graph within the graph",
    (schema.Argument, "as_operator"): "an operator as argument",
    (schema.Argument, "as_custom_obj"): "a custom class, which is stored as a pickle",
    (schema.InputSpec, "custom_obj"): "a custom class, which is stored as a pickle",
    (schema.InputSpec, "token"): "side effects",
    (schema.OutputSpec, "token"): "side effects",
}


@contextlib.contextmanager
def _named(member: str) -> typing.Iterator[None]:
    """Turn what malformed values raise inside the checks into Refused, naming the member."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
        raise Refused(f"{member} is malformed: {error!r:.150}") from None


def _check(value: Any, hint: Any, rule: Rule) -> None:
    """Check a value of torch's schema against its declared type, and every string in it against its rule."""
    hint = getattr(hint, "__origin__", hint) if typing.get_origin(hint) is typing.Annotated else hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            _check(value, args[0], rule)
    elif origin is list:
        _expect(isinstance(value, list), value, hint)
        for item in value:
            _check(item, args[0], rule)
    elif origin is dict:
        _expect(isinstance(value, dict), value, hint)
        for key, item in value.items():
            _check(key, str, rule)
            _check(item, args[1], rule)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        _expect(isinstance(value, hint), value, hint)
        hints = typing.get_type_hints(hint, globalns=dict(vars(schema)))
        names = [value.type] if isinstance(value, _Union) else [f.name for f in dataclasses.fields(hint)]
        for name in names:
            if (hint, name) in FORBIDDEN:
                raise Refused(f"it contains {FORBIDDEN[hint, name]}; a graph of tensor ops is accepted")
            _check(getattr(value, name), hints[name], RULES.get((hint, name), _identifier))
    elif hint is str:
        _expect(isinstance(value, str), value, hint)
        wrong = rule(value)
        if wrong:
            raise Refused(f"{value[:80]!r} {wrong}")
    elif hint is float:
        _expect(isinstance(value, int | float), value, hint)
    elif hint is bool:
        _expect(isinstance(value, bool), value, hint)
    else:  # int and the integer enums
        _expect(isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63, value, hint)


def _expect(right: bool, value: object, hint: object) -> None:
    if not right:
        raise Refused(f"{value!r:.60} stands where {getattr(hint, '__name__', hint)} belongs")
