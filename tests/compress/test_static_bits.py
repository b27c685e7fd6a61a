"""Static quantization to weights of 4 and 2 bits: ranges, what compensation gains, what the receipt says."""

import pytest
import torch
from planish.compress import recipe
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize import compensation
from planish.compress.quantize.static import Static
from planish.export import narrow, qdq
from planish.export.lowering import to_onnx
from planish.targets import target
from torch import nn

aten = torch.ops.aten


@pytest.fixture(scope="module")
def made(residual, images):
    """made(**fields) -> the network of the tests after static quantization, once for each set of fields."""
    kept = {}

    def build(**fields):
        key = tuple(sorted(fields.items()))
        if key not in kept:
            context = Context(residual, images, target.load("host"), torch.Generator().manual_seed(0))
            kept[key] = Static(**fields).apply(residual, context)
        return kept[key]

    return build


def codes(model):
    return {n: b for n, b in model.graph.named_buffers() if n.endswith("weight_codes")}


def noise(model, reference, images):
    x = torch.from_numpy(images.inputs["image"])
    with torch.no_grad():
        want = reference(x)
        return float((model(x) - want).square().sum() / want.square().sum())


@pytest.mark.parametrize("bits", [4, 2])
def test_codes_lie_in_the_range_of_their_width(bits, made):
    for name, value in codes(made(weight_bits=bits)).items():
        assert value.dtype == torch.int8, name
        assert int(value.min()) >= -(1 << bits - 1), name
        assert int(value.max()) <= (1 << bits - 1) - 1, name
        assert value.unique().numel() > (1 << bits) // 2, name


@pytest.mark.parametrize("bits", [4, 2])
def test_compensation_errs_less_than_rounding_to_nearest(bits, made, residual, images):
    nearest, compensated = (
        noise(made(weight_bits=bits, rounding=r), residual, images) for r in ("nearest", "compensated")
    )
    assert compensated < 0.8 * nearest


def test_more_bits_err_less(made, residual, images):
    errors = [noise(made(weight_bits=b), residual, images) for b in (8, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 0.5 * errors[1]
    assert noise(made(weight_bits=2, ends_bits=8), residual, images) < errors[2]


def test_eight_bits_are_what_they_were(made, quantized):
    """Without the new fields nothing changes."""
    first, second = (dict(m.graph.named_buffers()) for m in (made(), quantized))
    assert all(torch.equal(first[k], second[k]) for k in second)
    assert all(int(c.min()) >= -127 for c in codes(made()).values())


def test_the_receipt_says_what_is_stored_where(made):
    entries = {e.tensor: e for e in made(weight_bits=4).receipt}
    line = entries["down.weight"]  # (32, 16, 3, 3)
    assert line.after_bytes == 32 * 16 * 9 + 5 * 32  # as the model keeps them
    assert "int4" in line.reason and f"{32 * 16 * 9 // 2} bytes of codes when packed" in line.reason


def test_c_sees_the_width(made):
    graph = qdq.read(to_onnx(made(weight_bits=2, ends_bits=8)))
    widths = [narrow.bits(n) for n in graph.nodes if n.op in narrow.OPS]
    assert widths[0] == widths[-1] == 8
    assert set(widths[1:-1]) == {2}


def test_a_weight_used_twice_has_one_rounding(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, image):
            return self.conv(torch.relu(self.conv(image)))

    torch.manual_seed(0)
    model = trace(Twice().eval(), {"image": torch.zeros(1, 3, 16, 16)}, "twice")
    context = Context(model, images, target.load("host"), torch.Generator().manual_seed(0))
    result = Static(weight_bits=4).apply(model, context)
    assert len(codes(result)) == 1
    assert noise(result, model, images) < 0.05


LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3, 2, 1), (2, 3, 9, 8)),
    "groups": (nn.Conv2d(4, 8, (3, 2), (1, 2), (1, 0), (2, 1), groups=2), (2, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 7, 7)),
    "one": (nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2), (2, 4, 17)),
    "linear": (nn.Linear(6, 5), (2, 3, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_windows_times_weight_is_the_layer(name):
    layer, shape = LAYERS[name]
    model = trace(layer.eval(), {"x": torch.zeros(shape)}, "layer")
    node = next(n for n in model.graph.graph.nodes if n.target in (aten.conv1d.default, aten.conv2d.default, aten.linear.default))  # fmt: skip
    x = torch.randn(shape)
    found = compensation.windows(node, x)  # (groups, rows, k)
    weight = layer.weight.detach().reshape(len(found), -1, found.shape[-1])
    with torch.no_grad():
        want = layer(x) - (layer.bias if name == "linear" else layer.bias.reshape(-1, *[1] * (x.ndim - 2)))
    if name != "linear":
        want = want.movedim(1, -1)
    got = torch.cat([a @ w.T for a, w in zip(found, weight, strict=True)], 1)
    torch.testing.assert_close(got, want.reshape(-1, want.shape[-1]), rtol=1e-4, atol=1e-5)


def test_without_correlation_compensation_rounds_to_nearest():
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(5, 12, generator=generator), torch.full((5,), 0.3)
    hessian = torch.diag(torch.rand(12, generator=generator, dtype=torch.float64) + 0.1)[None]
    found = compensation.rounded(weight, scale, hessian, -8, 7, "layer")
    torch.testing.assert_close(found, torch.clamp(torch.round(weight / 0.3), -8, 7))


def test_the_recipe_is_bundled():
    ((name, config),) = recipe.load("w4a8-static").passes
    assert name == "quantize.static" and config == Static(weight_bits=4)
