"""One-dimensional networks run as images of height 1: equal to ONNX Runtime bit for bit, and without a copy that the model does not ask for."""

import logging

import numpy as np
import onnx
import pytest
import torch
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export import c as c_format
from planish.export import firmware, qdq
from planish.export.artifact import Artifact
from planish.export.lowering import to_onnx
from planish.targets import target as targets
from torch import nn
from torch.nn import functional as F

NEEDS_ZIG = pytest.mark.skipif(not firmware.available(), reason="ziglang is not installed (extra 'mcu')")
ENDS = ("mean", "flatten", "pool")


class Net(nn.Module):
    """Everything that a one-dimensional network is made of; `end` tells how time goes away."""

    def __init__(self, end):
        super().__init__()
        self.end = end
        self.stem, self.stem_norm = nn.Conv1d(6, 16, 5, 2, 2, bias=False), nn.BatchNorm1d(16)
        self.depth, self.point = nn.Conv1d(16, 16, 3, 1, 1, groups=16), nn.Conv1d(16, 24, 1)
        self.short, self.wide = nn.Conv1d(16, 24, 1), nn.Conv1d(24, 24, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm1d(24)  # behind a relu: nothing to fold into
        self.hidden, self.hidden_norm = nn.Linear(192 if end == "flatten" else 24, 10), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        """(n, 6, 32), or (n, 32, 6) for `pool`, to (n, 4)."""
        if self.end == "pool":
            x = x.transpose(1, 2)
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(self.point(torch.relu(self.depth(x))) + self.short(x))
        x = self.norm(torch.relu(self.wide(F.max_pool1d(x, 2))))  # (n, 24, 8)
        z = torch.cat([x, F.avg_pool1d(F.pad(x, (1, 1)), 3, 1)], 1)[:, :24]
        x = x * torch.sigmoid(z)
        if self.end == "flatten":
            x = x.flatten(1)
        elif self.end == "pool":
            x = F.adaptive_avg_pool1d(x, 1).squeeze(-1)
        else:
            x = x.mean(-1)
        return self.head(self.hidden_norm(torch.relu(self.hidden(x))))


def normed(net, x):
    """The network with the batch-norm statistics of x."""
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(x)
    return net.eval()


def quantized(net, x):
    """QDQ model and receipt."""
    model = trace(net, {"x": torch.from_numpy(x[:2])}, "net")
    context = Context(model, Data({"x": x}, None, "d"), targets.load("stm32f446"), torch.Generator().manual_seed(0))
    result = Static().apply(model, context)
    return to_onnx(result), result.receipt


@pytest.fixture(scope="module", params=ENDS)
def made(request):
    """(end, network, inputs, QDQ model, receipt)."""
    torch.manual_seed(0)
    x = torch.randn(64, *((32, 6) if request.param == "pool" else (6, 32)))
    net = normed(Net(request.param), x)
    return request.param, net, x.numpy(), *quantized(net, x.numpy())


def test_equals_onnxruntime_and_stays_close(made, ort_outputs):
    _, net, x, model, receipt = made
    assert not [e for e in receipt if e.action == "left"]
    graph = qdq.read(model)
    (ours,), (theirs,) = graph.reference({"x": x}).values(), ort_outputs(model, {"x": x}).values()
    np.testing.assert_array_equal(ours, theirs)
    with torch.no_grad():
        want = net(torch.from_numpy(x)).numpy()
    assert float((ours * want).sum() / np.sqrt((ours**2).sum() * (want**2).sum())) > 0.999


def test_no_tensor_is_turned_around(made):
    """Of all the transposes and reshapes between the model's own and the images, none costs a byte moved."""
    end, _, _, model, _ = made
    graph = qdq.read(model)
    assert not [n for n in graph.nodes if n.op in ("transpose", "reshape", "flatten") and not graph.alias(n)]
    (port,) = graph.inputs
    assert port.order == ((0, 1, 2) if end == "pool" else (0, 2, 1))  # length, then channels, either way


@NEEDS_ZIG
def test_on_a_microcontroller(made, tmp_path):
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    from planish.runtimes.emulator import Emulator

    _, _, x, model, _ = made
    graph = qdq.read(model)
    c_format.write_project(graph, "net", targets.load("stm32f446"), {"x": x[:1]}, tmp_path, [])
    with Emulator().open(Artifact(tmp_path, {"format": "c", "target": "stm32f446"}), 1) as session:
        (got,) = session.run({"x": x[:3]}).values()
    np.testing.assert_array_equal(got, next(iter(graph.reference({"x": x[:3]}).values())))


@pytest.mark.parametrize("unsigned", [True, False])
def test_quantized_by_another_tool(unsigned, ort_outputs, tmp_path):
    """Conv without bias and with one, pools, a residual, a scale per channel as a constant operand, Pad, Slice: by ONNX Runtime's quantizer."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    rng = np.random.default_rng(0)
    constants = []

    def const(values, dtype=np.float32):
        constants.append(numpy_helper.from_array(np.asarray(values, dtype), f"c{len(constants)}"))
        return constants[-1].name

    def node(kind, inputs, y, **attributes):
        return helper.make_node(kind, inputs, [y], name=f"{kind}_{y}".lower(), **attributes)

    pads = const([0, 0, 2, 0, 0, 1], np.int64)
    bounds = [const([v], np.int64) for v in (1, 11, -1)]
    nodes = [
        node("Conv", ["x", const(rng.normal(0, 0.3, (8, 5, 3)))], "a", kernel_shape=[3], pads=[1, 1], strides=[2]),
        node("Relu", ["a"], "b"),
        node("Pad", ["b", pads], "p"),
        node("Conv", ["p", const(rng.normal(0, 0.5, (8, 1, 4))), const(rng.normal(0, 0.1, 8))], "c", group=8),
        node("Add", ["b", "c"], "d"),
        node("MaxPool", ["d"], "e", kernel_shape=[3], strides=[1], auto_pad="SAME_UPPER"),
        node("Mul", ["e", const(rng.uniform(0.5, 1.5, (1, 8, 1)))], "f"),
        node("Slice", ["f", *bounds], "g"),
        node("Softmax", ["g"], "h", axis=1),
        node("Concat", ["g", "h"], "i", axis=1),
        node("GlobalAveragePool", ["i"], "j"),
        node("Flatten", ["j"], "k"),
        node("Gemm", ["k", const(rng.normal(0, 0.3, (3, 16))), const(rng.normal(0, 0.1, 3))], "y", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        constants,
    )
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    )
    x = rng.normal(0, 1, (16, 5, 24)).astype(np.float32)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": x}])

        def get_next(self):
            return next(self.batches, None)

    path = tmp_path / "qdq.onnx"
    logging.disable(logging.WARNING)
    quantize_static(
        model,
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
    )
    logging.disable(logging.NOTSET)
    made = onnx.load(path)
    read = qdq.read(made)
    ours, theirs = read.reference({"x": x})["y"], ort_outputs(made, {"x": x})["y"]
    step = read.outputs[0].tensor.scale
    assert np.abs(ours - theirs).max() <= (0 if unsigned else 1.01 * step)


def wake_word(folder):
    """MLPerf Tiny's streaming wake word as a torch network: (n, 40, 30) to (n, 3) scores."""
    import json

    graph = json.loads((folder / "sww_dscnn1d_int8_graph.json").read_text(encoding="utf-8"))
    values = np.load(folder / "sww_dscnn1d_int8_params.npz")
    parts = []
    for op in graph["ops"]:
        if "weight_key" not in op:
            continue
        codes, scale = values[op["weight_key"]], values[f"{op['weight_key']}_scale"]
        weight = torch.from_numpy(codes.astype(np.float32) * scale.reshape(-1, *[1] * (codes.ndim - 1)))
        bias = torch.from_numpy((values[op["bias_key"]] * values[f"{op['bias_key']}_scale"]).astype(np.float32))
        if codes.ndim == 4:
            groups = op.get("groups", 1)
            layer = nn.Conv1d(weight.shape[1] * groups, len(weight), weight.shape[2], groups=groups)
            weight = weight[..., 0]
        else:
            parts.append(nn.Flatten())
            layer = nn.Linear(*weight.shape[::-1])
        layer.load_state_dict({"weight": weight, "bias": bias})
        parts += [layer, nn.ReLU()] if op["act"] == "relu" else [layer]
    return nn.Sequential(*parts).eval()


def test_wake_word(data_folder, ort_outputs):
    """The published network, 41 of 45 windows right in TFLite, keeps its answers."""
    folder = data_folder / "mlperf_tiny"
    samples = np.load(folder / "sww_calibration_samples.npz")
    x = np.ascontiguousarray(samples["specs"][:, :, 0].transpose(0, 2, 1))  # (45, 40, 30)
    model, receipt = quantized(wake_word(folder), x)
    assert not [e for e in receipt if e.action == "left"]
    graph = qdq.read(model)
    (ours,), (theirs,) = graph.reference({"x": x}).values(), ort_outputs(model, {"x": x}).values()
    np.testing.assert_array_equal(ours, theirs)
    assert int((ours.argmax(1) == samples["labels"]).sum()) >= 40
    assert graph.macs > 800_000
