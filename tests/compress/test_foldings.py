"""Folding: in float64 the network computes what it did, the tensor is divided as asked, and no other reader sees a change."""

import pytest
import torch
from planish.compress import blocks, foldings, layers
from planish.compress.model import trace
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, GROUPS, SIZE = 24, 4, 2, 6


class Rms(nn.Module):
    """RMSNorm as transformers writes it: weight * x."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Net(nn.Module):
    """One producer, then a linear that reads it."""

    def __init__(self, before, width=WIDTH):
        super().__init__()
        self.before = before
        self.reader = nn.Linear(width, 8)

    def forward(self, x):
        return self.reader(self.before(x))


class Gated(nn.Module):
    """silu(gate) * up."""

    def __init__(self, bias=True):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 32, bias=bias), nn.Linear(WIDTH, 32, bias=bias)

    def forward(self, x):
        return F.silu(self.gate(x)) * self.up(x)


class Attention(nn.Module):
    """Grouped-query attention without its output projection; heads repeated by op, by expansion, or inside the attention."""

    def __init__(self, how, fused=True):
        super().__init__()
        self.how, self.fused = how, fused
        self.q = nn.Linear(WIDTH, HEADS * SIZE)
        self.k, self.v = nn.Linear(WIDTH, GROUPS * SIZE), nn.Linear(WIDTH, GROUPS * SIZE)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, SIZE).transpose(1, 2)
        k = self.k(x).view(b, t, GROUPS, SIZE).transpose(1, 2)
        v = self.v(x).view(b, t, GROUPS, SIZE).transpose(1, 2)
        if self.how == "op":
            k, v = (a.repeat_interleave(HEADS // GROUPS, 1) for a in (k, v))
        elif self.how == "expand":
            k, v = (a[:, :, None].expand(b, GROUPS, 2, t, SIZE).reshape(b, HEADS, t, SIZE) for a in (k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.how == "inside")
        else:
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return y.transpose(1, 2).reshape(b, t, HEADS * SIZE)


class Packed(nn.Module):
    """Query, key and value from one linear, as vision transformers have it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        if self.how == "unbind":
            q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "select":
            y = self.qkv(x).reshape(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
            q, k, v = y[0], y[1], y[2]
        else:
            q, k, v = (a.view(b, t, HEADS, SIZE).transpose(1, 2) for a in self.qkv(x).split(WIDTH, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, WIDTH)


class Sum(nn.Module):
    """A sum of two linears, and a constant."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.shift = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.one(x) + self.two(x) + self.shift


FOLDED = {
    "rms norm as a product": (Rms(), WIDTH, ["before.weight"]),
    "rms norm": (nn.RMSNorm(WIDTH), WIDTH, ["before.weight"]),
    "layer norm": (nn.LayerNorm(WIDTH), WIDTH, ["before.weight", "before.bias"]),
    "layer norm without shift": (nn.LayerNorm(WIDTH, bias=False), WIDTH, ["before.weight"]),
    "linear": (nn.Linear(WIDTH, 16), 16, ["before.weight", "before.bias"]),
    "linear without bias": (nn.Linear(WIDTH, 16, bias=False), 16, ["before.weight"]),
    "linear and relu": (nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU()), 16, ["before.0.weight", "before.0.bias"]),
    "product": (Gated(), 32, ["before.up.weight", "before.up.bias"]),
    "sum": (Sum(), WIDTH, ["before.one.weight", "before.one.bias", "before.two.weight", "before.shift"]),
    "attention": (Attention("op"), WIDTH, ["before.v.weight", "before.v.bias"]),
    "attention, expanded": (Attention("expand"), WIDTH, ["before.v.weight", "before.v.bias"]),
    "attention, grouped inside": (Attention("inside"), WIDTH, ["before.v.weight", "before.v.bias"]),
    "attention as products": (Attention("op", fused=False), WIDTH, ["before.v.weight", "before.v.bias"]),
    "packed, unbind": (Packed("unbind"), WIDTH, ["before.qkv.weight", "before.qkv.bias"]),
    "packed, select": (Packed("select"), WIDTH, ["before.qkv.weight", "before.qkv.bias"]),
    "packed, split": (Packed("split"), WIDTH, ["before.qkv.weight", "before.qkv.bias"]),
}
SHARED = {"attention", "attention, expanded", "attention, grouped inside", "attention as products"}


class Square(nn.Module):
    """Both factors of a product are one tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.inner(x)
        return y * y


class Twice(nn.Module):
    """Another reader of the tensor: a sum, an output, or a layer that is not scaled."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norm = Rms()
        self.reader = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        z = self.reader(y)
        return (z, y) if self.how == "output" else z + y


INSERTED = {
    "the model's input": Net(nn.Identity()),
    "silu": Net(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())),
    "softmax": Net(nn.Softmax(-1)),
    "a square": Net(Square()),
    "another reader": Twice("sum"),
    "an output": Twice("output"),
}


def wide(module, dtype=torch.float64):
    """The module with weights as trained ones are, traced in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1))
    return trace(module.to(dtype), {"x": torch.zeros(2, 5, WIDTH, dtype=dtype)}, "net").copy()


def folded(model, factors=None, name="reader"):
    """The model with the reader's input divided; its folding and the channels' factors."""
    module = model.graph
    (reader,) = [n for n in module.graph.nodes if layers.layer(n) == name and blocks.linear(module, n)]
    source = reader.args[0]
    folding = foldings.find(module, source, [reader], foldings.concrete(model))
    if factors is None:
        factors = torch.rand(folding.count, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4 + 0.2
    foldings.divide(module, source, [reader], folding, factors[: folding.count])
    foldings.scale_columns(module, reader, factors[folding.channels])
    layers.drop_unused(module)
    return folding, factors[folding.channels], reader


def changed(before, after):
    return [n for n, p in before.graph.named_parameters() if not torch.equal(p, after.graph.get_parameter(n))]


def value(model, node_name, x):
    seen = {}
    run = torch.fx.Interpreter(model.graph)
    run.run_node = lambda n: seen.setdefault(n.name, torch.fx.Interpreter.run_node(run, n))
    with torch.no_grad():
        run.run(x)
    return seen[node_name]


@pytest.mark.parametrize("name", FOLDED)
def test_the_network_stays_and_the_tensor_is_divided(name):
    before, width, constants = FOLDED[name]
    model = wide(Net(before, width))
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = model(x)
    original = model.copy()
    nodes = sum(n.op == "call_function" for n in model.graph.graph.nodes)
    folding, factors, reader = folded(model)
    got = model(x)
    assert float((got - expected).detach().abs().max()) < 1e-12 * float(expected.detach().abs().max())
    assert sorted(changed(original, model)) == sorted([*constants, "reader.weight"])
    assert sum(n.op == "call_function" for n in model.graph.graph.nodes) == nodes  # nothing is added at run time
    assert folding.count == (GROUPS * SIZE if name in SHARED else width)
    was, now = (value(m, reader.args[0].name, x) for m in (original, model))
    assert torch.allclose(was / factors, now, rtol=1e-12, atol=1e-14)


def test_a_norm_without_gain_gets_one():
    model = wide(Net(nn.LayerNorm(WIDTH, elementwise_affine=False)))
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = model(x)
    folding, _, _ = folded(model)
    assert folding.places
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", INSERTED)
def test_where_nothing_can_be_folded_a_multiplication_is_inserted(name):
    model = wide(INSERTED[name])
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = model(x)
    folding, _, reader = folded(model)
    assert folding.where == "a multiplication" and reader.args[0].target is torch.ops.aten.mul.Tensor
    got = model(x)
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, expected)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_powers_of_two_are_exact_in_float32():
    model = wide(Net(Gated(), 32), torch.float32)
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    folded(model, 2.0 ** torch.randint(-3, 4, (32,), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(model(x), expected)


def test_a_constant_that_two_layers_read_is_divided_for_one_of_them():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.reader = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
            self.table = nn.Embedding(WIDTH, WIDTH)
            self.first.weight = self.table.weight

        def forward(self, x):
            return self.reader(self.first(x)) + self.table.weight.sum(0)

    model = wide(Tied())
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = model(x)
    folded(model)
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


def test_channels_with_a_common_factor_are_seen_together():
    folding = foldings.Folding(torch.tensor([0, 1, 0, 1]), 2)
    assert folding.joined(torch.tensor([1.0, 2, 5, 3])).tolist() == [5, 3]
    assert folding.joined(torch.tensor([1.0, 2, 5, 3]), "mean").tolist() == [3, 2.5]


def test_a_cache_output_keeps_its_values(decoder, tokens):
    """Values go to the cache as well, so the factor of o_proj's input must not go into v_proj."""
    model = decoder.copy()
    feeds = model.feeds({k: v[:4] for k, v in tokens.inputs.items()})
    expected = model(*feeds)
    _, _, reader = folded(model, torch.linspace(0.5, 2, 64), "layers.1.self_attn.o_proj")
    assert reader.args[0].target is torch.ops.aten.mul.Tensor
    for a, b in zip(model(*feeds), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
