"""W8A8, W4A8 and W4A4: what is stored is the layer, the kernel gives the reference, and that is within its bound of the definition."""

import pytest
import torch
from planish.kernels import packing
from planish.kernels.gpu import linear_dynamic as reference
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer
from planish.kernels.linear_dynamic import linear_dynamic, quantized

kernel = pytest.importorskip("planish.kernels.triton.linear_dynamic")
product = pytest.importorskip("planish.kernels.triton.linear_int8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
CORE = CORES["sm_90"]
OP = reference.LinearDynamic()


def layer(out, channels, bits=8, group=None, activation_bits=8, activation_group=0, seed=0):
    """A layer with random codes."""
    generator = torch.Generator().manual_seed(seed)
    group = group or channels
    codes = torch.randint(0, 1 << bits, (out, channels), generator=generator).to(torch.uint8)
    scale = torch.rand(out, channels // group, generator=generator) * 0.01 + 0.001
    attributes = {
        "bits": bits,
        "group": group,
        "activation_bits": activation_bits,
        "activation_group": activation_group,
    }
    return Layer("linear_dynamic", "layer", {"codes": packing.pack(codes, bits, group), "scale": scale}, attributes)


def on_device(packed):
    """The arguments of the node behind x."""
    order = ("weight", "scale", "total")
    tensors = [packed.tensors[n].to(DEVICE) if n in packed.tensors else None for n in order]
    return *tensors, *(packed.attributes[n] for n in ("bits", "group", "format", "activation_group"))


def real_weight(item):
    """(out, in) float64."""
    a = item.attributes
    values = packing.unpack(item.tensors["codes"], a["bits"], a["group"]).double() - (1 << (a["bits"] - 1))
    return values * item.tensors["scale"].double().repeat_interleave(a["group"], 1)


def bound(item, x, dtype, expected):
    """What the file of the op states, for the product of quantized x (m, in) and the weight."""
    a = item.attributes
    size = quantized(x.float(), a["activation_bits"], a["activation_group"]).double().abs() @ real_weight(item).abs().T
    if (
        a["activation_group"] < 0
    ):  # codes from -128 and a zero point: their products are larger than those of the values
        x = x.float()
        step = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 255
        size = size + 255 * float(step) * real_weight(item).abs().sum(1)
    return (item.tensors["scale"].shape[1] + 4) * 2.0**-24 * size + HALF_UNIT[dtype] * (expected.abs() + 2.0**-14)


CASES = [
    (8, None, 8, 0), (8, None, 8, -1), (8, 32, 8, 0), (8, 96, 8, 96), (4, None, 8, 0), (4, 64, 8, 0), (4, 64, 4, 64),
    (4, None, 4, 0), (4, 64, 8, -1),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "activation_bits", "activation_group"), CASES)
@pytest.mark.parametrize(
    ("tokens", "out", "dtype"), [(1, 40, torch.float16), (17, 200, torch.bfloat16), (130, 72, torch.float16)]
)
def test_the_kernel_within_the_bound_of_the_definition(
    bits, group, activation_bits, activation_group, tokens, out, dtype
):
    channels = 300 if group is None else 192
    item = layer(out, channels, bits, group, activation_bits, activation_group)
    assert OP.refuses(item, CORE) is None
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = OP.pack(item, CORE)
    y = kernel.run(x.to(DEVICE), *on_device(packed), None, None, None, "").cpu()
    activations = quantized(x.float(), activation_bits, activation_group).double()
    expected = activations @ real_weight(item).T
    limit = bound(item, x, dtype, expected)
    assert ((y.double() - expected).abs() <= limit).all()
    host = [a.cpu() if isinstance(a, torch.Tensor) else a for a in on_device(packed)]
    theirs = torch.ops.planish.gpu_linear_dynamic(x, *host, None, None, None, "")
    assert y.dtype == theirs.dtype == dtype
    assert ((y.double() - theirs.double()).abs() <= 2 * limit).all()
    if not group and activation_group == 0:  # one rounding at a time in the same order
        assert torch.equal(y, theirs)
    defined = linear_dynamic(x.float(), item.tensors["codes"], item.tensors["scale"], None, *item.attributes.values())
    assert torch.allclose(y.float(), defined, rtol=2 * HALF_UNIT[dtype], atol=1e-3 * float(defined.abs().max()))


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 64)])
def test_parts_of_a_sum_and_the_epilogue(split, bits, group):
    tokens, out, channels = 21, 70, 512
    item = layer(out, channels, bits, group or None)
    packed = OP.pack(item, CORE)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (tokens, channels), generator=generator).to(torch.int8)
    token_scale = torch.rand(tokens, 1, generator=generator) * 0.001
    bias = torch.randn(out, generator=generator)
    factor, residual = (torch.randn(tokens, out, generator=generator).half() for _ in range(2))
    weight, scale, total = on_device(packed)[:3]
    config = product.Config("tiles", {"BN": 64, "BM": 16, "BK": 64, "BAND": 8, "SPLIT": split}, 4, 3)
    rest = (bits, group, "float16")
    ours = product.run(
        codes.to(DEVICE), token_scale.to(DEVICE), None, weight, scale, total, *rest, bias.to(DEVICE), factor.to(DEVICE),
        residual.to(DEVICE), "silu", config,
    ).cpu()  # fmt: skip
    tensors = [packed.tensors[n] for n in ("weight", "scale")]
    theirs = reference.gpu_linear_int8(codes, token_scale, None, *tensors, None, *rest, bias, factor, residual, "silu")
    assert torch.allclose(ours.float(), theirs.float(), rtol=2e-3, atol=1e-2 * float(theirs.float().abs().mean()))
    again = product.run(
        codes.to(DEVICE), token_scale.to(DEVICE), None, weight, scale, total, *rest, bias.to(DEVICE), factor.to(DEVICE),
        residual.to(DEVICE), "silu", config,
    ).cpu()  # fmt: skip
    assert torch.equal(ours, again)


def test_sums_beyond_float32_are_exact():
    """All products of a row are the largest: the sum has more than 24 bits."""
    codes = torch.full((3, 2048), 127, dtype=torch.int8)
    codes[1, 0] = 126
    weight = torch.full((5, 2048), 127, dtype=torch.int8)
    scale, token_scale = torch.full((1, 5), 2.0**-20), torch.ones(3, 1)
    y = product.run(codes.to(DEVICE), token_scale.to(DEVICE), None, weight.to(DEVICE), scale.to(DEVICE), None, 8, 0, "float32", None, None, None, "")  # fmt: skip
    exact = (codes.double() @ weight.double().T).float() * 2.0**-20
    assert torch.equal(y.cpu(), exact)


def test_leading_shapes_and_no_tokens():
    packed = OP.pack(layer(40, 64), CORE)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    y = kernel.run(x, *on_device(packed), None, None, None, "relu")
    assert y.shape == (2, 3, 40)
    assert torch.equal(y[1], kernel.run(x[1], *on_device(packed), None, None, None, "relu"))
    assert kernel.run(x[:0], *on_device(packed), None, None, None, "").shape == (0, 3, 40)


@pytest.mark.parametrize("bits", [8, 4])
def test_stored_values_are_the_codes(bits):
    item = layer(24, 192, bits)
    packed = OP.pack(item, CORE)
    values = reference.stored_values(packed.tensors["weight"], bits)
    codes = packing.unpack(item.tensors["codes"], bits, 192).int() - (1 << (bits - 1))
    assert values.shape == (24, 256)
    assert torch.equal(values[:, :192].int(), codes)
    assert not values[:, 192:].any()
    assert packed.tensors["weight"].nbytes == 24 * 256 * bits // 8
    again = OP.pack(item, CORE)
    assert all(torch.equal(packed.tensors[n], again.tensors[n]) for n in packed.tensors)


def test_two_nodes_are_one():
    packed = OP.pack(layer(40, 96, activation_group=-1), CORE)
    assert packed.split is not None
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(4)).bfloat16()
    ops = torch.ops.planish
    plain = dict.fromkeys(("residual", "weight", "bias", "smooth", "signs")) | {
        "norm": "",
        "eps": 0.0,
        "block": 0,
        "keep": False,
    }
    codes, scale, zero, _, _ = ops.gpu_quantize_tokens(x, **plain, **packed.split.quantize)
    ends = {"bias": None, "factor": None, "residual": None, "activation": "gelu"}
    node = getattr(ops, f"gpu_{packed.split.product}")
    y = node(codes=codes, token_scale=scale, token_zero=zero, **packed.split.tensors, **packed.split.attributes, dtype="bfloat16", **ends)  # fmt: skip
    whole = ops.gpu_linear_dynamic(x, **packed.tensors, **packed.attributes, **ends)
    assert torch.equal(y, whole)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 4, "group": 32}, "groups of 32"),
        ({"bits": 8, "group": 16}, "groups of 16"),
        ({"bits": 8, "group": 64, "activation_group": 32}, "its activations have groups of 32"),
    ],
)
def test_what_is_refused(given, said):
    assert said in str(OP.refuses(layer(8, 192, **given), CORE))


@pytest.mark.parametrize("core", list(CORES.values()), ids=list(CORES))
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (8, 32), (4, 64), (4, 128)])
def test_every_shape_has_a_specialization(core, bits, group):
    for m in (1, 7, 64, 300, 5000):
        for n in (8, 4096, 130000):
            for k in (128, 384, 4096, 14336):
                config = product.choose(core, m, n, k, bits, group)
                c = config.constants
                assert (group or k) % c["BK"] == 0
                assert config.stages * (c["BN"] * c["BK"] * bits // 8 + c["BM"] * c["BK"]) <= core.shared_bytes
    assert 8 <= len(product.candidates(core, 256, 4096, 4096, bits, group)) <= 40
