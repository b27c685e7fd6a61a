"""A .pt2 file is data: every way in which torch.export.load would run its contents is refused, and nothing runs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import program_file
from planish.compress.model import Model, from_program, trace

Files = dict[str, bytes]
PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS, SAMPLES = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"


class Net(torch.nn.Module):
    """Parameters, buffers, a constant, a shape that depends on the batch, and a stack trace into this file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.linear = torch.nn.Linear(16, 2)
        self.register_buffer("gain", torch.ones(4, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(image))) * self.gain + torch.tensor(0.5)
        return self.linear(torch.nn.functional.adaptive_avg_pool2d(y, 2).view(image.shape[0], -1))


def model() -> Model:
    torch.manual_seed(0)
    return trace(Net(), {"image": torch.zeros(1, 3, 8, 8)}, "net")


@pytest.fixture(scope="module")
def plain() -> bytes:
    """What a user gets from torch.export.save: sample inputs, stack traces, module paths."""
    batch = {"image": {0: torch.export.Dim("batch", min=1)}}
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def unpack(archive: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {i.filename.split("/", 1)[1]: file.read(i) for i in file.infolist()}


def repack(files: Files, root: str = "archive", compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a duplicate name is one of the attacks
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for name, data in files.items():
                file.writestr(f"{root}/{name}", data)
    return buffer.getvalue()


def edit(archive: bytes, member: str, change: Callable[[Any], None]) -> bytes:
    files = unpack(archive)
    value = json.loads(files[member])
    change(value)
    files[member] = json.dumps(value).encode()
    return repack(files)


def flipped(archive: bytes, member: str) -> bytes:
    """The archive with one bit of a member's content changed."""
    place = archive.index(unpack(archive)[member])
    return archive[:place] + bytes([archive[place] ^ 1]) + archive[place + 1 :]


def put(path: tuple[Any, ...], new: Any) -> Callable[[Any], None]:
    """Set value[path[0]][path[1]]... = new."""

    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = new

    return change


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


GRAPH = ("graph_module", "graph")


def code(mark: Path) -> str:
    """Python source that creates the file, without any quote, slash or dot in it."""
    source = base64.b64encode(f"open({str(mark)!r},'w')".encode()).hex()
    return f"exec(__import__('base64').b64decode(bytes.fromhex('{source}')).decode())"


def pickled_weight(archive: bytes, mark: Path) -> bytes:
    files = unpack(edit(archive, WEIGHTS, put(("config", "conv.weight", "use_pickle"), True)))
    buffer = io.BytesIO()
    torch.save(Touch(mark), buffer)
    return repack({**files, "data/weights/weight_0": buffer.getvalue()})


def opaque_object(archive: bytes, mark: Path) -> bytes:
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    files = unpack(edit(archive, CONSTANTS, put(("config", "thing"), meta)))
    return repack({**files, "data/constants/opaque_obj_0": pickle.dumps(Touch(mark))})


def custom_object(archive: bytes, mark: Path) -> bytes:
    meta = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    return edit(archive, CONSTANTS, put(("config", "thing"), meta))


def legacy_weights(archive: bytes, mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Touch(mark), buffer)
    return repack({**unpack(archive), "data/weights/model.pt": buffer.getvalue()})


def shape_expression(archive: bytes, mark: Path) -> bytes:
    size = {"as_expr": {"expr_str": f"__import__('pathlib').Path({str(mark)!r}).touch()", "hint": None}}
    return edit(archive, PROGRAM, put((*GRAPH, "tensor_values", "image", "sizes", 0), size))


def node_name(archive: bytes, mark: Path) -> bytes:
    """The name of a graph value goes into generated source: a default argument runs when the function is made."""

    def change(program: Any) -> None:
        text = json.dumps(program).replace('"name": "image"', json.dumps({"name": evil})[1:-1])
        program.clear()
        program.update(json.loads(text))
        program["graph_module"]["graph"]["tensor_values"][evil] = values
        program["graph_module"]["module_call_graph"] = program["graph_module"]["module_call_graph"][:1]

    evil = f"image={code(mark)}"
    values = json.loads(unpack(archive)[PROGRAM])["graph_module"]["graph"]["tensor_values"]["image"]
    return edit(archive, PROGRAM, change)


def tree_spec(archive: bytes, mark: Path) -> bytes:
    """An enum in a tree spec names a module, which is imported: one that lies in the working directory, say."""
    context = json.dumps([{"__enum__": True, "fqn": "evil_module:E", "name": "A"}])
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": [leaf]}])
    (mark.parent / "evil_module.py").write_text(
        f"open({str(mark)!r}, 'w')\nimport enum\nclass E(enum.Enum):\n  A = 1\n"
    )
    return edit(archive, PROGRAM, put(("graph_module", "module_call_graph", 0, "signature", "out_spec"), spec))


REAL = [pickled_weight, opaque_object, legacy_weights, shape_expression, node_name, tree_spec]


@pytest.mark.parametrize("attack", [*REAL, custom_object])
def test_code_in_a_file_is_refused_and_not_run(
    attack: Callable[[bytes, Path], bytes], plain: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    mark, path = tmp_path / "ran", tmp_path / "model.pt2"
    path.write_bytes(attack(plain, mark))
    with pytest.raises(PlanishError, match="refused") as caught:
        program_file.load(path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", REAL)
def test_the_attacks_are_real(
    attack: Callable[[bytes, Path], bytes], plain: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own loader each of them runs: otherwise the test above would prove nothing."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip("checked against torch 2.13")
    monkeypatch.syspath_prepend(tmp_path)
    mark, path = tmp_path / "ran", tmp_path / "model.pt2"
    path.write_bytes(attack(plain, mark))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # what matters is whether it ran before it failed
            torch.export.load(path).module()
    sys.modules.pop("evil_module", None)
    assert mark.exists()


def test_sample_inputs_and_guards_are_not_read(plain: bytes, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "model.pt2"
    buffer = io.BytesIO()
    torch.save(Touch(mark), buffer)
    files = unpack(edit(plain, PROGRAM, put(("guards_code",), [code(mark)])))
    path.write_bytes(repack({**files, SAMPLES: buffer.getvalue(), "extra/notes.txt": b"hello"}))
    program = program_file.load(path)
    program.module()(torch.zeros(3, 3, 8, 8))
    assert not mark.exists()
    assert program.example_inputs is None
    assert not program._guards_code


@pytest.mark.parametrize(
    ("member", "path", "new", "words"),
    [
        (PROGRAM, (*GRAPH, "nodes", 0, "target"), "torch.ops.aten.from_file.default", "not an operator"),
        (PROGRAM, (*GRAPH, "nodes", 0, "target"), "torch.hub.load", "torch.ops.aten"),
        (PROGRAM, (*GRAPH, "nodes", 0, "target"), "torch.ops.other.op.default", "torch.ops.aten"),
        (PROGRAM, (*GRAPH, "nodes", 0, "target"), "torch.ops.aten.no_such_op.default", "does not exist"),
        (PROGRAM, (*GRAPH, "nodes", 0, "target"), "_operator.methodcaller", "torch.ops.aten"),
        (PROGRAM, (*GRAPH, "nodes", 0, "inputs", 0, "arg"), {"as_operator": "torch.hub.load"}, "operator as argument"),
        (PROGRAM, (*GRAPH, "nodes", 0, "inputs", 0, "name"), "x=1)\nimport os", "not a name"),
        (PROGRAM, (*GRAPH, "nodes", 0, "inputs", 0, "arg"), {"as_int": "1"}, "belongs"),
        (PROGRAM, (*GRAPH, "nodes", 0, "inputs", 0, "arg"), {"as_nothing": 1}, "schema"),
        (PROGRAM, (*GRAPH, "tensor_values", "image", "device", "type"), "cuda", "cpu"),
        (PROGRAM, ("range_constraints",), {"u999999999": {"min_val": 0, "max_val": 2}}, "dimension"),
        (PROGRAM, ("verifiers",), ["MINE"], "ATEN"),
        (
            PROGRAM,
            ("graph_module", "signature", "input_specs", 0, "parameter", "parameter_name"),
            'x"); f("',
            "parameter",
        ),
        (WEIGHTS, ("config", "conv.weight", "path_name"), "../../secret0", "malformed"),
        (WEIGHTS, ("config", "conv.weight", "path_name"), "weight_99", "missing"),
        (WEIGHTS, ("config", "conv.weight", "tensor_meta", "sizes", 0), {"as_int": 10**9}, "do not fill"),
        (WEIGHTS, ("config", "conv.weight", "tensor_meta", "storage_offset"), {"as_int": 10**6}, "do not fill"),
        (WEIGHTS, ("config", "conv.weight", "tensor_meta", "strides", 0), {"as_int": -1}, "fixed shape"),
        (WEIGHTS, ("config", "conv.weight", "tensor_meta", "dtype"), 99, "dtype"),
    ],
)
def test_a_forged_part_is_refused(
    member: str, path: tuple[Any, ...], new: Any, words: str, plain: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(edit(plain, member, put(path, new)))
    with pytest.raises(PlanishError, match=words) as caught:
        program_file.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "Symbol('s0').__class__",
        "Symbol('s0', positive=print())",
        "Symbol('__import__')",
        "Pow(Integer(10), Integer(1000000000))",
        "Pow(Symbol('s0'), Integer(1000000000))",
        "Pow(Symbol('s0'), Symbol('s1'))",
        "Pow(Add(Symbol('s0'), Integer(10)), Integer(2))",
        "Integer(" + "9" * 100 + ")",
        "s0",
        "(lambda: 1)()",
        "Add(*[1])",
        "Add(" * 400 + ")" * 400,
        "",
    ],
)
def test_shape_expressions_outside_the_grammar(text: str) -> None:
    assert program_file._expression(text)


def test_shape_expressions_that_torch_writes() -> None:
    assert program_file._expression("Symbol('s77', positive=True, integer=True)") is None
    assert program_file._expression("Add(Mul(Integer(-2), Symbol('s0', integer=True)), Integer(1))") is None
    assert program_file._expression("FloorDiv(Symbol('u0', integer=True), Integer(2))") is None
    assert program_file._expression("Mul(Integer(4), Pow(Symbol('s70', positive=True), Integer(2)))") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a[: len(a) // 2], "not a whole zip"),
        (lambda a: b"", "not a whole zip"),
        (lambda a: b"no zip at all", "not a whole zip"),
        (lambda a: repack(unpack(a) | {"../../escape.txt": b"x"}), "unexpected members"),
        (lambda a: repack(unpack(a), root=".."), "unexpected members"),
        (lambda a: repack(unpack(a) | {"data/aotinductor/model/x.so": b"x"}), "unexpected members"),
        (lambda a: repack(unpack(a), compression=zipfile.ZIP_DEFLATED), "compressed members"),
        (lambda a: repack({k: v for k, v in unpack(a).items() if k != PROGRAM}), "missing"),
        (lambda a: repack(unpack(a) | {PROGRAM: b"{"}), "schema"),
        (lambda a: repack(unpack(a) | {PROGRAM: b"[" * 100_000}), "schema"),
        (lambda a: repack(unpack(a) | {"archive_format": b"zip"}), "not a pt2"),
        (lambda a: repack(unpack(a) | {"byteorder": b"big"}), "big-endian"),
        (lambda a: repack(unpack(a) | {"data/weights/weight_0": b"123"}), "whole number"),
        (lambda a: flipped(a, "data/weights/weight_0"), "bad check sum of 'archive/data/weights/weight_0'"),
    ],
)
def test_a_damaged_or_foreign_archive_is_refused(
    change: Callable[[bytes], bytes], words: str, plain: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(change(plain))
    with pytest.raises(PlanishError, match=words) as caught:
        program_file.load(file)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


def test_a_member_that_occurs_twice_is_refused(plain: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(buffer, "a") as file:
            name = file.namelist()[0]
            file.writestr(name, b"other")
    (tmp_path / "model.pt2").write_bytes(buffer.getvalue())
    with pytest.raises(PlanishError, match="twice"):
        program_file.load(tmp_path / "model.pt2")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="cannot be read"):
        program_file.load(tmp_path / "none.pt2")


def test_a_graph_that_contradicts_itself(plain: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(
        edit(plain, PROGRAM, put((*GRAPH, "nodes", 0, "inputs", 0, "arg", "as_tensor", "name"), "nowhere"))
    )
    with pytest.raises(PlanishError, match="not consistent") as caught:
        program_file.load(file)
    assert "\n" not in str(caught.value)


def test_what_is_saved_computes_the_same(tmp_path: Path) -> None:
    before = model()
    program_file.save(before.program(), tmp_path / "model.pt2")
    after = from_program(program_file.load(tmp_path / "model.pt2"), None, "net")
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(after(x), before(x))  # pyright: ignore[reportArgumentType]
    assert after.inputs == before.inputs
    assert after.batched
    assert dict(after.graph.named_parameters()).keys() == dict(before.graph.named_parameters()).keys()


def test_a_plain_torch_file_loads(plain: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(plain)
    loaded = from_program(program_file.load(tmp_path / "model.pt2"), None, "net")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), model()(x))  # pyright: ignore[reportArgumentType]


def test_torch_itself_reads_what_is_saved(tmp_path: Path) -> None:
    program_file.save(model().program(), tmp_path / "model.pt2")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model()(x))  # pyright: ignore


def test_a_program_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = x * 2
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (y,))

    program = torch.export.export(Branch(), (torch.ones(2),))
    with pytest.raises(PlanishError, match=r"cannot be written: .* runs a graph within the graph"):
        program_file.save(program, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


def test_bytes_hold_no_path_and_no_sample(tmp_path: Path) -> None:
    program_file.save(model().program(), tmp_path / "a.pt2")
    program_file.save(model().program(), tmp_path / "another_name.pt2")
    data = (tmp_path / "a.pt2").read_bytes()
    assert data == (tmp_path / "another_name.pt2").read_bytes()
    for text in (str(Path(__file__).parent), Path(__file__).name, "site-packages", "stack_trace", str(tmp_path)):
        assert text.encode() not in data
    assert unpack(data)[SAMPLES] == b""


def test_a_view_of_a_larger_tensor_is_saved_alone(tmp_path: Path) -> None:
    """Pruned weights may be slices; the removed part must not travel along."""
    layer = torch.nn.Linear(64, 4)
    layer.weight = torch.nn.Parameter(torch.full((64, 64), 7.0)[:4])
    before = trace(layer, {"input": torch.zeros(1, 64)}, "net")
    program_file.save(before.program(), tmp_path / "model.pt2")
    records = {k: v for k, v in unpack((tmp_path / "model.pt2").read_bytes()).items() if "weights/weight_" in k}
    assert sorted(len(v) for v in records.values()) == [16, 1024]
    x = torch.randn(2, 64)
    after = from_program(program_file.load(tmp_path / "model.pt2"), None, "net")
    assert torch.equal(after(x), before(x))  # pyright: ignore[reportArgumentType]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(8, 8, bias=False)
            self.b = torch.nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    program_file.save(trace(Tied(), {"x": torch.zeros(1, 8)}, "net").program(), tmp_path / "model.pt2")
    records = [k for k in unpack((tmp_path / "model.pt2").read_bytes()) if "weights/weight_" in k]
    assert len(records) == 1


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import test_program_file as t
t.program_file.save(t.model().program(), Path({out!r}))
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    outs = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.pt2"
        script = SCRIPT.format(folder=str(Path(__file__).parent), out=str(out))
        subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]


def test_an_expanded_tensor_is_written_out(tmp_path: Path) -> None:
    """A stored shape is filled by stored elements, so that a small file cannot ask for a huge tensor."""

    class Expanded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.tensor(3.0).expand(4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    before = trace(Expanded(), {"x": torch.zeros(1, 5)}, "net")
    program_file.save(before.program(), tmp_path / "model.pt2")
    assert [len(v) for k, v in unpack((tmp_path / "model.pt2").read_bytes()).items() if "weights/weight_" in k] == [80]
    program, _ = program_file.open_mapped(tmp_path / "model.pt2")
    assert torch.equal(program.state_dict["gain"], torch.full((4, 5), 3.0))


def test_tensors_are_read_where_they_stand(tmp_path: Path) -> None:
    layer = torch.nn.Linear(8, 4)
    program_file.save(trace(layer, {"input": torch.zeros(1, 8)}, "net").program(), tmp_path / "model.pt2")
    program, mapped = program_file.open_mapped(tmp_path / "model.pt2")
    assert isinstance(program.state_dict["weight"], torch.nn.Parameter)
    with torch.no_grad():
        program.state_dict["weight"].zero_()  # a page of our own, dropped by `release`: the file has not changed
    mapped.release()
    assert torch.equal(program.state_dict["weight"], layer.weight)
    assert torch.equal(program_file.load(tmp_path / "model.pt2").state_dict["weight"], layer.weight)


def test_checking_reads_no_tensor() -> None:
    class Shaped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1 << 20, 1 << 12))  # 16 GB of address space, no memory

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    program_file.check(trace(Shaped(), {"x": torch.zeros(1, 1 << 12)}, "net").program(), "net")
