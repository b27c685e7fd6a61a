"""ONNX for NVIDIA GPUs: what the CUDA execution provider has kernels for, and TensorRT's rules, checked on the CPU."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish import pipeline
from planish.common.errors import PlanishError
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.fp8 import Fp8
from planish.compress.quantize.nf4 import Nf4
from planish.compress.quantize.rtn import RoundToNearest
from planish.export import onnx_gpu, onnx_tensorrt
from planish.export.format import Source
from planish.export.lowering import lowered, to_onnx
from planish.export.onnx import Onnx
from planish.export.onnx_tensorrt import OnnxTensorrt, broken, converted
from planish.runtimes import ort
from planish.targets import target
from torch import nn

CUDA = target.load("cuda-sm90")


def source(step, width=128, inner=64):
    """Two layers after one pass, with a few samples."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, 64, bias=False))
    model = trace(layers, {"x": torch.zeros(1, width)}, "net")
    model = step.apply(model, Context(model, None, target.load("host"), torch.Generator()))
    graph = to_onnx(model, lower=False)
    x = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    return Source(lowered(graph), {"x": x}, "net", fused=graph)


def answers(path_or_bytes, given):
    return ort.run(ort.create(path_or_bytes, 1), given.golden_inputs)["output"]


def graph(nodes, constants=(), kind=TensorProto.FLOAT):
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 8])],
        [helper.make_empty_tensor_value_info(nodes[-1].output[0])],
        list(constants),
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_packed_weights_are_float16_for_cuda(tmp_path, bits):
    given = source(RoundToNearest(bits=bits, group=64))
    written = Onnx().write(given, CUDA, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    products = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    types = onnx_gpu.element_types(model)
    assert len(products) == 2
    assert all(types[n.input[0]] == types[n.input[2]] == "float16" for n in products)
    assert all(helper.get_node_attr_value(n, "bits") == bits for n in products), "no width is split as on a CPU"
    want = answers(given.onnx.SerializeToString(), given)
    assert np.abs(answers(tmp_path / "model.onnx", given) - want).max() <= written.max_error
    assert written.details["on_cpu"] == {}
    assert written.details["session_options"] == {"ep.cuda.fpa_intb_gemm": "1"}


def test_layers_that_fall_back_to_the_cpu_are_named():
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "first.quantize"),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"], "first"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["f"], ["y"], "softmax"),
    ]
    weight = numpy_helper.from_array(np.ones((8, 4), np.int8), "w")
    model = graph(nodes, [weight])
    assert onnx_gpu.on_cpu(model) == {
        "first.quantize": "DynamicQuantizeLinear has no CUDA kernel",
        "first": "MatMulInteger of uint8 has no CUDA kernel",
    }
    said = onnx_gpu.warnings(model)
    assert any("'first'" in line and "copies its tensors there and back" in line for line in said)


def test_what_the_cuda_provider_decodes_or_does_not_fuse_is_said(tmp_path):
    written = Onnx().write(source(Nf4()), CUDA, tmp_path)
    assert any("MatMulBnb4 decodes the whole weight" in w for w in written.warnings)


@pytest.mark.parametrize("group", [64, 128])
def test_four_bits_are_blocks_of_int4_for_tensorrt(tmp_path, group):
    given = source(RoundToNearest(bits=4, group=group), width=2 * group, inner=group)
    written = OnnxTensorrt().write(given, CUDA, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert broken(model) == {}
    onnx.checker.check_model(model)
    blocks = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert {helper.get_node_attr_value(n, "block_size") for n in blocks} == {group}
    assert all(i.data_type == TensorProto.INT4 for i in model.graph.initializer if i.name.endswith("weight_turned"))
    scales = [numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("turned_scale")]
    assert len(scales) == 2
    assert all((s > 0).all() for s in scales)
    signs = [
        i for i in given.fused.graph.initializer if i.name.endswith("scale") and (numpy_helper.to_array(i) < 0).any()
    ]
    want = answers(given.onnx.SerializeToString(), given)
    close = 0.15 if signs else 4e-3  # a code of -8 in a block with a negative scale has no exact form
    assert np.abs(answers(tmp_path / "model.onnx", given) - want).max() <= close * np.abs(want).max()
    assert written.details["moved"] <= close * np.abs(want).max()


def test_a_grid_that_tensorrt_lacks_is_stored_as_float16_and_said(tmp_path):
    given = source(RoundToNearest(bits=4, group=32, symmetric=False))
    written = OnnxTensorrt().write(given, CUDA, tmp_path)
    assert any("its weight is stored as float16" in w for w in written.warnings)
    want = answers(given.onnx.SerializeToString(), given)
    assert np.abs(answers(tmp_path / "model.onnx", given) - want).max() <= 4e-3 * np.abs(want).max()


def test_float8_weights_are_dequantized_by_channel_for_tensorrt(tmp_path):
    given = source(Fp8())
    OnnxTensorrt().write(given, CUDA, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert broken(model) == {}
    assert sum(i.data_type == TensorProto.FLOAT8E4M3FN for i in model.graph.initializer) == 2
    want = answers(given.onnx.SerializeToString(), given)
    assert np.abs(answers(tmp_path / "model.onnx", given) - want).max() <= 0.1 * np.abs(want).max()


def pair(zero, scale=0.1, codes=None, **attributes):
    """A quantize/dequantize pair of x, or a dequantized constant."""
    kind = codes if codes is not None else numpy_helper.from_array(np.asarray(zero), "z").data_type
    constants = [
        numpy_helper.from_array(np.asarray(scale, np.float32), "s"),
        numpy_helper.from_array(np.asarray(zero), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize", **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize", **attributes),
    ]
    assert kind
    return graph(nodes, constants)


def stored(tensor, scale, **attributes):
    scale = numpy_helper.from_array(np.asarray(scale, np.float32), "s")
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["y"], "dequantize", **attributes)]
    return graph(nodes, [tensor, scale])


def int4(*shape):
    return helper.make_tensor("w", TensorProto.INT4, shape, bytes(int(np.prod(shape)) // 2), raw=True)


@pytest.mark.parametrize(
    ("model", "node", "rule"),
    [
        (pair(np.uint8(0)), "quantize", "codes of type uint8"),
        (pair(np.int8(3)), "quantize", "a zero point other than 0"),
        (pair(np.int8(0), scale=-1.0), "dequantize", "not positive"),
        (pair(np.zeros(8, np.int8), np.full(8, 0.1), axis=1), "quantize", "one for the tensor"),
        (stored(int4(64, 4), np.ones((2, 4)), axis=0, block_size=32), "dequantize", "int4 in blocks of 32"),
        (stored(int4(64, 4, 2), np.ones((1, 4, 2)), axis=0, block_size=64), "dequantize", "last two dimensions"),
        (
            stored(numpy_helper.from_array(np.ones((64, 4), np.int8), "w"), np.ones((1, 4)), axis=0, block_size=64),
            "dequantize",
            "blocks of int8",
        ),
        (
            graph([helper.make_node("Cast", ["x"], ["y"], "cast", to=TensorProto.FLOAT8E4M3FN)]),
            "cast",
            "QuantizeLinear",
        ),
        (
            graph([helper.make_node("MatMulInteger", ["x", "x"], ["y"], "m")], kind=TensorProto.UINT8),
            "m",
            "not supported",
        ),
        (
            graph([helper.make_node("Gelu", ["x"], ["y"], "g", domain="com.microsoft")]),
            "g",
            "no op of the ONNX standard",
        ),
    ],
)
def test_a_node_that_breaks_tensorrts_rules_is_named(model, node, rule):
    faults = broken(model)
    assert node in faults
    assert rule in faults[node]


def test_pairs_become_symmetric_and_keep_an_int8_grid_around_128():
    x = np.linspace(-1, 1, 40).reshape(5, 8).astype(np.float32)
    for zero, exact in ((np.uint8(128), True), (np.uint8(0), False), (np.int8(-20), False)):
        given = Source(pair(zero, 0.01), {"x": x}, "net")
        model, notes = converted(given)
        assert broken(model) == {}
        (got,) = ort.create(model.SerializeToString(), 1).run(None, {"x": x})
        (want,) = ort.create(given.onnx.SerializeToString(), 1).run(None, {"x": x})
        assert bool(notes) is not exact
        step = 0.01 if exact else 0.01 * 255 / 127
        inside = (x >= (np.iinfo(zero.dtype).min - int(zero)) * 0.01) & (
            x <= (np.iinfo(zero.dtype).max - int(zero)) * 0.01
        )
        assert np.abs(got - x)[inside].max() <= step / 2 + 1e-6
        if exact:
            np.testing.assert_array_equal(got, want)


def test_an_op_that_rounds_activations_at_run_time_is_refused(tmp_path):
    model = graph([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "layer.quantize")])
    given = Source(model, {"x": np.ones((2, 8), np.float32)}, "net")
    with pytest.raises(PlanishError, match=r"format 'onnx_tensorrt' cannot write 1 of 1 nodes: 'layer.quantize'"):
        OnnxTensorrt().write(given, CUDA, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_microcontroller_is_refused(tmp_path):
    with pytest.raises(PlanishError, match="is for NVIDIA GPUs"):
        OnnxTensorrt().write(source(Nf4()), target.load("stm32f746"), tmp_path)


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w8a8-static", "nf4", "fp8"])
def test_through_the_verbs(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))\n"
    )
    np.savez("data.npz", input=np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32))
    pipeline.compress("net.py:net", data="data.npz", recipe=recipe, output=tmp_path / "small")
    for kind in ("onnx", "onnx_tensorrt"):
        folder = tmp_path / kind
        report = pipeline.export(str(tmp_path / "small"), target="cuda-sm90", format=kind, output=folder)
        assert any("not run on" in w for w in report["warnings"])
        assert pipeline.verify(folder)["ok"]
    assert onnx_tensorrt.broken(onnx.load(tmp_path / "onnx_tensorrt" / "model.onnx")) == {}
