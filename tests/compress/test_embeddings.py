"""Quantized embeddings: what is stored is what is computed and foretold, a shared table waits for its projection, faults are one line."""

import functools

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import diagnostics, forecast, layers, recipe
from planish.compress.journal import Journal
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize import grids
from planish.compress.quantize.embeddings import Embeddings
from planish.compress.quantize.rtn import RoundToNearest
from planish.export import lowering
from planish.kernels.linear_wna16 import dequantize
from planish.runtimes import ort
from planish.targets import target
from torch import nn

ROWS, WIDTH = 50, 96


class Encoder(nn.Module):
    """Words and positions, one layer, and an output projection that may share the words' table."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.positions = nn.Embedding(ROWS, WIDTH, padding_idx=0), nn.Embedding(12, WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.words.weight = self.head.weight

    def forward(self, input_ids):
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(torch.relu(self.layer(x)))


IDS = torch.arange(24).reshape(2, 12)


@functools.cache
def network(tied=False):
    return trace(Encoder(tied), {"input_ids": IDS}, "net")


def in_half(model):
    """The words in 16 bits, rows converted behind the look-up, as a folder of Hugging Face is loaded."""
    model = model.copy()
    graph = model.graph.graph
    layers.set_tensor(model.graph, "words.weight", model.graph.get_parameter("words.weight").half())
    node = next(n for n in graph.nodes if layers.op(n) == "aten.embedding" and n.args[0].target == "words.weight")
    with graph.inserting_after(node):
        made = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float32})
    node.replace_all_uses_with(made, delete_user_cb=lambda n: n is not made)
    model.graph.recompile()
    return model


def run(model, *steps, journal=None):
    context = Context(model, None, target.load("host"), torch.Generator().manual_seed(0), journal=journal or Journal())
    for step in steps:
        model = step.apply(model, context)
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_tables_are_rounded_to_the_grids_of_round_to_nearest(bits, symmetric, clip):
    model = network()
    result = run(model, Embeddings(bits=bits, symmetric=symmetric, clip=clip))
    stored = result.graph.state_dict()
    restored = {}
    for name, group in (("words", 32), ("positions", 32)):
        table = model.graph.get_parameter(f"{name}.weight").detach()
        grid = grids.fit(table, bits, group, symmetric, clip)
        parts = [stored.get(f"{name}.weight_{p}") for p in ("codes", "scale", "zero_point")]
        restored[name] = dequantize(*parts, bits, group)
        torch.testing.assert_close(restored[name], grid.decode(grid.encode(table)), rtol=0, atol=0)
        entry = next(e for e in result.receipt if e.tensor == f"{name}.weight")
        off = (restored[name] - table).norm() / table.norm()
        assert entry.action == "quantized" and entry.error == pytest.approx(float(off), rel=1e-4)
        assert entry.after_bytes == len(table) * (WIDTH * bits // 8 + 3 * (4 if symmetric else 5))
    module = Encoder()
    with torch.no_grad():
        for name, table in restored.items():
            getattr(module, name).weight.copy_(table)
        torch.testing.assert_close(result(IDS), module(IDS))
    assert not {"words.weight", "positions.weight"} & set(stored)


@pytest.mark.parametrize("half", [False, True])
def test_the_exported_model_computes_the_same(half):
    model = network()
    result = run(in_half(model) if half else model, Embeddings())
    with torch.no_grad():
        want = result(IDS).numpy()
    session = ort.create(lowering.to_onnx(result).SerializeToString(), 1)
    np.testing.assert_allclose(ort.run(session, {"input_ids": IDS.numpy()})["output"], want, rtol=1e-4, atol=1e-5)


def test_a_shared_table_waits_until_its_projection_is_quantized():
    model, table = network(tied=True), "head.weight"  # torch.export keeps one name of a shared tensor
    alone = run(model, Embeddings())
    assert {e.tensor: e.action for e in alone.receipt} == {table: "left", "positions.weight": "quantized"}
    assert "shared with an output projection" in alone.receipt[0].reason
    assert torch.equal(alone.graph.get_parameter(table), model.graph.get_parameter(table))
    both = run(model, RoundToNearest(skip=()), Embeddings())
    assert all(e.action == "quantized" for e in both.receipt) and len(both.receipt) == 4
    assert not dict(both.graph.named_parameters()).keys() & {table, "positions.weight"}
    apart = run(network(), RoundToNearest(skip=()), Embeddings())
    with torch.no_grad():  # the projection's codes and the table's do not get in each other's way
        assert (both(IDS) - model(IDS)).norm() < 0.3 * model(IDS).norm()
    assert both.bytes() == apart.bytes()


@pytest.mark.parametrize(
    "lines",
    [
        ["embeddings"],
        ["embeddings: {bits: 8, group: 48, symmetric: false}"],
        ["embeddings: {skip: [positions]}"],
        ["embeddings: {layers: ['*s'], group: 96}", "rtn"],
        ["rtn: {skip: []}", "embeddings"],
        ["embeddings", "rtn"],
    ],
    ids=" + ".join,
)
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_foreseen(tied, lines):
    model = network(tied)
    plan = recipe.parse("name: x\npasses:\n" + "".join(f"  - quantize.{line}\n" for line in lines), "test").passes
    found = forecast.forecast(model, plan, None, 0)
    result = run(model, *(step for _, step in plan))
    assert (found.bytes, found.problems, found.unknown) == (result.bytes(), (), ())
    assert found.layers == sum(e.action == "quantized" for e in result.receipt)


def test_a_layer_that_the_user_skips_stays_as_it_is():
    model = network()
    result = run(model, Embeddings(skip=("words",)))
    assert {e.tensor: e.action for e in result.receipt} == {"words.weight": "left", "positions.weight": "quantized"}
    assert torch.equal(result.graph.get_parameter("words.weight"), model.graph.get_parameter("words.weight"))


def test_faults_are_named():
    model = network()
    message = "layer 'words': group 64 does not divide its 96 input channels"
    with pytest.raises(PlanishError, match=message):
        run(model, Embeddings(group=64))
    plan = [("quantize.embeddings", Embeddings(group=64))]
    assert [message in p for p in forecast.forecast(model, plan, None, 0).problems] == [True, False]  # and positions
    with pytest.raises(PlanishError, match="'nowhere' matches no embedding; embeddings: 'words', 'positions'"):
        run(model, Embeddings(layers=("nowhere",)))
    with pytest.raises(PlanishError, match=r"'\*' matches no embedding; embeddings: none"):
        run(trace(nn.Linear(4, 4), {"x": torch.zeros(2, 4)}, "linear"), Embeddings())
    broken = network().copy()
    with torch.no_grad():
        broken.graph.get_parameter("words.weight")[3, 4] = float("nan")
    with pytest.raises(PlanishError, match=r"layer 'words': its weight has 1 NaN or Inf values, the first at \(3, 4\)"):
        run(broken, Embeddings())
    for fault, said in (("bits: 3", "8 or 4"), ("group: 0", "at least one column")):
        with pytest.raises(PlanishError, match=said):
            recipe.parse(f"name: x\npasses:\n  - quantize.embeddings: {{{fault}}}\n", "r.yaml")


def test_inspect_shows_the_tables():
    rows = {r.name: r for r in diagnostics.inspect(run(network(), Embeddings())).layers}
    assert (rows["words"].bits, rows["words"].bytes) == (4, ROWS * (WIDTH // 2 + 3 * 4))
    assert rows["positions"].error is not None


def test_an_interrupted_run_goes_on_with_the_same_bytes(tmp_path):
    journal = Journal(tmp_path / "run")
    one, two = (run(network(), Embeddings(), journal=journal).graph.state_dict() for _ in range(2))
    assert sorted(p.name for p in (tmp_path / "run" / "embeddings").iterdir()) == ["positions.weight.safetensors", "words.weight.safetensors"]  # fmt: skip
    fresh = run(network(), Embeddings()).graph.state_dict()
    for other in (one, two):
        assert fresh.keys() == other.keys() and all(torch.equal(fresh[k], other[k]) for k in fresh)
