"""Layers of codebooks on a GPU: the reference from stored tensors, and the kernels in Triton's interpreter."""

import itertools

import pytest
import torch
from planish.kernels import codebooks
from planish.kernels.gpu import linear_codebook as gpu
from planish.kernels.gpu import shuffle
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer

kernels = pytest.importorskip("planish.kernels.triton.linear_wna16", reason="needs triton")
from planish.kernels.triton.config import Config  # noqa: E402

HOPPER = CORES["sm_90"]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FORMS = {
    "small": Config("small", {"S": 2, "T": 2, "J": 1, "BLOCK_M": 8, "PARTS": 1}, 2, 2),
    "middle": Config("middle", {"T": 4, "J": 1, "BLOCK_M": 32, "PARTS": 2}, 4, 2),
    "dequantize": Config("dequantize", {"T": 4, "J": 1}, 4, 1),
}
GRID = [
    # format, group, nested, inputs, out, tokens, dtype
    ("nf4", 64, False, 192, 40, 3, torch.bfloat16),
    ("nf4", 64, True, 128, 33, 1, torch.float16),
    ("nf4", 64, False, 96, 24, 2, torch.float16),  # blocks cross the ends of rows
    ("nf4", 256, False, 64, 20, 2, torch.bfloat16),  # a block of four rows
    ("fp4", 128, False, 256, 17, 9, torch.bfloat16),
    ("mxfp4", 32, False, 160, 48, 3, torch.float16),
    ("mxfp4", 32, False, 96, 20, 17, torch.bfloat16),
    ("nvfp4", 16, False, 176, 48, 3, torch.bfloat16),
    ("nvfp4", 16, False, 128, 16, 1, torch.float16),
]


def layer(format, group, nested, inputs, out):
    """A random weight, rows of different size, encoded."""
    generator = torch.Generator().manual_seed(inputs + out)
    weight = torch.randn(out, inputs, generator=generator) * 10 ** -(2 * torch.rand(out, 1, generator=generator) + 1)
    coded = codebooks.encode(weight, format, group, nested)
    tensors = {n: t for n, t in vars(coded).items() if t is not None}
    return Layer("linear_codebook", "layer", tensors, {"format": format, "group": group}), coded


def arguments(packed):
    """The arguments of the node between x and the epilogue."""
    t, a = packed.tensors, packed.attributes
    return t["codes"], t["scale"], t["table"], t["row"], a["format"], a["group"]


def stored(packed):
    """The same, as the kernels' own entry takes it."""
    codes, scale, table, row, format, group = arguments(packed)
    return kernels.Stored(codes, scale, None, row, 4, group, format=format, table=table)


def test_side_by_side_codes_come_back():
    codes = torch.randint(0, 16, (21, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    back = shuffle.unshuffle(shuffle.shuffle(codes, 4, True), 4, True)
    assert torch.equal(back[:21, :130], codes) and not back[21:].any()


@pytest.mark.parametrize("case", range(len(GRID)))
def test_reference_is_the_weight_but_for_float16_scales(case):
    format, group, nested, inputs, out, *_ = GRID[case]
    given, coded = layer(format, group, nested, inputs, out)
    assert gpu.LinearCodebook().refuses(given, HOPPER) is None
    packed = gpu.LinearCodebook().pack(given, HOPPER)
    weight = codebooks.decode(coded.codes, coded.scale, coded.second_scale, coded.offset, format, group)
    got = torch.ops.planish.gpu_linear_codebook(torch.eye(inputs), *arguments(packed), None, None, None, "").T
    if format in ("mxfp4", "nvfp4"):
        torch.testing.assert_close(got, weight, rtol=2.0**-23, atol=0)
    else:
        assert ((got - weight).abs() <= 2.0**-11 * weight.abs()).all()


@pytest.mark.parametrize(("case", "form"), list(itertools.product(range(len(GRID)), FORMS)))
def test_every_form_is_within_its_bound_and_near_the_reference(case, form):
    format, group, nested, inputs, out, tokens, dtype = GRID[case]
    given, coded = layer(format, group, nested, inputs, out)
    packed = gpu.LinearCodebook().pack(given, HOPPER)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = codebooks.decode(coded.codes, coded.scale, coded.second_scale, coded.offset, format, group).double()
    y, sums, u = x.double() @ weight.T, x.double().abs() @ weight.abs().T, UNIT[dtype]
    error = (2.0**-11 + 3 * u + inputs * 2.0**-22) * sums + u * y.abs()
    got = kernels.product(FORMS[form], HOPPER, x, stored(packed), (None, None, None), "")
    assert got.dtype == dtype and got.shape == (tokens, out)
    assert ((got.double() - y).abs() <= error).all()
    reference = gpu.reference(x, *arguments(packed), None, None, None, "")
    assert ((got.double() - reference.double()).abs() <= error + u * y.abs()).all()


def test_a_table_is_decoded_exactly():
    """The identity, times a weight of the 16 values of each table with scale 1: the table in the type of x."""
    for format, dtype in itertools.product(("nf4", "fp4", "mxfp4"), UNIT):
        codes = torch.arange(16, dtype=torch.uint8).repeat(16, 8)  # (16, 128)
        high = codebooks.high_first(format)
        scale = torch.full((16, 4), 127, dtype=torch.uint8) if format == "mxfp4" else torch.full((64,), 0.5)
        tensors = {"codes": codebooks.pack(codes, high), "scale": scale}
        given = Layer("linear_codebook", "layer", tensors, {"format": format, "group": 32})
        packed = gpu.LinearCodebook().pack(given, HOPPER)
        got = kernels.product(FORMS["small"], HOPPER, torch.eye(128, dtype=dtype)[:16], stored(packed), (None,) * 3, "")
        want = codebooks.table(format).to(dtype) * (1 if format == "mxfp4" else 0.5)
        assert torch.equal(got, want[:, None].expand(16, 16)), format


def test_blocks_that_fit_no_rows_are_refused():
    given, _ = layer("nf4", 64, False, 100, 16)
    assert "greatest common divisor" in (gpu.LinearCodebook().refuses(given, HOPPER) or "")
