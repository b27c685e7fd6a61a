"""Weight-only layers on a GPU: stored order, reference from stored tensors, and the kernels in Triton's interpreter."""

import itertools

import pytest
import torch
from planish.kernels import linear_wna16, packing
from planish.kernels.gpu import linear_wna16 as gpu
from planish.kernels.gpu import shuffle
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer

triton_op = pytest.importorskip("planish.kernels.triton.linear_wna16", reason="needs triton")
from planish.kernels.triton.config import Config  # noqa: E402

HOPPER = CORES["sm_90"]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FORMS = {
    "small": Config("small", {"S": 2, "T": 2, "J": 1, "BLOCK_M": 8, "PARTS": 1}, 2, 2),
    "small_two_tiles": Config("small", {"S": 2, "T": 1, "J": 2, "BLOCK_M": 16, "PARTS": 2}, 2, 2),
    "middle": Config("middle", {"T": 4, "J": 1, "BLOCK_M": 32, "PARTS": 2}, 4, 2),
    "middle_two_tiles": Config("middle", {"T": 4, "J": 2, "BLOCK_M": 64, "PARTS": 1}, 4, 2),
    "middle_scaled_before": Config("middle", {"T": 4, "J": 1, "BLOCK_M": 128, "PARTS": 1}, 4, 2),
    "dequantize": Config("dequantize", {"T": 4, "J": 1}, 4, 1),
}


def layer(out, inputs, bits, group, zero, seed=0):
    """Random codes and scales whose rows differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, inputs), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out, inputs // group, generator=generator) + 0.2) * 10 ** -(
        4 * torch.rand(out, 1, generator=generator) + 1
    )
    tensors = {"codes": packing.pack(codes, bits, group), "scale": scale}
    if zero == "codes":
        tensors["zero_point"] = torch.randint(0, 1 << bits, scale.shape, generator=generator, dtype=torch.uint8)
    elif zero == "float":
        tensors["zero_point"] = torch.rand(scale.shape, generator=generator) * ((1 << bits) - 1)
    return Layer("linear_wna16", "layer", tensors, {"bits": bits, "group": group})


def exact(given, x):
    """y float64, and the two sums that the bound is made of: |x| |W|^T and |x| (|scale| |zero|)^T."""
    t, bits, group = given.tensors, given.attributes["bits"], given.attributes["group"]
    zero = t.get("zero_point")
    weight = linear_wna16.dequantize(
        t["codes"], t["scale"].double(), None if zero is None else zero.double(), bits, group
    )
    middle = torch.full_like(t["scale"], 1 << (bits - 1)) if zero is None else zero
    offsets = (t["scale"].abs() * middle.abs().float()).repeat_interleave(group, 1).double()
    x = x.double()
    return x @ weight.double().T, x.abs() @ weight.double().abs().T, x.abs() @ offsets.T


def arguments(packed):
    """The arguments of the node between x and the epilogue."""
    t, a = packed.tensors, packed.attributes
    return t["codes"], t["scale"], t.get("zero"), t["row"], a["bits"], a["group"], a["fraction"]


def stored(packed):
    """The same, as the kernels' own entry takes it."""
    return triton_op.Stored(*arguments(packed))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_stored_words_hold_every_code_once(bits):
    codes = torch.randint(0, 1 << bits, (37, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = shuffle.shuffle(codes, bits)
    assert words.shape == (3, 384 * bits // 256, 32, 4)
    back = shuffle.unshuffle(words, bits)
    assert torch.equal(back[:37, :300], codes)
    assert not back[37:].any() and not back[:, 300:].any()


def test_the_order_is_that_of_the_tensor_core():
    """Thread 4 g + c holds rows g and g + 8, columns 8 h + 2 c + e of each square of 16; halves of a word are neighbours."""
    for row, column in ((0, 0), (3, 5), (11, 14), (8, 63)):
        codes = torch.zeros(16, 128, dtype=torch.uint8)
        codes[row, column] = 15
        words = shuffle.shuffle(codes, 4)
        (tile, step, lane, word), *others = words.nonzero().tolist()
        square, inside = divmod(column, 16)
        h, c, e = inside // 8, inside % 8 // 2, inside % 2
        assert (tile, step, lane, word, others) == (0, 0, 4 * (row % 8) + c, square, [])
        assert (
            words[tile, step, lane, word] & 0xFFFFFFFF
            == torch.tensor(15, dtype=torch.int64) << 16 * e + 4 * (2 * h + row // 8)
            or e == 1
        )


@pytest.mark.parametrize("zero", ("none", "codes", "float"))
@pytest.mark.parametrize(
    ("bits", "group", "inputs"), [(4, 128, 256), (3, 96, 192), (8, 32, 96), (2, 64, 320), (4, 300, 300)]
)
def test_reference_is_within_its_bound(bits, group, inputs, zero):
    given = layer(21, inputs, bits, group, zero)
    assert gpu.LinearWna16().refuses(given, HOPPER) is None
    packed = gpu.LinearWna16().pack(given, HOPPER)
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(1))
    y, scaled, moved = exact(given, x)
    got = torch.ops.planish.gpu_linear_wna16(x, *arguments(packed), None, None, None, "")
    assert ((got - y).abs() <= 2.0**-11 * (scaled + moved) + 1e-6 * (scaled + moved)).all()


def bound(given, x, dtype):
    """y float64 and the bound of kernels/gpu/linear_wna16.py."""
    u, inputs = UNIT[dtype], x.shape[-1]
    y, scaled, moved = exact(given, x)
    sums = inputs * 2.0**-22
    return y, (2.0**-11 + 3 * u + sums) * scaled + (2.0**-11 + sums) * moved + u * y.abs()


GRID = [
    # bits, group, inputs, out, zero, tokens, dtype
    (4, 128, 256, 40, "none", 1, torch.bfloat16),
    (4, 128, 384, 64, "codes", 3, torch.float16),
    (4, 64, 192, 33, "float", 17, torch.bfloat16),
    (4, 32, 160, 48, "none", 3, torch.float16),
    (4, 300, 300, 17, "codes", 5, torch.bfloat16),
    (3, 48, 96, 20, "none", 3, torch.bfloat16),
    (3, 128, 128, 20, "codes", 1, torch.float16),
    (8, 128, 256, 40, "none", 3, torch.bfloat16),
    (8, 32, 96, 40, "float", 3, torch.bfloat16),
    (8, 64, 128, 16, "codes", 17, torch.float16),
    (2, 128, 256, 40, "none", 3, torch.float16),
    (2, 32, 256, 24, "float", 3, torch.bfloat16),
    (2, 16, 128, 24, "codes", 130, torch.float16),
    (8, 16, 80, 24, "none", 2, torch.float16),
]


CASES = [(case, form) for case, form in itertools.product(range(len(GRID)), FORMS) if case % 3 == 0 or "_" not in form]
"""the first three forms for every case, the others for every third"""


@pytest.mark.parametrize(("case", "form"), CASES)
def test_every_form_is_within_its_bound_and_near_the_reference(case, form):
    bits, group, inputs, out, zero, tokens, dtype = GRID[case]
    given = layer(out, inputs, bits, group, zero)
    packed = gpu.LinearWna16().pack(given, HOPPER)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, error = bound(given, x, dtype)
    got = triton_op.product(FORMS[form], HOPPER, x, stored(packed), (None, None, None), "")
    assert got.dtype == dtype and got.shape == (tokens, out)
    assert ((got.double() - y).abs() <= error).all()
    reference = gpu.reference(x, *arguments(packed), None, None, None, "")
    u = UNIT[dtype]
    assert (
        (got.float() - reference.float()).abs() <= 2 * error
    ).all() and u  # reference and kernel differ by their roundings
