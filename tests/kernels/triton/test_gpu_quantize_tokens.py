"""Tokens to codes: the kernel gives the reference's codes and scales, and those err by half a step."""

import pytest
import torch
from planish.common.errors import PlanishError
from planish.kernels.gpu import quantize_tokens as reference
from planish.kernels.hadamard import hadamard_matrix
from planish.kernels.linear_dynamic import quantized as defined

kernel = pytest.importorskip("planish.kernels.triton.quantize_tokens")
TYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(**given):
    """The arguments behind x: plain rounding to 8 bits but for what is given."""
    names = ("residual", "weight", "bias", "smooth", "signs")
    plain = dict.fromkeys(names) | {"norm": "", "eps": 1e-5, "block": 0, "keep": False, "format": "int8", "group": 0}
    return (*(plain | given).values(),)


def tokens(count, channels, dtype, seed=0):
    """(count, channels) with a few large channels and a token of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator) * torch.rand(channels, generator=generator).mul(3).exp()
    x[count // 2] = 0 if count > 2 else x[count // 2]
    return x.to(dtype).to(DEVICE)


def random(channels, dtype, seed):
    """(channels,) about 1."""
    return (torch.rand(channels, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype).to(DEVICE)


def both(x, *rest):
    """The outputs of the kernel and of the reference; equal in shape and type."""
    ours = kernel.run(x, *rest)
    host = [a.cpu() if isinstance(a, torch.Tensor) else a for a in (x, *rest)]
    expected = reference.gpu_quantize_tokens(*host)
    assert [(o.shape, o.dtype) for o in ours] == [(e.shape, e.dtype) for e in expected]
    return [o.cpu() for o in ours], expected


def decoded(codes, scale, zero, group, channels):
    """The values (tokens, channels) float64 of codes."""
    values = codes.view(torch.float8_e4m3fn).float().double() if codes.dtype == torch.uint8 else codes.double()
    values = values[:, :channels] - (zero.double() if zero.numel() else 0)
    step = scale.double() if scale.shape[1] == 1 else scale.double().repeat_interleave(group, 1)[:, :channels]
    return values * step


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [48, 1000])
@pytest.mark.parametrize(("format", "group"), [("int8", 0), ("int4", 0), ("int8", 32), ("int4", 96), ("int8", -1)])
def test_rounding_alone_is_exact(dtype, channels, format, group):
    x, columns = tokens(17, channels, dtype), -(-channels // 128) * 128
    ours, expected = both(x, *arguments(format=format, group=group), columns)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert not ours[0][:, channels:].any()
    if channels % max(group, 1) == 0:
        real = defined(x.cpu().float(), 4 if format == "int4" else 8, group)
        got = decoded(*ours[:3], group, channels)
        assert torch.allclose(got, real.double(), rtol=1e-6, atol=1e-6 * float(real.abs().max()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_floats_of_8_bits_are_exact(dtype, format):
    x = tokens(5, 300, dtype)
    for mine, theirs in zip(*both(x, *arguments(format=format), 384), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("count", [1, 3, 130])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("group", [0, 64, -1])
def test_a_norm_before_it(count, norm, group):
    channels = 192
    x, residual = tokens(count, channels, torch.float16), tokens(count, channels, torch.float16, 1)
    weight, bias, smooth = (random(channels, torch.float16, s) for s in (2, 3, 4))
    rest = arguments(residual=residual, weight=weight, bias=bias if norm == "layer" else None, smooth=smooth, norm=norm, keep=True, group=group)  # fmt: skip
    ours, expected = both(x, *rest, 256)
    assert torch.equal(ours[4], expected[4])
    assert torch.allclose(ours[3].float(), expected[3].float(), rtol=1e-3, atol=1e-6)
    assert torch.allclose(ours[1], expected[1], rtol=1e-5)
    apart = (ours[0].int() - expected[0].int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3  # ties
    # against float64: half a step and the rounding of h
    h = ours[4].double()
    h = h - h.mean(1, keepdim=True) if norm == "layer" else h
    h = h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double().cpu()
    h = (h + bias.double().cpu() if norm == "layer" else h) * smooth.double().cpu()
    step = ours[1].double() if group <= 0 else ours[1].double().repeat_interleave(group, 1)
    assert ((decoded(*ours[:3], group, channels) - h).abs() <= 0.5 * step * (1 + 1e-3) + 1e-4).all()


@pytest.mark.parametrize(
    ("channels", "block"),
    [(48, 16), (64, 4), (192, 64), (640, 128), (512, 512), (768, 256), (2048, 2048), (4096, 4096), (8192, 8192)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_rotation_before_it(channels, block, signed):
    x = tokens(3, channels, torch.float32)
    generator = torch.Generator().manual_seed(5)
    signs = (torch.randint(0, 2, (channels,), generator=generator).float() * 2 - 1).to(DEVICE) if signed else None
    ours, expected = both(x, *arguments(signs=signs, block=block), channels)
    assert torch.allclose(ours[1], expected[1], rtol=1e-4)
    apart = (ours[0].int() - expected[0].int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-2
    h = x.cpu().double() if signs is None else x.cpu().double() * signs.cpu().double()
    h = (h.unflatten(1, (-1, block)) @ hadamard_matrix(block)).flatten(1)
    norm = h.unflatten(1, (-1, block)).norm(dim=2).repeat_interleave(block, 1)
    assert ((decoded(*ours[:3], 0, channels) - h).abs() <= 0.5 * ours[1].double() * 1.001 + 2**-16 * norm).all()


def test_a_rotation_in_groups():
    x = tokens(3, 256, torch.float16)
    ours, expected = both(x, *arguments(block=128, group=32, format="int4"), 256)
    assert (ours[0].int() - expected[0].int()).abs().max() <= 1
    assert torch.allclose(ours[1], expected[1], rtol=1e-4)


@pytest.mark.parametrize("group", [0, 32, -1])
def test_no_tokens(group):
    x = torch.zeros(2, 0, 64, device=DEVICE)
    both(x, *arguments(group=group, keep=True), 64)


def test_the_node_is_the_reference_on_a_cpu():
    x = tokens(4, 100, torch.bfloat16).cpu()
    rest = (*arguments(norm="rms"), 128)
    for mine, theirs in zip(
        torch.ops.planish.gpu_quantize_tokens(x, *rest), reference.gpu_quantize_tokens(x, *rest), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"format": "int3"}, "int3"),
        ({"norm": "batch"}, "batch"),
        ({"block": 24}, "power of two"),
        ({"group": -1, "format": "int4"}, "for int8"),
        ({"block": 16, "group": 48}, "power of two"),
    ],
)
def test_what_is_not_taken(given, said):
    with pytest.raises(PlanishError, match=said):
        kernel.run(torch.zeros(1, 48, device=DEVICE), *arguments(**given), 128)


def test_a_row_is_wide_enough():
    with pytest.raises(PlanishError, match="as wide or wider"):
        kernel.run(torch.zeros(1, 48, device=DEVICE), *arguments(), 32)
    with pytest.raises(PlanishError, match="at most"):
        kernel.run(torch.zeros(1, 70000, device=DEVICE), *arguments(), 70016)


def test_every_candidate_gives_the_same_codes():
    x = tokens(5, 600, torch.float16)
    core = kernel.core_of(x)
    expected = kernel.run(x, *arguments(), 640)[0]
    for config in kernel.candidates(core, 5, 640, 600)[::5]:
        codes, scale = torch.empty_like(expected), x.new_empty((5, 1), dtype=torch.float32)
        kernel.launch(
            kernel.quantize_tokens, (5,), config, x, *(None,) * 5, codes, scale, *(None,) * 4, 5, 600, 640, 1, 0.0,
            NORM="", BLOCK=0, FORMAT="int8", TOP=127.0, LEAST=1e-30, PASS=0, **config.constants,
        )  # fmt: skip
        assert torch.equal(codes, expected)
