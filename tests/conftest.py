"""Small real networks and data that the tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

if (
    not torch.cuda.is_available()
):  # GPU kernels run in Triton's interpreter; it must be chosen before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.targets import target
from torch import nn

torch.set_num_threads(int(os.environ.get("PLANISH_TEST_THREADS", "1")))


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:.*LeafSpec.*:FutureWarning"
    )  # torch 2.13's own pickling of tree specs


class Residual(nn.Module):
    """Every shape of graph that quantization must place pairs in: residual add, concat, depthwise, pools, padded shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.branch = nn.Conv2d(32, 8, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, image):
        """(n, 3, 16, 16) -> (n, 10)."""
        x = torch.relu(self.bn(self.stem(image)))
        x = torch.relu(x + self.point(nn.functional.relu6(self.depthwise(x))))
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        x = torch.relu(self.down(x) + short)
        x = torch.cat([x, self.branch(x)], 1)
        x = nn.functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def trained(module, shape, seed=0):
    """Weights and batch-norm statistics as a trained network has them: not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        elif value.is_floating_point() and value.ndim == 1 and "bn" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            spread = 1 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            value.copy_(torch.randn(value.shape, generator=generator) * spread)
    return module.eval()


@pytest.fixture(scope="session")
def residual():
    """The traced network above."""
    return trace(trained(Residual(), (3, 16, 16)), {"image": torch.zeros(1, 3, 16, 16)}, "residual")


@pytest.fixture(scope="session")
def images():
    """Smooth random images for it, so that activations are as correlated as real ones."""
    generator = np.random.default_rng(0)
    coarse = generator.standard_normal((96, 3, 4, 4)).astype(np.float32)
    smooth = coarse.repeat(4, 2).repeat(4, 3) + 0.2 * generator.standard_normal((96, 3, 16, 16)).astype(np.float32)
    return Data({"image": smooth}, None, "images")


@pytest.fixture
def context(residual, images):
    """What a pass is given, for `host`."""
    return Context(residual, images, target.load("host"), torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def quantized(residual, images):
    """The network above after static quantization with the default settings."""
    from planish.compress.quantize.static import Static

    return Static().apply(residual, Context(residual, images, target.load("host"), torch.Generator().manual_seed(0)))


@pytest.fixture(scope="session")
def data_folder():
    """The folder of real models and data sets; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("PLANISH_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no data folder (set PLANISH_DATA)")
    return folder


TINY = ("residual", "branches", "flatten", "matmul", "channels_last", "padded")


def _tiny_float(name):
    """A float ONNX model of a few layers, made by hand: what a tool other than planish might write."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(TINY.index(name))
    constants = []

    def const(values, dtype=np.float32):
        constants.append(numpy_helper.from_array(np.asarray(values, dtype), f"c{len(constants)}"))
        return constants[-1].name

    def conv(x, y, i, o, k=3, group=1, **attributes):
        w = rng.normal(0, 1 / np.sqrt(k * k * i / group), (o, i // group, k, k))
        inputs = [x, const(w), const(rng.normal(0, 0.2, o))]
        return helper.make_node("Conv", inputs, [y], name=f"conv_{y}", group=group, kernel_shape=[k, k], **attributes)

    def node(kind, inputs, y, **attributes):
        return helper.make_node(kind, inputs, [y], name=f"{kind}_{y}".lower(), **attributes)

    def gemm(x, y, i, o):
        return node("Gemm", [x, const(rng.normal(0, i**-0.5, (o, i))), const(rng.normal(0, 0.1, o))], y, transB=1)

    same = {"pads": [1, 1, 1, 1]}
    shape = ["n", 3, 8, 8]
    if name == "residual":
        nodes = [
            conv("x", "a", 3, 6, **same), node("Relu", ["a"], "b"), conv("b", "c", 6, 6, **same), node("Add", ["b", "c"], "d"),
            node("Relu", ["d"], "e"), node("GlobalAveragePool", ["e"], "f"), node("Flatten", ["f"], "g"), gemm("g", "y", 6, 5),
        ]  # fmt: skip
    elif name == "branches":
        nodes = [
            conv("x", "a", 3, 8, strides=[2, 2], **same), node("Clip", ["a", const(0), const(6)], "b"),
            conv("b", "c", 8, 8, group=8, **same), node("MaxPool", ["b"], "d", kernel_shape=[3, 3], **same),
            node("AveragePool", ["c"], "e", kernel_shape=[3, 3], **same), node("Concat", ["d", "e"], "f", axis=1),
            conv("f", "g", 16, 5, k=1), node("GlobalAveragePool", ["g"], "h"), node("Flatten", ["h"], "y"),
        ]  # fmt: skip
    elif name == "flatten":
        nodes = [
            conv("x", "a", 3, 4, **same),
            node("Relu", ["a"], "b"),
            node("Flatten", ["b"], "c"),
            gemm("c", "y", 256, 7),
        ]
    elif name == "matmul":
        nodes = [
            conv("x", "a", 3, 4, strides=[2, 2], **same), node("Reshape", ["a", const([0, -1], np.int64)], "b"),
            node("MatMul", ["b", const(rng.normal(0, 0.2, (64, 6)))], "c"), node("Add", ["c", const(rng.normal(0, 0.1, 6))], "y"),
        ]  # fmt: skip
    elif name == "channels_last":
        shape = ["n", 8, 8, 3]
        nodes = [
            node("Transpose", ["x"], "a", perm=[0, 3, 1, 2]), conv("a", "b", 3, 4, **same), node("Relu", ["b"], "c"),
            conv("c", "d", 4, 5, strides=[2, 2], **same), node("Transpose", ["d"], "y", perm=[0, 2, 3, 1]),
        ]  # fmt: skip
    else:
        nodes = [
            node("Pad", ["x", const([0, 0, 0, 0, 0, 0, 1, 1], np.int64)], "a"), conv("a", "b", 3, 4, strides=[2, 2]),
            node("Relu", ["b"], "c"), node("Slice", ["c", const([0, 1], np.int64), const([4, 4], np.int64), const([2, 3], np.int64)], "y"),
        ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model, rng.normal(0.3, 1, (24, *shape[1:])).astype(np.float32)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name, unsigned, per_channel) -> (QDQ model by ONNX Runtime's own quantizer, inputs (24, ...)), made once each."""
    import functools
    import logging

    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, x):
            self.batches = iter([{"x": x}])

        def get_next(self):
            return next(self.batches, None)

    @functools.cache
    def make(name, unsigned=True, per_channel=True):
        model, x = _tiny_float(name)
        path = tmp_path_factory.mktemp(name) / "qdq.onnx"
        logging.disable(logging.WARNING)  # it recommends a step that is not needed here
        quantize_static(
            model,
            str(path),
            Reader(x),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        logging.disable(logging.NOTSET)
        return onnx.load(path), x

    make.names = TINY
    return make


@pytest.fixture(scope="session")
def ort_outputs():
    """ort_outputs(model, inputs) -> outputs by name, in ONNX Runtime with int8 activations fused as uint8 ones are."""
    import onnxruntime

    def run(model, inputs):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    return run
