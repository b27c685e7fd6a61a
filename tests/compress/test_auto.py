"""Automatic mixed precision: exact solutions, budgets kept, pins kept, no uniform assignment better."""

import itertools

import numpy as np
import pytest
import torch
from planish.common.errors import PlanishError
from planish.compress import layers, recipe
from planish.compress.data import Data
from planish.compress.evaluation import closeness, language
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize import auto, sensitivity
from planish.compress.quantize.auto import Auto
from planish.compress.quantize.knapsack import solve
from planish.compress.quantize.rtn import RoundToNearest
from planish.targets import target


def context(model, data, time=None, device="host"):
    return Context(model, data, target.load(device), torch.Generator().manual_seed(0), time)


@pytest.mark.parametrize("ties", [False, True])
def test_solutions_are_those_of_brute_force(ties):
    rng = np.random.default_rng(0)
    for _ in range(200):
        costs = [rng.integers(1, 40, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 7))]
        scale = 10 ** rng.uniform(-9, 2)
        losses = [(rng.integers(0, 9, len(c)) if ties else rng.random(len(c)) * scale).tolist() for c in costs]
        budget = int(rng.integers(sum(map(min, costs)), sum(map(max, costs)) + 1))
        found = solve(costs, losses, budget)
        every = itertools.product(*(range(len(c)) for c in costs))
        allowed = [a for a in every if sum(c[i] for c, i in zip(costs, a, strict=True)) <= budget]
        best = min(sum(x[i] for x, i in zip(losses, a, strict=True)) for a in allowed)
        assert found.cost <= budget
        assert found.loss == pytest.approx(best, rel=1e-12, abs=0)


def test_large_problems_are_solved_too():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 8, 400) * 65536
    costs = [[int(n * b / 8) for b in (8, 4, 3, 2)] for n in sizes]
    losses = [sorted((rng.random(4) * s).tolist()) for s in 10 ** rng.uniform(-5, -1, 400)]
    budget = int(sizes.sum() * 4.5 / 8)
    found = solve(costs, losses, budget)
    assert budget - 65536 < found.cost <= budget
    greedy = sum(x[1] for x in losses)
    assert found.loss < greedy


def test_an_impossible_budget_names_the_least():
    with pytest.raises(PlanishError, match="budget of 5 cannot be kept: the smallest assignment costs 6"):
        solve([[4, 8], [2, 3]], [[1, 0], [1, 0]], 5)


@pytest.fixture(scope="module")
def measured(decoder, tokens):
    """Loss and bytes of every layer at every width, as the pass measures them."""
    methods = {b: RoundToNearest(bits=b) for b in (8, 4, 3, 2)}
    names = [n for n in auto._linears(decoder, ["*"]) if n != "lm_head"]
    batches = list(tokens.sample(16, torch.Generator().manual_seed(0)).batches(decoder, 4))
    generator = torch.Generator().manual_seed(0)
    found = {}
    for item, candidates in sensitivity.measure(decoder, batches, dict.fromkeys(names, methods), generator, True):
        found[item.name] = {c.choice: c for c in candidates}
    return found


def test_one_layers_loss_is_that_of_the_model_with_it_quantized(decoder, tokens, measured):
    assert len(measured) == 14
    rows = tokens.sample(16, torch.Generator().manual_seed(0)).inputs["input_ids"]
    name = "layers.1.down_proj"
    changed = RoundToNearest(bits=3, layers=(name,)).apply(decoder, context(decoder, None))
    kl = closeness(language(decoder), language(changed), rows).kl
    assert measured[name][3].kl == pytest.approx(kl, rel=1e-3)
    for forms in measured.values():
        assert forms[8].kl < forms[4].kl < forms[2].kl
        assert forms[8].error < forms[4].error < forms[3].error < forms[2].error
        assert forms[8].bytes > forms[4].bytes > forms[3].bytes > forms[2].bytes


@pytest.fixture(scope="module")
def mixed(decoder, tokens):
    return Auto(bits=4.5).apply(decoder, context(decoder, tokens))


def decided(model):
    """Format by layer."""
    return {
        e.tensor.removesuffix(".weight"): e.reason.partition(" of ")[0] for e in model.receipt if e.action == "chosen"
    }


def test_the_assignment_is_kept_and_within_the_budget(decoder, mixed, measured):
    formats = decided(mixed)
    assert len(formats) == 14 and len(set(formats.values())) > 1
    bits = {n: int(f.removeprefix("rtn bits=")) for n, f in formats.items()}
    nodes = [n for n in mixed.graph.graph.nodes if "linear_wna16" in str(n.target)]
    assert len(nodes) == 14
    spent = sum(measured[n][b].bytes for n, b in bits.items())
    weights = sum(p.numel() for n, p in decoder.graph.named_parameters() if n.removesuffix(".weight") in formats)
    assert spent <= 4.5 * weights / 8
    assert mixed.bytes() == decoder.bytes() - 4 * weights + spent


@pytest.mark.parametrize("bits", [4, 3])
def test_no_uniform_assignment_of_the_budget_is_better(decoder, tokens, measured, bits):
    budget = sum(forms[bits].bytes for forms in measured.values())
    rest = decoder.bytes() - sum(4 * decoder.graph.get_parameter(f"{n}.weight").numel() for n in measured)
    found = Auto(bytes=rest + budget).apply(decoder, context(decoder, tokens))
    chosen = {n: int(f.removeprefix("rtn bits=")) for n, f in decided(found).items()}
    assert sum(measured[n][b].bytes for n, b in chosen.items()) <= budget
    assert found.bytes() <= rest + budget
    assert sum(measured[n][b].kl for n, b in chosen.items()) <= sum(f[bits].kl for f in measured.values())


def test_pins_choices_and_objective(decoder, tokens):
    config = Auto(
        bits=6.0,
        objective="output",
        choices=("float", {"quantize.dynamic": {}}, 4, 2),
        pins={"layers.0.*": 8, "layers.0.down_proj": "float", "lm_head": 4},
    )
    found = config.apply(decoder, context(decoder, tokens))
    formats = decided(found)
    assert {f for n, f in formats.items() if n.startswith("layers.0.")} == {"rtn bits=8"}
    assert "layers.0.down_proj" not in formats and formats["lm_head"] == "rtn bits=4"
    assert {f for n, f in formats.items() if n.startswith("layers.1.")} <= {
        "float",
        "dynamic",
        "rtn bits=4",
        "rtn bits=2",
    }
    assert any("output error" in e.reason for e in found.receipt)


def test_time_is_asked_once_for_each_shape_and_the_table_gives_the_same_model(decoder, tokens):
    asked = []

    def time(model, inputs):
        width = inputs["x"].shape[1]
        out = model(torch.from_numpy(inputs["x"])).shape[1]
        float_ = any("aten.linear" in str(n.target) for n in model.graph.graph.nodes)
        asked.append((out, width, float_))
        return out * width * (4e-6 if float_ else 1e-6)

    fields = {"choices": ("float", "quantize.dynamic", 4), "objective": "output", "samples": 8}
    found = Auto(milliseconds=0.12, **fields).apply(decoder, context(decoder, tokens, time))
    assert len(asked) == 3 * 4  # 64x64, 32x64, 96x64, 64x96
    table = {e.tensor: float(e.reason.split()[0]) for e in found.receipt if e.action == "timed"}
    assert len(table) == 12 and "float 64x96" in table
    again = Auto(milliseconds=0.12, table=table, **fields).apply(decoder, context(decoder, tokens))
    assert again.receipt == found.receipt
    a, b = found.graph.state_dict(), again.graph.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    total = sum(table[f"float {o}x{i}"] for o, i in [(64, 64)] * 4 + [(32, 64)] * 4 + [(96, 64)] * 4 + [(64, 96)] * 2)
    assert total > 0.12
    with pytest.raises(PlanishError, match="the table has no 'linear_dynamic"):
        Auto(milliseconds=0.12, table={"x": 1.0}, **fields).apply(decoder, context(decoder, tokens))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 2.0}, r"smallest model has 2\.6 bits; bits: 2 was asked for"),
        ({"bytes": 30_000}, r"smallest model has \d+ bytes; bytes: 30000 was asked for"),
        ({"bits": 4.0, "choices": (5,)}, r"choice 'rtn bits=5', bits: "),
        ({"bits": 4.0, "choices": ("quantize.static",)}, r"'quantize.static' is no choice; accepted: bits of quantize.rtn, float, "),
        ({"bits": 4.0, "pins": {"x*": 8}}, r"'x\*' matches no linear layer"),
        ({"bits": 4.0, "pins": {"*": "float"}}, "every layer is pinned to float"),
        ({"milliseconds": 1.0}, "nothing here times layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(decoder, tokens, fields, message):
    with pytest.raises(PlanishError, match=message):
        Auto(**{"objective": "output", "samples": 4, **fields}).apply(decoder, context(decoder, tokens))


def test_other_devices_are_not_timed_here(decoder, tokens):
    with pytest.raises(
        PlanishError, match="on this machine only, not for 'raspberry-pi-5'; give bytes, bits or a table"
    ):
        Auto(milliseconds=1.0).apply(decoder, context(decoder, tokens, lambda m, i: 1.0, "raspberry-pi-5"))


def test_recipes_say_which_budget():
    text = "name: x\npasses:\n  - quantize.auto: {{{}}}\n"
    with pytest.raises(PlanishError, match="one budget is given by bits, bytes or milliseconds, found none"):
        recipe.parse(text.format(""), "x.yaml")
    with pytest.raises(PlanishError, match="found 'bits', 'bytes'"):
        recipe.parse(text.format("bits: 4.0, bytes: 5"), "x.yaml")
    given = text.format('bits: 4.5, choices: [8, {quantize.rtn: {bits: 4, group: 32}}], pins: {"lm_*": 8}')
    ((_, step),) = recipe.parse(given, "x.yaml").passes
    assert auto.label(step.choices[1]) == "rtn bits=4 group=32"


def test_an_embedding_can_be_pinned_to_float():
    module = torch.nn.Sequential(torch.nn.Embedding(20, 32), torch.nn.Linear(32, 8))
    model = trace(module, {"tokens": torch.zeros(1, 4, dtype=torch.int64)}, "net")
    data = Data({"tokens": np.random.default_rng(0).integers(0, 20, (16, 4))}, None, "data")
    context = Context(model, data, target.load("host"), torch.Generator())
    found = Auto(bits=4.5, pins={"0": "float"}).apply(model, context)
    assert layers.tensor(found.graph, "0.weight").dtype == torch.float32
    with pytest.raises(PlanishError, match=r"'2' matches no linear layer"):
        Auto(bits=4.5, pins={"2": "float"}).apply(model, context)
