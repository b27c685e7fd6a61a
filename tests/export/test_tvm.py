"""The tvm format: right numbers, a schedule for every product, equal bytes, and one clear line for what it cannot do."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from planish.common.errors import PlanishError
from planish.export import tuning, tvm_import, tvm_schedule, tvm_weights
from planish.export.format import Source
from planish.export.lowering import to_onnx
from planish.export.tvm import Tvm, compile_model
from planish.export.tvm_schedule import Tiling, VectorUnit, Workload
from planish.kernels import affine
from planish.runtimes import ort
from planish.runtimes.tvm import bound_main
from planish.targets import target

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed")
_ = affine  # its import defines planish::quantize, which to_onnx looks up

HOST = target.load("host")
UNITS = [VectorUnit(16, 32), VectorUnit(8, 16), VectorUnit(4, 32)]


def model(nodes, inputs, outputs, constants):
    """An ONNX model; inputs and outputs are {name: (type, shape)}."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return made


def host_outputs(proto, feeds, records=None, plain=False):
    """The compiled model's outputs on this machine for one sample."""
    from tvm import relax

    compiled = compile_model(tvm_import.fix_batch(proto), HOST, records or {}, plain)
    return answered(bound_main(relax.VirtualMachine(compiled.executable, tvm.cpu())), feeds)


def answered(main, feeds):
    """The outputs of a loaded model for one sample."""
    value = main(*(tvm.runtime.tensor(v) for v in feeds.values()))
    return [v.numpy() for v in ([value] if hasattr(value, "numpy") else value)]


def onnx_outputs(proto, feeds):
    return ort.create(proto.SerializeToString(), 1).run(None, feeds)


def convolution(channels=(5, 13), size=9, kernel=3, stride=1, group=1, seed=0):
    rng = np.random.default_rng(seed)
    inputs, outputs = channels
    weights = rng.standard_normal((outputs, inputs // group, kernel, kernel)).astype(np.float32)
    nodes = [
        helper.make_node(
            "Conv", ["x", "w", "b"], ["c"], pads=[kernel // 2] * 4, strides=[stride, stride], group=group, name="conv"
        ),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    made = model(
        nodes,
        {"x": (TensorProto.FLOAT, ["n", inputs, size, size])},
        {"y": (TensorProto.FLOAT, None)},
        {"w": weights, "b": rng.standard_normal(outputs).astype(np.float32)},
    )
    return made, {"x": rng.standard_normal((1, inputs, size, size)).astype(np.float32)}


def quantized_product(op, seed, large=False):
    """dequantize -> op -> quantize with per-channel weights; codes in, codes out."""
    rng = np.random.default_rng(seed)
    k, n = (700 if large else 24), 12
    x_shape = {"Conv": (1, 8, 7, 7), "Depthwise": (1, 8, 7, 7)}.get(op, (1, k))
    w_shape = {"Conv": (n, 8, 3, 3), "Depthwise": (8, 1, 3, 3), "Gemm": (n, k), "MatMul": (k, n)}[op]
    axis = 1 if op == "MatMul" else 0
    x_scale, w_scale = np.float32(0.013), rng.uniform(0.001, 0.02, w_shape[axis]).astype(np.float32)
    low, high = (100, 128) if large else (-127, 128)
    constants = {
        "xs": x_scale,
        "xz": np.uint8(0 if large else 117),
        "ys": np.float32(k * 0.02),
        "yz": np.uint8(101),
        "w": rng.integers(low, high, w_shape).astype(np.int8),
        "ws": w_scale,
        "wz": np.zeros(w_shape[axis], np.int8),
        "b": rng.integers(-3000, 3000, w_shape[axis]).astype(np.int32),
        "bs": (x_scale * w_scale).astype(np.float32),
        "bz": np.zeros(w_shape[axis], np.int32),
    }
    attributes = {"Conv": {"pads": [1] * 4}, "Depthwise": {"pads": [1] * 4, "group": 8}, "Gemm": {"transB": 1}}
    names = ["xf", "wf"] if op == "MatMul" else ["xf", "wf", "bf"]
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=axis),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bf"], axis=0),
        helper.make_node("Conv" if op == "Depthwise" else op, names, ["yf"], name="product", **attributes.get(op, {})),
        helper.make_node("Relu", ["yf"], ["yr"]),
        helper.make_node("QuantizeLinear", ["yr", "ys", "yz"], ["y"]),
    ]
    used = constants if op != "MatMul" else {n: v for n, v in constants.items() if n not in ("b", "bs", "bz")}
    made = model(
        [n for n in nodes if n.output[0] != "bf" or op != "MatMul"],
        {"x": (TensorProto.UINT8, list(x_shape))},
        {"y": (TensorProto.UINT8, None)},
        used,
    )
    return made, {"x": rng.integers(200 if large else 0, 256, x_shape).astype(np.uint8)}


@pytest.mark.parametrize(
    "shape", [{}, {"channels": (8, 8), "group": 8}, {"channels": (3, 24), "stride": 2, "kernel": 5}]
)
def test_float_convolution_is_onnx_runtimes(shape):
    proto, feeds = convolution(**shape)
    (want,) = onnx_outputs(proto, feeds)
    (got,) = host_outputs(proto, feeds)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_every_tiling_computes_the_same(unit):
    proto, _ = convolution(channels=(4, 24), size=6)
    ir = tvm_import.to_relax(tvm_import.fix_batch(proto)).module
    function = next(f for _, f in ir.functions_items() if (w := _workload(f)) is not None and w.macs)
    work = _workload(function)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([int(d) for d in p.shape]).astype(np.float32) for p in function.params]
    results = []
    for tiling in tvm_schedule.tilings(work, unit, 5, seed=1):
        kernel = tvm_schedule.tile(function, unit, tiling).with_attr("global_symbol", "main")
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        tvm.compile(tvm.IRModule({"main": kernel}), target=tvm.target.Target("llvm"))["main"](*tensors)
        results.append(tensors[-1].numpy())
    assert len(results) == 5
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-4)


def _workload(function):
    return tvm_schedule.workload(function) if hasattr(function, "body") and hasattr(function.body, "block") else None


@pytest.mark.parametrize("op", ["Conv", "Depthwise", "Gemm", "MatMul"])
def test_quantized_products_obey_the_integer_contract(op):
    for seed in range(3):
        proto, feeds = quantized_product(op, seed)
        (layer,) = tvm_import.whole_numbers(tvm_import.fix_batch(proto)).layers
        assert layer.arithmetic == "exact integers in float32"
        (want,) = onnx_outputs(proto, feeds)
        (got,) = host_outputs(proto, feeds)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_sums_that_may_leave_24_bits_are_said_to_be_float():
    proto, feeds = quantized_product("Gemm", 0, large=True)
    (layer,) = tvm_import.whole_numbers(tvm_import.fix_batch(proto)).layers
    assert layer.arithmetic == "float32"
    assert layer.largest_sum is not None
    assert layer.largest_sum >= tvm_import.EXACT
    (want,), (got,) = onnx_outputs(proto, feeds), host_outputs(proto, feeds)
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


def test_quantized_add_is_onnx_runtimes():
    rng = np.random.default_rng(0)
    x = {n: rng.integers(0, 256, (1, 16, 40, 40)).astype(np.uint8) for n in "ab"}
    grids = {"a": (0.021, 13), "b": (0.0137, 140), "y": (0.03, 77)}
    constants = {f"{n}s": np.float32(s) for n, (s, _) in grids.items()}
    constants |= {f"{n}z": np.uint8(z) for n, (_, z) in grids.items()}
    nodes = [helper.make_node("DequantizeLinear", [n, f"{n}s", f"{n}z"], [f"{n}f"]) for n in "ab"]
    nodes += [
        helper.make_node("Add", ["af", "bf"], ["yf"], name="add"),
        helper.make_node("QuantizeLinear", ["yf", "ys", "yz"], ["y"]),
    ]
    shape = list(x["a"].shape)
    proto = model(nodes, {n: (TensorProto.UINT8, shape) for n in "ab"}, {"y": (TensorProto.UINT8, None)}, constants)
    (want,), (got,) = onnx_outputs(proto, x), host_outputs(proto, x)
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
    if "avx2" in HOST.features:  # the formula's fused multiply-adds exist on both sides
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("op", ["AveragePool", "GlobalAveragePool"])
def test_quantized_means_are_onnx_runtimes(op):
    rng = np.random.default_rng(0)
    constants = {"xs": np.float32(0.0117), "xz": np.uint8(3), "ys": np.float32(0.0043), "yz": np.uint8(19)}
    attributes = {"kernel_shape": [8, 8]} if op == "AveragePool" else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]),
        helper.make_node(op, ["xf"], ["yf"], name="mean", **attributes),
        helper.make_node("QuantizeLinear", ["yf", "ys", "yz"], ["y"]),
    ]
    shape = [1, 2048, 8, 8]
    proto = model(nodes, {"x": (TensorProto.UINT8, shape)}, {"y": (TensorProto.UINT8, None)}, constants)
    feeds = {"x": rng.integers(0, 100, shape).astype(np.uint8)}
    (layer,) = tvm_import.whole_numbers(tvm_import.fix_batch(proto)).layers
    assert layer.arithmetic == "exact integers in float32"
    np.testing.assert_array_equal(host_outputs(proto, feeds)[0], onnx_outputs(proto, feeds)[0])


@pytest.fixture(scope="module")
def network(quantized, images, tmp_path_factory):
    """The quantized network as ONNX, its golden samples, and what the format wrote into a folder."""
    proto, folder = to_onnx(quantized), tmp_path_factory.mktemp("network")
    golden = {"image": images.inputs["image"][:8]}
    return proto, golden, Tvm().write(Source(proto, golden, "net"), HOST, folder), folder


@pytest.fixture(scope="module")
def residual_network(residual, tmp_path_factory):
    """The same of the float network: (ONNX, what was written)."""
    proto = to_onnx(residual)
    return proto, Tvm().write(Source(proto, {}, "net"), HOST, tmp_path_factory.mktemp("residual"))


def test_quantized_network_differs_by_no_more_than_the_manifest_says(network):
    proto, golden, written, folder = network
    said = written.details["quantized"]
    assert any("float speed" in w for w in written.warnings)
    assert {layer["op"] for layer in said["layers"]} >= {"Conv", "Add", "Gemm"}
    assert all(x["arithmetic"].startswith("exact") for x in said["layers"] if x["op"] in ("Conv", "Gemm"))
    measured = said["measured_against_onnx_runtime"]
    assert measured["samples"] == 8
    assert measured["largest_difference"] <= written.max_error <= 0.05 * measured["largest_output"]
    rewritten = tvm_import.whole_numbers(tvm_import.fix_batch(proto)).model
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in rewritten.graph.node}
    library = tvm.runtime.load_module(str(folder / "model.so"))
    main = bound_main(tvm.relax.VirtualMachine(library, tvm.cpu()))
    for i in range(4):
        feeds = {"image": golden["image"][i : i + 1]}
        (want,), (got,) = onnx_outputs(proto, feeds), answered(main, feeds)
        assert np.abs(got - want).max() <= written.max_error


def test_quantized_weights_are_stored_as_codes(network):
    proto, _, written, folder = network
    library = (folder / "model.so").read_bytes()
    stored = written.details["weights"]
    assert stored["widened_bytes"] == 4 * stored["code_bytes"]
    assert written.ram_bytes > stored["widened_bytes"]
    assert written.flash_bytes is None
    tensors = [numpy_helper.to_array(t) for t in proto.graph.initializer]
    kernels = [t.transpose(2, 3, 1, 0) for t in tensors if t.dtype == np.int8 and t.ndim == 4 and t.size > 256]
    assert kernels
    for codes in kernels:
        assert codes.tobytes() in library
        assert codes.astype(np.float32).tobytes() not in library
    assert sum(k.size for k in kernels) <= stored["code_bytes"] <= sum(t.size for t in tensors if t.dtype == np.int8)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ((-128, 127), "int8"),
        ((-255, 255), "int16"),
        ((0, 40_000), None),
        ((0, 0.5), None),
        ((0, np.nan), None),
        ((-0.0,), None),
    ],
)
def test_only_whole_numbers_become_codes_and_come_back_bit_for_bit(values, dtype):
    tensor = np.resize(np.array(values, np.float32), (20, 20))
    codes = tvm_weights.as_codes(tensor)
    assert (None if codes is None else codes.dtype.name) == dtype
    if codes is not None:
        assert codes.astype(np.float32).tobytes() == tensor.tobytes()
    assert tvm_weights.as_codes(tensor[:3]) is None, "too few to be worth a call"


def test_weights_with_a_zero_point_are_stored_in_two_bytes():
    rng = np.random.default_rng(0)
    constants = {
        "xs": np.float32(0.02),
        "xz": np.uint8(128),
        "w": rng.integers(0, 256, (40, 30)).astype(np.uint8),
        "ws": np.float32(0.01),
        "wz": np.uint8(9),
        "ys": np.float32(0.3),
        "yz": np.uint8(128),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"]),
        helper.make_node("MatMul", ["xf", "wf"], ["yf"], name="product"),
        helper.make_node("QuantizeLinear", ["yf", "ys", "yz"], ["y"]),
    ]
    proto = model(nodes, {"x": (TensorProto.UINT8, [1, 40])}, {"y": (TensorProto.UINT8, None)}, constants)
    compiled = compile_model(tvm_import.fix_batch(proto), HOST, {})
    assert (compiled.code_bytes, compiled.widened_bytes) == (2 * 1200, 4 * 1200)
    feeds = {"x": rng.integers(0, 256, (1, 40)).astype(np.uint8)}
    np.testing.assert_array_equal(host_outputs(proto, feeds)[0], onnx_outputs(proto, feeds)[0])


def test_calls_are_named_by_the_layers_whose_weights_they_read(network, residual_network):
    for proto, written in (network[::2], residual_network):
        layers = [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
        calls, macs = written.details["calls"], {k["kernel"]: k["macs"] for k in written.details["kernels"]}
        assert sorted(c["layer"] for c in calls if c["layer"]) == sorted(layers)
        assert all((c["layer"] is not None) == (macs[c["kernel"]] > 0) for c in calls)


@pytest.mark.parametrize("weights", ["int4", "blocked"])
def test_weights_that_tvm_cannot_import_are_imported_here(weights):
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (32, 6))
    scale = rng.uniform(0.01, 0.1, (4, 6) if weights == "blocked" else 6).astype(np.float32)
    stored = numpy_helper.from_array(codes.astype(onnx.helper.tensor_dtype_to_np_dtype(TensorProto.INT4)), "w")
    attributes = {"axis": 0, "block_size": 8} if weights == "blocked" else {"axis": 1}
    proto = _with_int4(stored, scale, attributes)
    feeds = {"x": rng.standard_normal((1, 32)).astype(np.float32)}
    real = codes * (np.repeat(scale, 8, 0) if weights == "blocked" else scale)
    (got,) = host_outputs(proto, feeds)
    np.testing.assert_allclose(got, feeds["x"] @ real, rtol=1e-5, atol=1e-5)


def _with_int4(stored, scale, attributes):
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], **attributes),
            helper.make_node("MatMul", ["x", "wf"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [stored, numpy_helper.from_array(scale, "ws")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_every_product_has_a_schedule(residual_network):
    _, written = residual_network
    rows = written.details["kernels"]
    assert sum(r["macs"] > 0 for r in rows) >= 5
    assert all(r["schedule"] in ("record", "default") and r["tiling"] for r in rows if r["macs"])
    assert written.details["layout"] == "channels last"
    assert written.details["quantized"] is written.details["weights"] is None
    assert not written.warnings


@pytest.mark.parametrize("name", ["host", "raspberry-pi-4"])
def test_equal_sources_give_equal_bytes(name, tmp_path):
    proto, _ = convolution()
    device = target.load(name)
    files = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        Tvm().write(Source(proto, {}, "net"), device, tmp_path / str(i))
        files.append((tmp_path / str(i) / "model.so").read_bytes())
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0]


def test_export_says_nothing_on_standard_error(network, tmp_path, capfd):
    Tvm().write(Source(network[0], {}, "net"), HOST, tmp_path)
    assert capfd.readouterr().err == ""


def test_an_unknown_op_is_named():
    nodes = [helper.make_node("Det", ["x"], ["y"], name="the_determinant")]
    proto = model(nodes, {"x": (TensorProto.FLOAT, ["n", 3, 3])}, {"y": (TensorProto.FLOAT, None)}, {})
    with pytest.raises(PlanishError, match=r"'the_determinant'.*'Det'.*Conv"):
        compile_model(tvm_import.fix_batch(proto), HOST, {})


def test_only_the_batch_may_be_dynamic():
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    proto = model(nodes, {"x": (TensorProto.FLOAT, ["n", "time", 3])}, {"y": (TensorProto.FLOAT, None)}, {})
    with pytest.raises(PlanishError, match=r"'x' has a dynamic dimension 1 \('time'\)"):
        tvm_import.fix_batch(proto)


def test_a_microcontroller_is_refused(tmp_path):
    proto, _ = convolution()
    with pytest.raises(PlanishError, match=r"stm32f746.*mcu"):
        Tvm().write(Source(proto, {}, "net"), target.load("stm32f746"), tmp_path)


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("channels", [10, 13, 16, 24, 64, 512, 1000])
def test_default_tiles_fit_the_registers(unit, channels):
    for size in (1, 7, 8, 14, 32, 113):
        work = Workload("conv2d_nhwc", (1, size, size, channels), (3, 3, 16), (), True)
        tiling = tvm_schedule.default_tiling(work, unit)
        assert 1 <= tiling.rows * tiling.columns * tiling.vectors <= unit.accumulators
        assert size % tiling.rows == size % tiling.columns == channels % tiling.vectors == 0


def test_a_record_is_used_and_a_wrong_file_is_named(tmp_path):
    proto, _ = convolution(channels=(4, 32), size=8)
    database = tuning.tune(proto, HOST, trials=2)
    ((key, record),) = database.records.items()
    assert key.startswith("conv2d_nhwc 1x8x8x32 sum 3x3x4")
    assert record.trials == 2
    path = tmp_path / "records.json"
    path.write_text(json.dumps(database.to_json()))
    assert tuning.read(path).tilings() == database.tilings()
    compiled = compile_model(tvm_import.fix_batch(proto), HOST, tuning.read(path).tilings())
    assert {k.origin for k in compiled.kernels.values() if k.workload} == {"record"}
    broken = database.to_json()
    broken["records"][key]["colums"] = 1
    path.write_text(json.dumps(broken))
    with pytest.raises(PlanishError, match=r"records.json.*colums"):
        tuning.read(path)


def test_shipped_records_fit_the_template():
    for path in sorted(tuning.FOLDER.glob("*.json")):
        database = tuning.read(path)
        for key, tiling in database.tilings().items():
            spatial = [int(d) for d in key.split()[1].split("x")]
            assert isinstance(tiling, Tiling)
            assert spatial[-1] % tiling.vectors == 0, key
            assert len(spatial) < 2 or spatial[-2] % tiling.columns == 0, key


def test_tuning_measures_only_this_machine():
    proto, _ = convolution()
    with pytest.raises(PlanishError, match="raspberry-pi-4"):
        tuning.tune(proto, target.load("raspberry-pi-4"), trials=1)


def test_tvm_and_its_ffi_fit_together():
    # apache-tvm-ffi 0.1.15 crashes here; apache-tvm's own requirement allows it, ours pins 0.1.14
    code = "import tvm; from tvm.script import relax as R; m = tvm.IRModule({}); tvm.ir.load_json(tvm.ir.save_json(m))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
