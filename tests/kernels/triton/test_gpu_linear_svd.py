"""SVDQuant's two kernels against the definition in float64 and against the packed reference; what is refused."""

import pytest
import torch
from planish.kernels import linear_svd as definition
from planish.kernels.gpu import linear_svd as gpu
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer
from planish.kernels.linear_wna16 import dequantize
from planish.kernels.triton import linear_svd as kernel
from planish.kernels.triton import record

CORE = CORES["sm_90"]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def layer(k, n, bits=4, group=64, activation_bits=8, rank=32, shift=0.0, unsigned=False, seed=0):
    """A random layer; its channels differ by two orders of magnitude, which `smooth` levels."""
    g = torch.Generator().manual_seed(seed)
    smooth = torch.exp(torch.randn(k, generator=g))
    codes, scale = definition.quantize_residual(torch.randn(n, k, generator=g) * 0.1, bits, group)
    down, up = torch.randn(rank, k, generator=g) * 0.1, torch.randn(n, rank, generator=g)
    tensors = {"codes": codes, "scale": scale, "smooth": smooth, "down": down.half(), "up": up.half()}
    attributes = {
        "bits": bits,
        "group": group,
        "activation_bits": activation_bits,
        "shift": shift,
        "unsigned": unsigned,
    }
    return Layer("linear_svd", "layer", tensors, attributes)


def arguments(made):
    packed = gpu.LinearSvd().pack(made, CORE)
    names = ("codes", "scale", "offset", "smooth", "down", "up")
    return [packed.tensors.get(n) for n in names] + list(packed.attributes.values())


def truth(made, x):
    """(y float64 without epilogue, bound): the definition, and how far y may lie from it."""
    t, a = made.tensors, made.attributes
    weight = dequantize(t["codes"], t["scale"], None, a["bits"], a["group"]).double()  # (out, whole groups)
    rows, smooth = x.double(), t["smooth"].double()
    h = (rows + a["shift"]) * smooth
    quantized = definition.quantized(h, a["activation_bits"], a["group"], a["unsigned"])
    y = quantized @ weight.T + (rows * smooth) @ t["down"].double().T @ t["up"].double().T
    size = quantized.abs() @ weight.abs().T
    branch = (rows * smooth).abs() @ t["down"].double().abs().T @ t["up"].double().abs().T
    groups = t["scale"].shape[1]
    bound = (groups + 12) * 2.0**-24 * size + (2.0**-10 + x.shape[1] * 2.0**-24) * branch
    if a["activation_bits"] == 16:
        bound += max(UNIT[x.dtype], 2.0**-11 if x.dtype == torch.float32 else 0) * size
    else:
        wide = definition.padded(h.clamp_min(0) if a["unsigned"] else h, a["group"]).unflatten(-1, (-1, a["group"]))
        top = kernel.largest(a["activation_bits"], a["unsigned"])
        step = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
        near = ((wide / step).abs().frac() - 0.5).abs() < 2.0**-20 * (top + 1)
        bound += (near * step).flatten(-2) @ weight.abs().T
    return y, bound


CASES = [
    # tokens, in, out, what differs from w4a8 g64 rank 32
    (1, 64, 40, {}),
    (3, 200, 72, {"bits": 8}),
    (17, 300, 130, {"activation_bits": 4}),
    (130, 256, 200, {"shift": 0.171875, "unsigned": True, "activation_bits": 4}),
    (5, 130, 48, {"shift": 0.171875, "unsigned": True}),
    (19, 256, 64, {"shift": 0.28125, "unsigned": True, "bits": 8, "group": 128}),
    (17, 190, 72, {"activation_bits": 16}),
    (33, 128, 96, {"activation_bits": 16, "bits": 8, "group": 32}),
    (2, 300, 40, {"rank": 0}),
    (4, 300, 40, {"rank": 40, "group": 256}),
]


@pytest.mark.parametrize(("m", "k", "n", "how"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_within_the_bound_of_the_definition_and_equal_to_the_packed_reference(m, k, n, how, dtype):
    if how.get("activation_bits") == 16 and dtype == torch.bfloat16:
        dtype = torch.float32  # the interpreter multiplies the bits of bfloat16 as integers
    made = layer(k, n, **how)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, bound = truth(made, x)
    packed = (*arguments(made), None, None, None, "")
    expected, got = torch.ops.planish.gpu_linear_svd(x, *packed), kernel.run(x, *packed)
    cut = 2 if dtype == torch.bfloat16 else 1  # the interpreter cuts float32 to bfloat16 where a GPU rounds
    for name, result, times in (("reference", expected, 1), ("kernel", got, cut)):
        assert result.dtype == dtype
        assert ((result.double() - y).abs() <= bound + times * UNIT[dtype] * (y.abs() + bound) + 1e-6).all(), name
    sums = kernel.run(x.float(), *packed) - torch.ops.planish.gpu_linear_svd(x.float(), *packed)
    assert sums.abs().max() <= 2e-3 * y.abs().max(), "TF32 of thin may round to the other side"
    assert sums.abs().mean() <= 2e-5 * y.abs().max()


def test_the_end_is_fused_and_any_leading_shape_is_taken():
    made = layer(96, 40)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 96, generator=g).half()
    bias, factor, residual = torch.randn(40, generator=g), *torch.randn(2, 2, 3, 40, generator=g).half()
    for activation in ("", "gelu", "silu"):
        packed = (*arguments(made), bias, factor, residual, activation)
        expected = torch.ops.planish.gpu_linear_svd(x, *packed)
        assert torch.allclose(kernel.run(x, *packed).float(), expected.float(), rtol=4e-3, atol=4e-3)
    empty = kernel.run(x[:0], *arguments(made), None, None, None, "")
    assert empty.shape == (0, 3, 40)


@pytest.mark.parametrize("split", [1, 2, 8])
def test_parts_of_the_sums_change_nothing_but_rounding_and_repeat_exactly(monkeypatch, split):
    monkeypatch.setattr(kernel, "DIRECT", 32)
    made = layer(320, 80)
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(3))
    packed = (*arguments(made), None, None, None, "relu")
    whole = torch.ops.planish.gpu_linear_svd(x, *packed)
    chosen = kernel.Config("gemm", {"BLOCK_M": 16, "BLOCK_N": 32, "SPLIT": split, "ROWS": 16, "PARTS": split})
    monkeypatch.setattr(kernel, "choose", lambda *_: chosen)
    first, second = (kernel.run(x, *packed) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_zero_rows_and_equal_layers():
    made = layer(128, 48)
    packed = (*arguments(made), None, None, None, "")
    assert torch.equal(kernel.run(torch.zeros(3, 128).half(), *packed), torch.zeros(3, 48).half())
    again = gpu.LinearSvd().pack(layer(128, 48), CORE).tensors
    assert all(torch.equal(t, again[n]) for n, t in gpu.LinearSvd().pack(made, CORE).tensors.items())


def test_scales_are_short_enough_for_the_fused_form_to_be_exact():
    """The machine form takes 1.5 * 2^23 scale off in the multiply-add: that product must be a float32."""
    scale = gpu.LinearSvd().pack(layer(512, 96), CORE).tensors["scale"]
    assert torch.equal((scale * 12582912.0).double(), scale.double() * 12582912.0)


def test_launches_can_be_recorded_and_carried_elsewhere():
    made = layer(320, 80)
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(3)).half()
    names = [a.name for a in torch.ops.planish.gpu_linear_svd.default._schema.arguments]
    given = dict(zip(names, (x, *arguments(made), None, None, None, "relu"), strict=True))
    program = record.record("linear_svd", kernel.run, given, CORE, interpreted=True)
    assert torch.equal(record.replay(program, given)[0], kernel.run(*given.values()))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"group": 40}, "groups of 40"),
        ({"rank": 300}, "rank 300"),
        ({"group": 256, "unsigned": True, "shift": 1.0}, "unsigned activations of 8 bits"),
    ],
)
def test_refuses(how, why):
    assert why in (gpu.LinearSvd().refuses(layer(512, 64, **how), CORE) or "")
    assert gpu.LinearSvd().refuses(layer(512, 64), CORE) is None


def test_configs_fit_every_core():
    for core in CORES.values():
        for m in (1, 16, 128, 1024, 8192):
            tried = kernel.candidates(core, m, 4096, 4096)
            assert 3 <= len(tried) <= 40
            assert kernel.default(core, m, 4096, 4096).constants.keys() == tried[0].constants.keys()
