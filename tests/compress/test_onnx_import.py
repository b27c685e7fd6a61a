"""An imported ONNX model computes what ONNX Runtime computes, for any batch, and trains and traces like any other."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from planish.common.errors import PlanishError
from planish.compress import onnx_import
from planish.compress.model import Model
from torch import nn

DATA = Path(os.environ.get("PLANISH_DATA", Path(__file__).parents[2] / "../shared/data"))


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(channels, out, 1, stride) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


def resnet() -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), nn.Softmax(-1))
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.MaxPool2d(3, 2, 1), Block(8, 8, 1), Block(8, 16, 2), head)


def ds_cnn() -> nn.Module:
    def separable(channels: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        return [depthwise, nn.ReLU6(), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.Hardswish()]

    stem = [nn.ZeroPad2d((1, 1, 4, 5)), nn.Conv2d(1, 8, (10, 4), 2), nn.LeakyReLU(0.1)]
    return nn.Sequential(*stem, *separable(8), *separable(8), nn.AvgPool2d((2, 5), 2), nn.Flatten(), nn.LazyLinear(12))


def mlp() -> nn.Module:
    layers = [nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.Sigmoid(), nn.LayerNorm(8), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(8, 4), nn.Hardsigmoid())


def exported(net: nn.Module, shape: tuple[int, ...], dynamo: bool) -> onnx.ModelProto:
    """The network by torch's new or old exporter, batch-dynamic, with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    net.eval()(torch.zeros(2, *shape))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    args = (torch.zeros(2, *shape),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own parts
        if dynamo:
            batch = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.onnx.export(net, args, dynamo=True, dynamic_shapes=batch, verbose=False)
            assert program is not None
            return program.model_proto
        buffer = io.BytesIO()
        torch.onnx.export(net, args, buffer, dynamo=False, input_names=["in.1"], dynamic_axes={"in.1": {0: "n"}})
        return onnx.load_from_string(buffer.getvalue())


def runtime(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: x}))


def ours(model: Model, x: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        found = model(torch.from_numpy(x))
    return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]


def assert_equal(proto: onnx.ModelProto, x: np.ndarray, atol: float = 1e-5) -> Model:
    model = onnx_import.to_model(proto, "net.onnx")
    for wanted, found in zip(runtime(proto, x), ours(model, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)
    return model


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(("build", "shape"), [(resnet, (3, 16, 16)), (ds_cnn, (1, 49, 10)), (mlp, (20,))])
def test_networks_from_torchs_exporters(build: Any, shape: tuple[int, ...], dynamo: bool) -> None:
    torch.manual_seed(0)
    proto = exported(build(), shape, dynamo)
    model = assert_equal(proto, np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32))
    assert model.batched
    assert model.inputs[0].shape == (1, *shape)
    names = dict(model.graph.named_parameters())
    assert all(n.endswith(("weight", "bias")) for n in names), names.keys()
    sum(y.square().sum() for y in [model(torch.ones(2, *shape))]).backward()  # pyright: ignore
    assert all(p.grad is not None for p in names.values())


@pytest.mark.skipif(not (DATA / "face_slim320").is_dir(), reason=f"no data in {DATA}")
def test_a_detector_with_two_outputs_and_shape_arithmetic() -> None:
    proto = onnx.load(DATA / "face_slim320" / "slim320.onnx")
    x = (np.random.default_rng(0).integers(0, 256, (1, 3, 240, 320)).astype("float32") - 127) / 128
    model = assert_equal(proto, x)
    assert model.batched  # the file fixes the batch to 1, its graph does not need that
    reference = np.load(DATA / "face_slim320" / "reference_io.npz")
    wanted = [reference[n] for n in reference.files if reference[n].shape in ((1, 4420, 2), (1, 4420, 4))]
    for y in ours(model, x):
        assert any(y.shape == w.shape and np.allclose(y, w, atol=1e-4) for w in wanted)


# ---- single nodes


def single(
    op: str,
    inputs: dict[str, Any],
    x_shape: list[Any],
    opset: int = 17,
    outputs: int = 1,
    domain: str = "",
    first: str = "x",
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node; `inputs` are constant operands, in order after x (before it with another `first`)."""
    names = [first, *inputs] if first == "x" else [first, "x", *[n for n in inputs if n != first]]
    names = [n if n.startswith(("x", "c")) else "" for n in names]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], name="the_node", domain=domain, **attributes)
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in inputs.items() if n.startswith("c")]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)]
    results = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)]
    graph = helper.make_graph([node], "g", values, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


RNG = np.random.default_rng(1)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def i(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


IMAGE = ["n", 3, 9, 8]
NODES: list[Any] = [
    ("Conv", {"c": f(4, 3, 3, 3), "c2": f(4)}, IMAGE, {"pads": [0, 1, 2, 1], "strides": [2, 1]}),
    ("Conv", {"c": f(4, 3, 3, 2)}, IMAGE, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", {"c": f(4, 3, 3, 2)}, IMAGE, {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    ("Conv", {"c": f(4, 3, 3, 2)}, IMAGE, {"auto_pad": "VALID", "dilations": [2, 1]}),
    ("Conv", {"c": f(3, 1, 3, 3), "c2": f(3)}, IMAGE, {"group": 3, "kernel_shape": [3, 3]}),
    ("Conv", {"c": f(4, 3, 3)}, ["n", 3, 9], {"pads": [1, 0]}),
    ("Gemm", {"c": f(5, 7), "c2": f(7)}, ["n", 5], {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", {"c": f(7, 5), "c2": f(1, 7)}, ["n", 5], {"transB": 1}),
    ("MatMul", {"c": f(5, 7)}, ["n", 3, 5], {}),
    ("BatchNormalization", {"c": f(3), "c2": f(3), "c3": f(3), "c4": f(3) ** 2}, IMAGE, {"epsilon": 1e-3}),
    ("LayerNormalization", {"c": f(8), "c2": f(8)}, IMAGE, {}),
    ("Clip", {"c": np.float32(-0.5), "c2": np.float32(0.7)}, IMAGE, {}),
    ("Clip", {"c": np.float32(0)}, IMAGE, {}),
    ("Clip", {"none": 0, "c2": np.float32(0.3)}, IMAGE, {}),
    ("LeakyRelu", {}, IMAGE, {}),
    ("Elu", {}, IMAGE, {"alpha": 0.7}),
    ("PRelu", {"c": f(3, 1, 1)}, IMAGE, {}),
    ("HardSigmoid", {}, IMAGE, {}),
    ("HardSwish", {}, IMAGE, {}),
    ("Softmax", {}, IMAGE, {"axis": 1}),
    ("LogSoftmax", {}, IMAGE, {}),
    ("Add", {"c": f(3, 1, 1)}, IMAGE, {}),
    ("Mul", {"c": np.float32(3)}, IMAGE, {}),
    ("Sub", {"c": f(8)}, IMAGE, {"first": "c"}),
    ("Div", {"c": f(1)}, IMAGE, {"first": "c"}),
    ("MaxPool", {}, IMAGE, {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ("MaxPool", {}, IMAGE, {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", {}, IMAGE, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", {}, IMAGE, {"kernel_shape": [3, 2], "pads": [1, 0, 0, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", {}, IMAGE, {}),
    ("GlobalMaxPool", {}, IMAGE, {}),
    ("ReduceMean", {}, IMAGE, {"axes": [2, 3], "keepdims": 0}),
    ("ReduceMax", {}, IMAGE, {"axes": [-1]}),
    ("Flatten", {}, IMAGE, {}),
    ("Flatten", {}, IMAGE, {"axis": 2}),
    ("Reshape", {"c": i(0, -1, 4)}, IMAGE, {}),
    ("Squeeze", {"c": i(1)}, ["n", 1, 4], {}),
    ("Unsqueeze", {"c": i(1, -1)}, ["n", 4], {}),
    ("Transpose", {}, IMAGE, {"perm": [0, 2, 3, 1]}),
    ("Concat", {"x": 0}, IMAGE, {"axis": 1}),
    ("Slice", {"c": i(1, -3), "c2": i(2**62, -1), "c3": i(2, 3), "c4": i(2, 1)}, IMAGE, {}),
    ("Slice", {"c": i(1), "c2": i(3), "c3": i(1)}, IMAGE, {}),
    ("Pad", {"c": i(0, 0, 1, 2, 0, 0, 0, 1), "c2": np.float32(0.5)}, IMAGE, {}),
    ("Pad", {"c": i(0, 0, 1, 0, 0, 0, 2, 1)}, IMAGE, {"mode": "reflect"}),
    ("Pad", {"c": i(0, 0, 1, 0, 0, 0, 2, 1)}, IMAGE, {"mode": "edge"}),
    ("Gather", {"c": i(2, -3)}, IMAGE, {"axis": 1}),
    ("Gather", {"c": np.int64(1)}, IMAGE, {"axis": 3}),
    ("Split", {"c": i(1, 2)}, IMAGE, {"axis": 1, "outputs": 2}),
    ("Identity", {}, IMAGE, {}),
    ("Dropout", {}, IMAGE, {}),
    ("Cast", {}, IMAGE, {"to": TensorProto.FLOAT}),
]


@pytest.mark.parametrize(
    ("op", "constants", "shape", "attributes"), NODES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_node_computes_what_the_runtime_does(
    op: str, constants: dict[str, Any], shape: list[Any], attributes: dict[str, Any]
) -> None:
    proto = single(op, constants, shape, **attributes)
    x = np.random.default_rng(0).standard_normal((2, *shape[1:]), dtype=np.float32)
    model = onnx_import.to_model(proto, "node.onnx")
    for wanted, found in zip(runtime(proto, x), ours(model, x), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_batch_that_the_file_fixes_stays_fixed_where_the_graph_needs_it() -> None:
    """Reshape to (1, 24) takes one sample; (2, 12) as well, but then rows are not samples."""
    free = onnx_import.to_model(single("Reshape", {"c": i(1, 24)}, [1, 4, 6]), "net")
    fixed = onnx_import.to_model(single("Reshape", {"c": i(-1, 12)}, [1, 4, 6]), "net")
    assert free.batched
    assert not fixed.batched
    assert fixed.inputs[0].shape == (1, 4, 6)


def test_quantize_pairs_become_planish_ops_and_stay() -> None:
    zero = {"cs": np.float32(0.05), "cz": np.uint8(128)}
    weights = numpy_helper.from_array(RNG.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8), "w_q")
    scales = numpy_helper.from_array(RNG.uniform(0.01, 0.02, 4).astype(np.float32), "w_s")
    points = numpy_helper.from_array(np.zeros(4, np.int8), "w_z")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "cs", "cz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "cs", "cz"], ["d"]),
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"], axis=0),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    constants = [weights, scales, points, *(numpy_helper.from_array(np.asarray(v), n) for n, v in zero.items())]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])
    graph = helper.make_graph(
        nodes, "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = assert_equal(proto, f(2, 3, 6, 6))
    targets = [str(n.target) for n in model.graph.graph.nodes]
    assert targets.count("planish.dequantize.default") == 2
    assert targets.count("planish.quantize.default") == 1
    assert model.parameters() == 4 * 3 * 3 * 3


# ---- errors


def refused(words: str, proto: onnx.ModelProto, **options: Any) -> str:
    with pytest.raises(PlanishError, match=words) as caught:
        onnx_import.to_model(proto, "net.onnx", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_known_is_named() -> None:
    message = refused("node 'the_node' \\(Einsum\\)", single("Einsum", {"c": f(3)}, [1, 3], equation="ij,j->i"))
    assert "known ops: Abs, Add" in message
    proto = single("FusedConv", {"c": f(3)}, [1, 3], domain="com.microsoft")
    refused("com.microsoft.FusedConv", proto)
    refused("attributes that are not known: 'mode'", single("Relu", {}, [1, 3], mode="fast"))
    pads = {"kernel_shape": [2, 2], "pads": [1, 0, 0, 0]}
    refused("equal pads on both sides", single("AveragePool", {}, [1, 3, 4, 4], **pads))
    refused("does not fit its inputs", single("Add", {"c": f(5)}, [1, 3]))
    refused("has the shape", single("Relu", {}, ["n", 3]), shapes={"x": (1, 4)})
    refused("has no inputs 'z'", single("Relu", {}, ["n", 3]), shapes={"z": (1, 3)})
    refused("open dimensions; give --input x=", single("Relu", {}, ["n", "m"]))
    assert onnx_import.to_model(single("Relu", {}, ["n", "m"]), "net", {"x": (1, 5)}).inputs[0].shape == (1, 5)


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_files_that_are_no_model(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    data = exported(mlp(), (20,), False).SerializeToString()
    path.write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(PlanishError, match="damaged or no ONNX model") as caught:
        onnx_import.load(path)
    assert "\n" not in str(caught.value)
