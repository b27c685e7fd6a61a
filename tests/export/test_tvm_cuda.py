"""Format tvm for NVIDIA GPUs, without one: artifacts are whole, equal twice, and give the reference's numbers on a stand-in device.

The stand-in (cuda_stub/) is CUDA's driver made of host memory: TVM's own CUDA runtime loads the artifact and launches its kernels there,
Triton's are run by Triton's interpreter and TVM's as plain loops. So everything but the machine code of the kernels is executed.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish.common.errors import Missing, PlanishError
from planish.compress import recipe as recipes
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.export import artifact, tvm_cuda, tvm_cuda_code, tvm_cuda_triton
from planish.export import fused as fused_nodes
from planish.export.format import Source
from planish.export.lowering import lowered, to_onnx
from planish.export.tvm import LIBRARY, Tvm
from planish.kernels import fused, linear_svd, packing
from planish.kernels.gpu import core as cores
from planish.kernels.gpu import op as gpu
from planish.runtimes.tvm import Tvm as Runtime
from planish.targets import target
from torch import nn

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed")

from planish.kernels.triton import record  # noqa: E402  # imports Triton

STUB = Path(__file__).parent / "cuda_stub"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def w4(channels, out, seed=0):
    """Tensors and attributes of linear_wna16, 4 bits in groups of 64."""
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 16, (out, channels)).astype(np.uint8))
    scale = torch.from_numpy(rng.uniform(0.01, 0.02, (out, channels // 64)).astype(np.float32))
    tensors = {"codes": packing.pack(codes, 4, 64), "scale": scale, "bias": normal(out, seed=seed)}
    return "linear_wna16", tensors, {"bits": 4, "group": 64}


def svd(channels, out, seed=0):
    """Of linear_svd, 4 bits with activations of 8, rank 32."""
    codes, scale = linear_svd.quantize_residual(normal(out, channels, seed=seed), 4, 64)
    down, up = normal(32, channels, seed=seed + 1).half(), normal(out, 32, seed=seed + 2).half()
    smooth = 0.5 + torch.rand(channels, generator=torch.Generator().manual_seed(seed))
    tensors = {"codes": codes, "scale": scale, "smooth": smooth, "down": down, "up": up, "bias": normal(out, seed=seed)}
    attributes = {"bits": 4, "group": 64, "activation_bits": 8, "shift": 0.0, "unsigned": 0}
    return "linear_svd", tensors, attributes


def network(layers, batch=(1, 5)):
    """An ONNX graph: the layers one after another with a Relu between them, and the input added to the end where it fits."""
    nodes, constants, value = [], [], "x"
    for i, (op, tensors, attributes) in enumerate(layers):
        schema = getattr(torch.ops.planish, op).default._schema
        names = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
        inputs = [value, *(f"l{i}.{n}" if n in tensors else "" for n in names[1:])]
        nodes.append(helper.make_node(op, inputs, [f"y{i}"], name=f"l{i}", domain="planish", **attributes))
        constants += [numpy_helper.from_array(t.numpy(), f"l{i}.{n}") for n, t in tensors.items()]
        value = f"y{i}"
        if i + 1 < len(layers):
            nodes.append(helper.make_node("Relu", [value], [f"r{i}"], name=f"r{i}"))
            value = f"r{i}"
    channels = packing_columns(layers[0])
    nodes.append(helper.make_node("Neg", [value], ["y"], name="neg"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *batch[1:], channels])
    y = helper.make_empty_tensor_value_info("y")
    y.type.tensor_type.elem_type = TensorProto.FLOAT
    made = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("planish", 1)], ir_version=10
    )


def packing_columns(layer):
    _, tensors, attributes = layer
    return tensors["scale"].shape[1] * attributes["group"]


def source(layers, batch=(1, 5)):
    fused.ops()
    graph = network(layers, batch)
    x = normal(2, *batch[1:], packing_columns(layers[0]), seed=9).numpy()
    return Source(lowered(graph), {"x": x}, "model", fused=graph)


def compressed(recipe):
    """Two layers after a bundled recipe."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64))
    model = trace(layers, {"x": torch.zeros(1, 128)}, "net")
    data = Data({"x": normal(32, 128, seed=9).numpy()}, None, "random")
    generator = torch.Generator().manual_seed(0)
    for _, step in recipes.load(recipe).passes:
        model = step.apply(model, Context(model, data, target.load("host"), generator))
    graph = to_onnx(model, lower=False)
    return Source(lowered(graph), {"x": data.inputs["x"][:2]}, "model", fused=graph)


def write(layers, folder, core="cuda-sm90"):
    """An artifact's folder with what the runtime reads of its manifest."""
    folder.mkdir()
    given = compressed(layers) if isinstance(layers, str) else source(layers)
    written = Tvm().write(given, target.load(core), folder)
    manifest = {
        "format": "tvm",
        "format_version": 1,
        "target": core,
        "inputs": written.inputs,
        "outputs": written.outputs,
        "details": dict(written.details),
        "files": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return given, written


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """The stand-in for CUDA: one library under the names of the driver and the runtime library."""
    if sys.platform != "linux":
        pytest.skip("the stand-in for CUDA is for Linux")
    folder = tmp_path_factory.mktemp("cuda")
    made = folder / "libcuda.so.1"
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(STUB / "cuda.c")]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "libcudart.so.13").symlink_to(made.name)
    return folder


def on_stub(stub, layers, tmp_path, monkeypatch):
    """(what the artifact gives on the stand-in, its log, the source, what was written)."""
    seen = {}
    original, devices, scheduled = record.record, tvm_cuda_code.device_functions, tvm_cuda.schedule

    def interpreted(op, run, arguments, core):
        return original(op, run, arguments, core, interpreted=True)

    def functions(module):
        seen["device"] = module
        return devices(module)

    def unscheduled(module, core, triple):
        seen["loops"] = dict(module.functions_items())  # the module itself is changed in place
        return scheduled(module, core, triple)

    monkeypatch.setattr(record, "record", interpreted)
    monkeypatch.setattr(tvm_cuda_code, "device_functions", functions)
    monkeypatch.setattr(tvm_cuda, "schedule", unscheduled)
    compile_model, kept = tvm_cuda.compile_model, {}

    def keep(*arguments):
        kept["compiled"] = compile_model(*arguments)
        return kept["compiled"]

    monkeypatch.setattr(tvm_cuda, "compile_model", keep)
    given, written = write(layers, tmp_path / "artifact")
    sites = kept["compiled"].carrier.sites
    variants = [launch.variant for s in sites for launch in s.program.launches]
    job = {
        "stub": str(stub / "libcuda.so.1"),
        "artifact": str(tmp_path / "artifact"),
        "triton": {tvm_cuda_triton.kernel_name(v): dataclasses.asdict(v) for v in variants},
        "inputs": str(tmp_path / "inputs.npz"),
        "outputs": str(tmp_path / "outputs.npz"),
        "log": str(tmp_path / "log.json"),
        **plain_loops(seen, {s.function for s in sites}, tmp_path),
    }
    np.savez(tmp_path / "inputs.npz", **given.golden_inputs)
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(STUB / "run.py"), str(tmp_path / "job.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((tmp_path / "log.json").read_text())
    assert not [e for e in log["launches"] if "error" in e], log["launches"]
    return dict(np.load(tmp_path / "outputs.npz")), log, given, written


def plain_loops(seen, carried, folder):
    """TVM's kernels before they were scheduled, as a library for the CPU, and how a launch's arguments are theirs."""
    loops, kernels = {}, {}
    for variable, function in seen["loops"].items():
        if isinstance(function, tvm.tirx.PrimFunc) and variable.name_hint not in carried:
            loops[variable.name_hint] = function.without_attr("op_pattern").with_attr(
                "global_symbol", variable.name_hint
            )
    for _, function in seen["device"].functions_items():
        kernel = str(function.attrs["global_symbol"])
        name = kernel.removesuffix("_kernel")
        parameters = [str(p.name).removesuffix("_ptr") for p in function.params]
        buffers = list(loops[name].params)
        kernels[kernel] = {
            "function": name,
            "places": [parameters.index(str(b.name)) for b in buffers],
            "shapes": [[int(d) for d in b.shape] for b in buffers],
            "dtypes": [str(b.dtype) for b in buffers],
        }
    if not loops:
        return {"loops": None, "plain": {}}
    library = folder / "loops.so"
    tvm.compile(tvm.IRModule(loops), target=tvm.target.Target("llvm")).export_library(str(library))
    return {"loops": str(library), "plain": kernels}


TWO = [w4(128, 64), w4(64, 40, 3)]


@pytest.mark.parametrize("layers", [TWO, [svd(128, 64)], "llm-int8"], ids=["w4a16", "svd", "llm-int8"])
def test_an_artifact_gives_the_reference_on_a_stand_in_device(stub, layers, tmp_path, monkeypatch):
    found, log, _, written = on_stub(stub, layers, tmp_path, monkeypatch)
    assert log["same"]
    for name, want in written.answers.items():
        if want.dtype.kind == "i":  # a count, which starts at zero in every run
            np.testing.assert_array_equal(found[name], want)
            continue
        error = float(np.abs(found[name] - want).max())
        unit = np.abs(want).max() * 2.0**-9  # one code of an activation, or float16 twice
        assert error <= min(written.max_error, unit + 2 * written.details["rounding_of_activations"])
    called = [launch["kernel"] for row in written.details["kernels"] for launch in row.get("launches", [])]
    assert set(called) <= {e["kernel"] for e in log["launches"]}
    used = {k["name"]: k for k in written.details["triton"]}
    for entry in log["launches"]:
        if entry["kernel"] in used:
            assert entry["block"] == [used[entry["kernel"]]["threads"], 1, 1]
            assert entry["shared"] == used[entry["kernel"]]["shared_bytes"]


def test_an_artifact_is_whole_and_the_same_twice(tmp_path):
    _, written = write(TWO, tmp_path / "first")
    write(TWO, tmp_path / "second")
    library = (tmp_path / "first" / LIBRARY).read_bytes()
    assert library == (tmp_path / "second" / LIBRARY).read_bytes()
    assert str(Path(tvm_cuda.__file__).parents[1]).encode() not in library, "no path of this machine"
    kernels = [k["name"] for k in written.details["triton"]]
    assert len(kernels) >= 2
    assert all(k["spills"] == 0 for k in written.details["triton"])
    modules = carried(library)
    assert sorted(n for names, _ in modules for n in names if n in kernels) == sorted(kernels)
    for names, cubin in modules:
        (tmp_path / "module.cubin").write_bytes(cubin)
        shown = subprocess.run(
            [str(tvm_cuda_code.tools() / "bin/cuobjdump"), "--dump-resource-usage", str(tmp_path / "module.cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert sorted(re.findall(r"Function (\w+):", shown)) == sorted(names)
    assert [c["layer"] for c in written.details["calls"] if c["layer"]] == ["l0", "l1"]


def carried(library):
    """[(names of kernels, cubin)] of the modules of kind cuda in a library (layout: export/tvm_cuda_code.py)."""
    kind, found = b"\x05\0\0\0\0\0\0\0cubin", []
    place = 0

    def number():
        nonlocal place
        place += 8
        return int.from_bytes(library[place - 8 : place], "little")

    def text():
        nonlocal place
        size = number()
        place += size
        return library[place - size : place]

    def skip(size):
        nonlocal place
        place += size

    while (at := library.find(kind, place)) >= 0:
        place = at + len(kind)
        names = []
        for _ in range(number()):
            names.append(text().decode())
            text()
            skip(4 * number())  # types of arguments
            for _ in range(number()):
                text()  # launch parameters
            skip(4 * number())  # tags of arguments
        found.append((names, text()))
    return found


def test_an_artifact_opened_without_a_gpu_says_so_in_one_line(tmp_path):
    if tvm.cuda(0).exist:
        pytest.skip("this machine has a GPU")
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / LIBRARY).write_bytes(b"")
    io = [{"name": "x", "shape": [1, 4], "dtype": "float32"}]
    manifest = {"format": "tvm", "format_version": 1, "target": "cuda-sm90", "inputs": io, "outputs": io, "files": {}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "details": {"core": "sm_90"}}))
    with pytest.raises(
        Missing, match=r"compiled for an NVIDIA GPU \(sm_90\); TVM finds none on this machine"
    ) as caught:
        Runtime().open(artifact.load(folder), 1)
    assert "\n" not in str(caught.value)


def floats():
    """A float network with what TVM schedules in every way: a product, a softmax with barriers, exponentials."""
    weight = numpy_helper.from_array(normal(48, 24, seed=2).numpy(), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Softmax", ["a"], ["b"], name="softmax", axis=-1),
        helper.make_node("Sigmoid", ["b"], ["c"], name="sigmoid"),
        helper.make_node("Erf", ["c"], ["y"], name="erf"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 7, 48])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 7, 24])
    made = helper.make_graph(nodes, "g", [x], [y], [weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_tvms_own_kernels_are_kernels_of_known_blocks_with_barriers(tmp_path, monkeypatch):
    seen = []
    assemble = tvm_cuda_code.assemble

    def keep(ptx, core, what):
        seen.append(ptx)
        return assemble(ptx, core, what)

    monkeypatch.setattr(tvm_cuda_code, "assemble", keep)
    given = Source(floats(), {"x": normal(2, 7, 48).numpy()}, "model")
    written = Tvm().write(given, target.load("cuda-sm80"), tmp_path)
    (ptx,) = seen
    assert len(re.findall(r"\.visible \.entry", ptx)) == len(re.findall(r"\.reqntid", ptx)) >= 2
    assert "bar.sync" in ptx or "barrier" in ptx
    assert not re.search(r"call\.uni[^;]*__nv_", ptx), "functions of the mathematical library are linked in"
    assert any("without tensor cores" in w for w in written.warnings)
    assert (tmp_path / LIBRARY).stat().st_size > 0


def test_a_layer_that_no_kernel_takes_is_decoded_and_said(tmp_path):
    op, tensors, attributes = "linear_wna16", *w4(128, 24)[1:]
    codes = torch.zeros(24, 120, dtype=torch.uint8) + 9
    tensors = {"codes": packing.pack(codes, 4, 24), "scale": torch.full((24, 5), 0.01), "bias": tensors["bias"]}
    layers = [(op, tensors, {**attributes, "group": 24})]
    reason = gpu.ops()[op].refuses(gpu.Layer(op, "l0", tensors, layers[0][2]), cores.core("sm_90"))
    assert reason is not None
    given = source(layers)
    written = Tvm().write(given, target.load("cuda-sm90"), tmp_path)
    assert written.details["plain"] == {"l0": reason}
    assert any("no Triton kernel takes the layer" in w for w in written.warnings)


def test_a_target_that_no_kernel_is_compiled_for_is_refused(tmp_path):
    old = target.load("cuda-sm90").model_copy(update={"core": "sm_70"})
    with pytest.raises(PlanishError, match="no GPU kernels for 'sm_70'"):
        Tvm().write(source([w4(64, 16)]), old, tmp_path)


def test_modules_are_added_below_the_librarys_own_code():
    tree, modules = [[1], []], [("relax.VMExecutable", b"abc"), ("_lib", b"")]
    blob = tvm_cuda_code.pack(tree, modules)
    assert tvm_cuda_code.unpack(blob) == (tree, modules)
    grown = tvm_cuda_code.with_modules(blob, [b"one", b"two"])
    assert tvm_cuda_code.unpack(grown) == ([[1], [2, 3], [], []], [*modules, ("cuda", b"one"), ("cuda", b"two")])


@pytest.mark.parametrize(
    "recipe", ["w4a16-rtn", "w8-dynamic", "llm-int8", "fp8", "nf4", "svdquant-w4a4", "ovp-w4a4", "sparse-2of4"]
)
def test_launches_recorded_of_a_layer_compute_it(recipe):
    graph = compressed(recipe).fused.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    core, seen = cores.core("sm_90"), 0
    for node in graph.node:
        if not node.op_type.startswith("linear_"):
            continue
        call = fused_nodes.call(node)
        tensors = {k: torch.from_numpy(constants[v].copy()) for k, v in call.tensors.items() if k != "x"}
        layer = gpu.Layer(node.op_type, node.name, tensors, call.attributes)
        op = gpu.ops()[node.op_type]
        assert op.refuses(layer, core) is None
        x = normal(5, 96 if seen else 128, seed=4).half()
        arguments = tvm_cuda_triton._arguments(node.op_type, x, layer, op.pack(layer, core))
        want = getattr(torch.ops.planish, f"gpu_{node.op_type}")(*arguments.values())
        want = want[0] if isinstance(want, tuple) else want
        program = record.record(node.op_type, gpu.kernel(node.op_type).run, arguments, core, interpreted=True)
        found = record.replay(program, arguments)[0]
        assert (found.float() - want.float()).abs().max() <= 2.0**-9 * want.float().abs().max()
        seen += 1
    assert seen == 2


def test_a_program_is_recorded_and_zeroes_what_must_be_zero():
    from planish.kernels.triton import zero
    from planish.kernels.triton.config import Config, launch

    def run(x):
        y, counts = torch.empty_like(x), torch.zeros(100, dtype=torch.int32)
        launch(zero.fill, (1,), Config("fill"), y.view(torch.uint8), y.numel() * 4, BLOCK=64)
        launch(zero.fill, (1,), Config("fill"), counts[40:].view(torch.uint8), 4, BLOCK=64)
        return y

    program = record.record("test", run, {"x": torch.ones(4, 4)}, cores.core("sm_90"), interpreted=True)
    assert [b.zeroed for b in program.buffers] == [False, True]
    assert [launch.arguments[0] for launch in program.launches] == [
        record.Pointer("temporary1", 0),
        record.Pointer("temporary0", 0),
        record.Pointer("temporary1", 160),
    ]
    (y,) = record.replay(program, {"x": torch.ones(4, 4)})
    assert torch.equal(y, torch.zeros(4, 4))


@pytest.mark.parametrize("step", [lambda x: x + 1, lambda x: x.clone(), lambda x: torch.empty_like(x).zero_()])
def test_torch_between_kernels_is_refused(step):
    with pytest.raises(PlanishError, match="torch computes"):
        record.record("test", step, {"x": torch.ones(4)}, cores.core("sm_90"))
