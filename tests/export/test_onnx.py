"""The ONNX that planish writes is fused by ONNX Runtime: no float arithmetic, no weight unpacked."""

from collections import Counter

import numpy as np
import onnx
import torch
from planish.export.format import Source
from planish.export.lowering import to_onnx
from planish.export.onnx import HEAVY, Onnx, float_weight_bytes, optimized
from planish.runtimes import ort
from planish.targets import target


def test_quantized_graph_is_fused_whole(quantized, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(to_onnx(quantized), path)
    ops = Counter(n.op_type for n in optimized(path).graph.node)
    assert not set(ops) & set(HEAVY)
    assert not {"Add", "Concat", "Relu", "Clip", "GlobalAveragePool", "ReduceMean"} & set(ops)
    assert ops["QuantizeLinear"] == ops["DequantizeLinear"] == 1, "one at the input, one at the output"


def test_no_weight_is_float_in_the_file_or_after_loading(quantized, tmp_path):
    proto = to_onnx(quantized)
    onnx.save(proto, tmp_path / "m.onnx")
    assert float_weight_bytes(proto) == 0
    assert float_weight_bytes(optimized(tmp_path / "m.onnx")) == 0


def test_onnx_runtime_answers_as_the_program(residual, quantized, images):
    x = images.inputs["image"]
    for model, bound in ((residual, 1e-4), (quantized, 0.05)):
        got = ort.run(ort.create(to_onnx(model).SerializeToString(), 1), {"image": x})["output"]
        with torch.no_grad():
            want = model(torch.from_numpy(x)).numpy()
        assert np.abs(got - want).max() <= bound * np.abs(want).max()


def test_equal_models_give_equal_bytes(quantized):
    assert to_onnx(quantized).SerializeToString() == to_onnx(quantized).SerializeToString()


def test_the_file_says_nothing_of_the_users_code(quantized):
    data = to_onnx(quantized).SerializeToString()
    assert b".py" not in data
    assert b"torch.export" not in data


def test_nodes_carry_the_names_of_the_layers(quantized):
    names = {n.name for n in to_onnx(quantized).graph.node}
    assert {"stem", "depthwise", "point", "down", "branch", "head"} <= names


def test_an_asymmetric_pad_becomes_the_convolutions_own(images, tmp_path):
    from planish.compress.model import trace
    from planish.compress.passes import Context
    from planish.compress.quantize.static import Static
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 2)

        def forward(self, image):
            return self.conv(nn.functional.pad(image, (0, 1, 0, 1)))

    model = trace(Net(), {"image": torch.zeros(1, 3, 16, 16)}, "net")
    result = Static().apply(model, Context(model, images, target.load("host"), torch.Generator()))
    for proto in (to_onnx(model), to_onnx(result)):
        assert not any(n.op_type == "Pad" for n in proto.graph.node)
        conv = next(n for n in proto.graph.node if n.op_type == "Conv")
        assert next(list(a.ints) for a in conv.attribute if a.name == "pads") == [0, 0, 1, 1]


def test_format_warns_of_what_stays_float(images, tmp_path):
    """A layer that the recipe skipped runs in float: the artifact says so."""
    from planish.compress.model import trace
    from planish.compress.passes import Context
    from planish.compress.quantize.static import Static
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = trace(net, {"input": torch.zeros(1, 3, 16, 16)}, "net")
    data = type(images)({"input": images.inputs["image"]}, None, "images")
    result = Static(skip=("2",)).apply(model, Context(model, data, target.load("host"), torch.Generator()))
    written = Onnx().write(Source(to_onnx(result), {}, "net"), target.load("host"), tmp_path)
    assert any("'2'" in w and "float" in w for w in written.warnings)
