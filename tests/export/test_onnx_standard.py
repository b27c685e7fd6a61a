"""Low-bit weights in ops of the ONNX standard alone: the same answers, the same bytes after loading."""

import numpy as np
import onnx
import pytest
import torch
from planish import pipeline
from planish.common.errors import PlanishError
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.nf4 import Nf4
from planish.compress.quantize.rtn import RoundToNearest
from planish.export.format import Source
from planish.export.lowering import lowered, to_onnx
from planish.export.onnx import optimized
from planish.export.onnx_standard import OnnxStandard, standard
from planish.runtimes import ort
from planish.targets import target
from torch import nn


def source(step, width=96):
    """Two layers after one pass, with a few samples."""
    torch.manual_seed(0)
    model = trace(
        nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10, bias=False)),
        {"x": torch.zeros(1, width)},
        "net",
    )
    model = step.apply(model, Context(model, None, target.load("host"), torch.Generator()))
    graph = to_onnx(model, lower=False)
    x = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    return Source(lowered(graph), {"x": x}, "net", fused=graph)


@pytest.mark.parametrize(
    "bits, symmetric, group", [(4, True, 32), (4, False, 32), (8, True, 16), (3, False, 32), (4, True, 48)]
)
def test_the_answers_and_the_bytes_stay(tmp_path, bits, symmetric, group):
    step = RoundToNearest(bits=bits, group=group if group != 48 else "auto", symmetric=symmetric)
    given = source(step)
    OnnxStandard().write(given, target.load("host"), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert {n.domain for n in model.graph.node} == {""} and {o.domain for o in model.opset_import} == {""}
    onnx.checker.check_model(model, full_check=True)
    blocks = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(blocks) == 2 and all(any(a.name == "block_size" and a.i >= 16 for a in n.attribute) for n in blocks)
    want = ort.run(ort.create(given.onnx.SerializeToString(), 1), given.golden_inputs)["output"]
    got = ort.run(ort.create(tmp_path / "model.onnx", 1), given.golden_inputs)["output"]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    runs = optimized(tmp_path / "model.onnx")
    assert sum(n.op_type == "MatMulNBits" for n in runs.graph.node) == 2  # fused again, nothing restored
    stored = {c.name: len(c.raw_data) for c in model.graph.initializer}
    assert sum(len(c.raw_data) for c in runs.graph.initializer) <= 1.3 * sum(stored.values())


def test_what_has_no_standard_form_is_named():
    with pytest.raises(
        PlanishError, match=r"format 'onnx_standard' has no form for '.*MatMulBnb4.*'; format 'onnx' runs them"
    ):
        standard(source(Nf4()).onnx)


def test_through_the_verbs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))\n"
    )
    np.savez("data.npz", input=np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32))
    pipeline.compress("net.py:net", data="data.npz", recipe="w4a16-rtn", output=tmp_path / "small")
    report = pipeline.export(str(tmp_path / "small"), format="onnx_standard", output=tmp_path / "artifact")
    assert report["format"] == "onnx_standard"
    checked = pipeline.verify(tmp_path / "artifact")
    assert checked["ok"] and checked["runtime"] == "ort"
    assert pipeline.evaluate(str(tmp_path / "artifact"))["value"] > 0.98
