"""Tiny transformers in integers: any spelling of attention becomes the same few kernels, equal to the reference on cores and near ONNX Runtime."""

import logging
import math
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from planish.common.errors import PlanishError
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

WIDTH, HEADS, TOKENS, CLASSES = 64, 4, 16, 10
NEEDS_ZIG = pytest.mark.skipif(not firmware.available(), reason="ziglang is not installed (extra 'mcu')")
KINDS = ("separate", "timm", "torch", "vision")
"""three linear layers and fused attention; one, cut by unbind; nn.TransformerEncoderLayer; patches of an image"""


class Attention(nn.Module):
    """Self-attention in one of several spellings."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        sizes = [WIDTH] * 3 if kind == "separate" else [3 * WIDTH]
        self.inner = nn.ModuleList(nn.Linear(WIDTH, n) for n in sizes)
        self.outer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        size = WIDTH // HEADS
        if self.kind == "timm":
            q, k, v = self.inner[0](x).reshape(batch, tokens, 3, HEADS, size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = [layer(x) for layer in self.inner] if self.kind == "separate" else self.inner[0](x).chunk(3, -1)
            q, k, v = (t.view(batch, tokens, HEADS, size).transpose(1, 2) for t in parts)
        if self.kind == "separate":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) / math.sqrt(size)).softmax(-1) @ v
        return self.outer(y.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and added to its input."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(kind)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Encoder(nn.Module):
    """Two blocks, mean over tokens, head: (n, 16, 20), or images (n, 3, 16, 16), to (n, 10)."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = nn.Conv2d(3, WIDTH, 4, 4) if kind == "vision" else nn.Linear(20, WIDTH)
        self.position = nn.Parameter(torch.randn(1, TOKENS + 4, WIDTH) * 0.3)
        if kind == "torch":
            options = {"activation": "gelu", "batch_first": True, "norm_first": True}
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **options) for _ in range(2)
            )
        else:
            self.blocks = nn.ModuleList(Block("separate" if kind == "vision" else kind) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.embed(x)
        if self.kind == "vision":
            x = x.flatten(2).transpose(1, 2)
        x = x + self.position[:, :TOKENS]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def network(kind):
    """(network, inputs float32)."""
    torch.manual_seed(1)
    net = Encoder(kind).eval()
    return net, torch.randn(48, *((3, 16, 16) if kind == "vision" else (TOKENS, 20)))


def quantized(net, x, **fields):
    """The model after static quantization."""
    model = trace(net, {"x": x[:2]}, "net")
    data = Data({"x": x.numpy()}, None, "d")
    return Static(**fields).apply(
        model, Context(model, data, targets.load("stm32f446"), torch.Generator().manual_seed(0))
    )


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """(kind, network, inputs, quantized model, QDQ model)."""
    net, x = network(request.param)
    result = quantized(net, x)
    return request.param, net, x, result, to_onnx(result)


def cosine(a, b):
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_close_to_float(made):
    _, net, x, result, _ = made
    with torch.no_grad():
        want, got = net(x).numpy(), result(x).numpy()
    assert cosine(want, got) > 0.999
    assert (want.argmax(1) == got.argmax(1)).mean() > 0.9


def test_only_the_factors_of_norms_stay_float(made):
    _, _, _, result, _ = made
    left = [e for e in result.receipt if e.action == "left"]
    assert left and all("layer norm" in e.reason for e in left)
    assert {e.tensor for e in result.receipt if "position" in e.tensor and e.action == "quantized"}


def test_every_spelling_is_the_same_few_kernels(made):
    """No copy is left of the reshapes, transposes and slices around attention, nor of its scale."""
    kind, _, _, _, model = made
    graph = qdq.read(model)
    found = Counter(n.op for n in graph.nodes if not graph.alias(n))
    inner = 3 if kind in ("separate", "vision") else 1
    linear = 2 * (inner + 3) + 1 + (kind != "vision")
    expected = {"fully_connected": linear, "add": 5, "layer_norm": 5, "matmul": 4, "softmax": 2, "lookup": 2}
    assert found == {**expected, "global_average_pool": 1} | ({"conv2d": 1} if kind == "vision" else {})


def test_near_onnxruntime(made, ort_outputs):
    """A layer norm, GELU or mean that lies next to a rounding boundary moves a few codes by one; the output by 3 at most."""
    _, net, x, _, model = made
    graph = qdq.read(model)
    (ours,), (theirs,) = graph.reference({"x": x.numpy()}).values(), ort_outputs(model, {"x": x.numpy()}).values()
    steps = np.rint((ours - theirs) / graph.outputs[0].tensor.scale)
    assert np.abs(steps).max() <= 3
    assert (steps != 0).mean() < 0.05
    with torch.no_grad():
        assert cosine(ours, net(x).numpy()) > 0.999


@NEEDS_ZIG
@pytest.mark.parametrize("target", ["stm32f446", "rp2040"])
def test_equal_on_cores(target, made, tmp_path):
    kind, _, x, _, model = made
    if target == "rp2040" and kind != "torch":
        pytest.skip("software floats are slow to emulate: one spelling is enough")
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    from planish.runtimes.c import C
    from planish.runtimes.emulator import Emulator

    graph = qdq.read(model)
    samples = {"x": x[:2].numpy()}
    expected = next(iter(graph.reference(samples).values()))
    c_format.write_project(graph, "net", targets.load(target), samples, tmp_path, [])
    artifact = Artifact(tmp_path, {"format": "c", "target": target})
    for runtime in (Emulator(), C()):
        with runtime.open(artifact, 1) as session:
            (got,) = session.run(samples).values()
        np.testing.assert_array_equal(got, expected)


def test_four_bit_weights(tmp_path):
    net, x = network("separate")
    with torch.no_grad():
        want = net(x).numpy()
        got = quantized(net, x, weight_bits=4)(x).numpy()
    assert cosine(want, got) > 0.99


@pytest.mark.parametrize("opset", [17, 20])
def test_quantized_by_another_tool(opset, ort_outputs, tmp_path):
    """ONNX Runtime's quantizer on a float export; with opset 17 GELU is written out, around an Erf that stays float."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    net, x = network("chunk")
    path = tmp_path / "float.onnx"
    logging.disable(logging.WARNING)
    shapes = {"x": {0: torch.export.Dim("n")}}
    program = torch.onnx.export(net, (x[:2],), dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(path)
    model = onnx.load(path)
    if opset == 17:
        write_gelu_out(model)
    model = onnx.shape_inference.infer_shapes(model)
    name = model.graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{name: x.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    options = {"quant_format": QuantFormat.QDQ, "per_channel": True, "activation_type": QuantType.QUInt8}
    quantize_static(model, str(tmp_path / "qdq.onnx"), Reader(), **options)
    logging.disable(logging.NOTSET)
    made = onnx.load(tmp_path / "qdq.onnx")
    graph = qdq.read(made)
    found = Counter(n.op for n in graph.nodes if not graph.alias(n))
    assert (found["matmul"], found["softmax"], found["layer_norm"], found["lookup"]) == (4, 2, 5, 2)
    assert not found["transpose"] + found["reshape"] + found["slice"]
    (ours,), (theirs,) = (
        graph.reference({name: x.numpy()}).values(),
        ort_outputs(made, {name: x.numpy()}).values(),
    )
    assert np.abs(np.rint((ours - theirs) / graph.outputs[0].tensor.scale)).max() <= 3


def write_gelu_out(model):
    """Every Gelu as x * (erf(x / sqrt 2) + 1) * 0.5, as exporters of older opsets do."""
    from onnx import helper, numpy_helper

    numbers = {"root": 2**0.5, "one": 1.0, "half": 0.5}
    model.graph.initializer.extend(numpy_helper.from_array(np.float32(v), k) for k, v in numbers.items())
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gelu":
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        steps = [("Div", [x, "root"]), ("Erf", [f"{y}_step0"]), ("Add", [f"{y}_step1", "one"]), ("Mul", [x, f"{y}_step2"]), ("Mul", [f"{y}_step3", "half"])]  # fmt: skip
        names = [f"{y}_step{i}" for i in range(4)] + [y]
        nodes += [helper.make_node(k, i, [o], name=f"written_{o}") for (k, i), o in zip(steps, names, strict=True)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


class Masked(nn.Module):
    """Causal attention, fused or with a mask that fills in -inf."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.inner, self.outer = fused, nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x):
        q, k, v = (t.view(-1, 8, 2, 16).transpose(1, 2) for t in self.inner(x).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            hidden = torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)
            y = (q @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.outer(y.transpose(1, 2).reshape(-1, 8, 32))


@pytest.mark.parametrize("fused", [True, False])
def test_masked_attention_stays_float_and_c_refuses_it_in_a_line(fused):
    torch.manual_seed(0)
    net, x = Masked(fused).eval(), torch.randn(16, 8, 32)
    result = quantized(net, x)
    assert any("no integer form" in e.reason for e in result.receipt)
    with torch.no_grad():
        assert cosine(net(x).numpy(), result(x).numpy()) > 0.999
    with pytest.raises(PlanishError) as caught:
        qdq.read(to_onnx(result))
    assert "\n" not in str(caught.value)
