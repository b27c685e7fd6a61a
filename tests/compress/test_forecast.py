"""A dry run says what the real run then does: bytes to the byte, and every layer that it would refuse."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planish import cli
from planish.common.errors import PlanishError
from planish.compress import forecast, recipe
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.targets import target
from torch import nn

WIDTH = 96


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.out = (nn.Linear(WIDTH, WIDTH, bias=b) for b in (True, False, True))

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(torch.relu(self.q(h)) * torch.sigmoid(self.k(h)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids):
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trace(Net(), {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}, "net")


@pytest.fixture(scope="module")
def data():
    return Data({"input_ids": np.random.default_rng(0).integers(0, 50, (20, 12))}, None, "data")


def passes(*lines):
    return recipe.parse("name: x\npasses:\n" + "".join(f"  - {line}\n" for line in lines), "test").passes


@pytest.mark.parametrize(
    "lines",
    [
        ["quantize.rtn: {group: 32}"],
        ["quantize.rtn: {bits: 3, group: null, symmetric: false}"],
        ["quantize.gptq: {bits: 2, group: 48}"],
        ["quantize.hqq: {group: 32}"],
        ["quantize.dynamic"],
        ["quantize.nf4"],
        ["quantize.nf4: {block: 64, nested: true}"],
        ["quantize.fp4: {block: 128}"],
        ["quantize.mxfp4"],
        ["quantize.nvfp4"],
        ["quantize.fp8"],
        ["quantize.ovp"],
        ["quantize.ovp: {bits: 8, activations: 8}"],
        ["quantize.svdquant: {rank: 8, rounds: 1}"],
        ["quantize.svdquant: {rank: 8, rounds: 0, group: 64, bits: 8, activations: 8}"],
        ["quantize.llm_int8: {threshold: 1000.0}"],
        ["quantize.smoothquant", "quantize.dynamic"],
        ["quantize.rtn: {layers: ['*.q'], group: 32}", "quantize.dynamic: {layers: ['*.k', '*.out']}"],
        ["quantize.rtn: {skip: [], group: 32}"],
    ],
    ids=lambda lines: lines[-1].removeprefix("quantize."),
)
def test_bytes_are_exact(model, data, lines):
    plan = passes(*lines)
    found = forecast.forecast(model, plan, data, 0)
    result = model
    for _, step in plan:
        result = step.apply(result, Context(model, data, target.load("host"), torch.Generator().manual_seed(0)))
    assert (found.original_bytes, found.bytes) == (model.bytes(), result.bytes() - added(result))
    assert found.layers == sum(e.action == "quantized" for e in result.receipt)
    assert not found.problems and not found.unknown


def added(model):
    """Biases that a method gave to layers without one, which the data decides."""
    return sum(b.numel() * 4 for n, b in model.graph.named_parameters() if n.endswith(".k.bias"))


def test_every_layer_that_does_not_fit_is_named(model, data):
    found = forecast.forecast(model, passes("quantize.gptq: {group: 64}"), data, 0)
    assert len(found.problems) == 4  # q and k read the same tensor
    assert "layers.0.q" in found.problems[0] and "64" in found.problems[0] and "96" in found.problems[0]
    (own, *_) = passes("quantize.gptq: {group: 64}")
    with pytest.raises(PlanishError) as refusal:
        own[1].apply(model, Context(model, data, target.load("host"), torch.Generator()))
    assert found.problems[0] == f"quantize.gptq: {refusal.value}"


def test_memory_grows_with_what_a_run_holds(model, data):
    def peak(step, samples=data):
        return forecast.forecast(model, passes(step), samples, 1000).peak_memory_bytes

    alone, calibrated = peak("quantize.rtn: {group: 32}"), peak("quantize.gptq: {group: 32}")
    assert 1000 < alone < calibrated
    long = replace(data, inputs={"input_ids": np.zeros((20, 12), np.int64).repeat(40, 0)})
    assert peak("quantize.gptq: {group: 32, samples: 800}", long) > calibrated + 700 * 12 * WIDTH * 4


def test_what_is_not_foreseen_is_said(model, data):
    found = forecast.forecast(model, passes("quantize.rotate", "quantize.rtn: {group: 32}"), data, 0)
    assert found.unknown == ("quantize.rotate",) and found.bytes is None and found.peak_memory_bytes is None


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4))\n"
    )
    Path("low.yaml").write_text("name: low\npasses:\n  - quantize.rtn: {bits: 4, group: 16}\n")

    def planish(*words):
        sys.argv = ["planish", "compress", "net.py:net", "-i", "input=1,40", "-o", "out", "--dry-run", *words]
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    code, out, err = planish("-r", "low.yaml")
    assert code == 1 and err.splitlines()[-1] == "error: dry run: 2 layers do not fit the recipe"
    assert "problem: quantize.rtn: layer '0'" in out
    Path("low.yaml").write_text("name: low\npasses:\n  - quantize.rtn: {bits: 4, group: 8}\n")
    code, out, err = planish("-r", "low.yaml", "--json")
    report = json.loads(out)
    assert code == 0 and report["bytes"] == 8 * 5 * (4 + 4) + 4 * (4 + 4) + 12 * 4 and report["layers"] == 2
    assert not Path("out").exists()
    assert planish("-r", "w8a8-static", "-d", "none.npz")[0] == 1
