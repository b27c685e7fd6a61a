"""8-bit floats: what is stored is the layer, the kernel gives the reference, and that is within its bound of float64."""

import pytest
import torch
from planish.kernels.gpu import linear_fp8 as reference
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer
from planish.kernels.linear_fp8 import DTYPES, MAX, decode, encode, linear_fp8, to_float8

kernel = pytest.importorskip("planish.kernels.triton.linear_fp8")
product = pytest.importorskip("planish.kernels.triton.linear_float8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
CORE = CORES["sm_90"]
OP = reference.LinearFp8()


def layer(out, channels, format="e4m3", activations="none", seed=0):
    """A layer with random weights, a row of zeros among them."""
    weight = torch.randn(out, channels, generator=torch.Generator().manual_seed(seed))
    weight[out // 2] = 0
    codes, scale = encode(weight, format)
    return Layer(
        "linear_fp8", "layer", {"codes": codes, "scale": scale}, {"format": format, "activations": activations}
    )


def node(packed):
    """The arguments behind x."""
    return packed.tensors["weight"].to(DEVICE), packed.tensors["scale"].to(DEVICE), packed.attributes["format"], packed.attributes["activations"]  # fmt: skip


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("activations", ["none", "e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("tokens", "channels", "out", "dtype"),
    [(1, 48, 40, torch.float16), (17, 300, 130, torch.bfloat16), (130, 128, 72, torch.float16), (3, 256, 200, torch.float32)],
)  # fmt: skip
def test_the_kernel_within_the_bound(format, activations, tokens, channels, out, dtype):
    item = layer(out, channels, format, activations)
    assert OP.refuses(item, CORE) is None
    packed = OP.pack(item, CORE)
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = kernel.run(x.to(DEVICE), *node(packed), None, None, None, "").cpu()
    weight = decode(item.tensors["codes"], torch.ones(out), format).double() * item.tensors["scale"].double()[:, None]
    real, sums = x.double(), (channels + 4) * 2.0**-24
    if activations != "none":
        step = (x.float().abs().amax(1, keepdim=True) / MAX[activations]).clamp_min(2.0**-126)
        real = to_float8(x.float() / step, activations).double() * step.double()
        sums = (channels / 32 + 4) * 2.0**-13 if DEVICE == "cuda" else (channels + 4) * 2.0**-24
    expected = real @ weight.T
    limit = sums * (real.abs() @ weight.abs().T) + HALF_UNIT[dtype] * (expected.abs() + 2.0**-14)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= limit).all()
    tensors = {n: v.cpu() for n, v in packed.tensors.items()}
    theirs = torch.ops.planish.gpu_linear_fp8(x, **tensors, **packed.attributes, bias=None, factor=None, residual=None, activation="")  # fmt: skip
    assert ((y.double() - theirs.double()).abs() <= 2 * limit).all()
    defined = linear_fp8(x.float(), item.tensors["codes"], item.tensors["scale"], None, format, activations)
    assert torch.allclose(theirs.float(), defined, rtol=2 * HALF_UNIT[dtype], atol=1e-4 * float(defined.abs().max()))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("activations", ["none", "e4m3"])
def test_parts_of_a_sum_and_the_epilogue(split, activations):
    generator = torch.Generator().manual_seed(2)
    packed = OP.pack(layer(70, 512, "e4m3", activations), CORE)
    x = torch.randn(21, 512, generator=generator).mul(0.1).half()
    bias = torch.randn(70, generator=generator)
    factor, residual = (torch.randn(21, 70, generator=generator).half() for _ in range(2))
    ends = (bias, factor, residual, "gelu_tanh")
    token_scale = None
    if activations != "none":
        codes = to_float8(x.float(), "e4m3").view(torch.uint8)
        token_scale = torch.rand(21, 1, generator=generator)
        theirs = reference.gpu_linear_float8(codes, token_scale, *(packed.tensors[n] for n in ("weight", "scale")), "e4m3", "e4m3", "float16", *ends)  # fmt: skip
    else:
        codes = x
        theirs = reference.gpu_linear_fp8(x, *(packed.tensors[n] for n in ("weight", "scale")), "e4m3", "none", *ends)
    config = product.Config("tiles", {"BN": 64, "BM": 16, "BK": 64, "BAND": 8, "SPLIT": split}, 4, 3)
    weight, scale, format, _ = node(packed)
    ours = product.product(
        codes.to(DEVICE), None if token_scale is None else token_scale.to(DEVICE), weight, scale, format, activations,
        torch.float16, *(e.to(DEVICE) if isinstance(e, torch.Tensor) else e for e in ends), config,
    ).cpu()  # fmt: skip
    assert torch.allclose(ours.float(), theirs.float(), rtol=4e-3, atol=1e-2 * float(theirs.float().abs().mean()))


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_byte_is_decoded_exactly(format, dtype):
    """A product with the identity gives every finite 8-bit float."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)  # (2, 256)
    values = codes.view(DTYPES[format]).float()
    codes = torch.where(values.isfinite(), codes, 0)
    x = torch.eye(256, dtype=dtype)
    y = kernel.run(
        x.to(DEVICE), codes.to(DEVICE), torch.ones(2, device=DEVICE), format, "none", None, None, None, ""
    ).cpu()
    assert torch.equal(y.float(), codes.view(DTYPES[format]).float().T)


def test_the_decoder_of_four_bytes_in_its_own_arithmetic():
    """The PTX that a GPU runs, its instructions one by one on 32-bit integers, for every byte."""
    for name, text, shift, dtype in (
        ("e4m3", product.E4M3_FP16, 1, torch.float16), ("e5m2", product.E5M2_FP16, 0, torch.float16),
        ("e4m3", product.E4M3_BF16, 4, torch.bfloat16), ("e5m2", product.E5M2_BF16, 3, torch.bfloat16),
    ):  # fmt: skip
        lines = [line.replace(",", "").split() for line in text.value.strip("{ }").split(";") if line.strip()]
        assert [line[0] for line in lines if line[0] == "shr.b32"] == ["shr.b32"] * 2
        values = torch.arange(256).to(torch.uint8).view(DTYPES[name]).float()
        for start in range(0, 256, 4):
            out = _interpreted(lines, sum((start + i) << 8 * i for i in range(4)), dtype)
            expected = values[start : start + 4]
            finite = expected.isfinite()
            assert torch.equal(out.float()[finite], expected[finite]), (name, dtype, start)
        assert f", {shift};" in text.value


def _interpreted(lines, word, dtype):
    """(4,) of `dtype`: what the decoder's instructions make of four bytes."""
    registers, outputs = {"$2": word, "0": 0}, {}
    bits = lambda name: registers[name] if name in registers else int(name, 0)  # noqa: E731
    for line in lines:
        code, *names = line
        if code == "mov.b32":
            registers[names[0]] = bits(names[1])
        elif code == "prmt.b32":
            pool = [(bits(names[1]) >> 8 * i) & 255 for i in range(4)] + [
                (bits(names[2]) >> 8 * i) & 255 for i in range(4)
            ]
            registers[names[0]] = sum(pool[(int(names[3], 16) >> 4 * i) & 7] << 8 * i for i in range(4))
        elif code == "shr.b32":
            registers[names[0]] = bits(names[1]) >> bits(names[2])
        elif code == "and.b32":
            registers[names[0]] = bits(names[1]) & bits(names[2])
        elif code == "lop3.b32":
            assert int(names[4], 16) == 0xEA  # (a & b) | c
            registers[names[0]] = (bits(names[1]) & bits(names[2])) | bits(names[3])
        elif code.startswith("fma.rn"):
            a, b = (torch.tensor([bits(n) & 0xFFFF, bits(n) >> 16], dtype=torch.int32).to(torch.uint16).view(dtype) for n in names[1:3])  # fmt: skip
            outputs[names[0]] = a * b
        else:
            assert code == ".reg"
    return torch.cat([outputs["$0"], outputs["$1"]])


def test_leading_shapes_and_no_tokens():
    packed = OP.pack(layer(40, 64), CORE)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    y = kernel.run(x, *node(packed), None, None, None, "relu")
    assert y.shape == (2, 3, 40)
    assert torch.equal(y[1], kernel.run(x[1], *node(packed), None, None, None, "relu"))
    assert kernel.run(x[:0], *node(packed), None, None, None, "").shape == (0, 3, 40)


def test_two_nodes_are_one():
    packed = OP.pack(layer(40, 96, "e4m3", "e4m3"), CORE)
    assert packed.split is not None
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(4)).bfloat16()
    ops = torch.ops.planish
    plain = dict.fromkeys(("residual", "weight", "bias", "smooth", "signs")) | {
        "norm": "",
        "eps": 0.0,
        "block": 0,
        "keep": False,
    }
    codes, scale, _, _, _ = ops.gpu_quantize_tokens(x, **plain, **packed.split.quantize)
    ends = {"bias": None, "factor": None, "residual": None, "activation": "silu"}
    product_node = getattr(ops, f"gpu_{packed.split.product}")
    y = product_node(codes=codes, token_scale=scale, **packed.split.tensors, **packed.split.attributes, dtype="bfloat16", **ends)  # fmt: skip
    assert torch.equal(y, ops.gpu_linear_fp8(x, **packed.tensors, **packed.attributes, **ends))


def test_what_is_refused():
    assert "sm_80 does not multiply" in str(OP.refuses(layer(8, 64, activations="e4m3"), CORES["sm_80"]))
    assert OP.refuses(layer(8, 64), CORES["sm_80"]) is None


@pytest.mark.parametrize("core", list(CORES.values()), ids=list(CORES))
@pytest.mark.parametrize("activations", ["none", "e4m3"])
def test_every_shape_has_a_specialization(core, activations):
    for m in (1, 300, 5000):
        for n, k in ((8, 128), (4096, 384), (130000, 4096)):
            config = product.choose(core, m, n, k, activations)
            c = config.constants
            assert k % c["BK"] == 0
            size = 2 if activations == "none" else 1
            assert config.stages * (c["BN"] * c["BK"] + size * c["BM"] * c["BK"]) <= core.shared_bytes
    assert 8 <= len(product.candidates(core, 256, 4096, 4096, activations)) <= 40
