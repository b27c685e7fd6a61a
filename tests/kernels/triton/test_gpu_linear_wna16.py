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
from planish.kernels.triton import ahead  # noqa: E402
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


@pytest.mark.parametrize("form", ("small", "middle", "dequantize"))
def test_the_epilogue_is_applied_once(form):
    """Bias, activation, factor and residual, where the sum is split over blocks too."""
    given = layer(20, 128, 4, 64, "none")
    packed = gpu.LinearWna16().pack(given, HOPPER)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 128, generator=generator).half() * 0.1
    bias = torch.randn(20, generator=generator)
    factor, residual = (torch.randn(2, 3, 20, generator=generator).half() for _ in range(2))
    reference = gpu.reference(x, *arguments(packed), bias, factor, residual, "silu")
    for parts in (1, 2) if form != "dequantize" else (1,):
        c = {**FORMS[form].constants, "PARTS": parts} if form != "dequantize" else FORMS[form].constants
        config = Config(form, c, FORMS[form].warps, FORMS[form].stages)
        got = triton_op.product(config, HOPPER, x, stored(packed), (bias, factor, residual), "silu")
        torch.testing.assert_close(got, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", (0, 1, 17, 130))
def test_run_chooses_a_form_and_floats_of_32_bits_are_taken(tokens):
    given = layer(17, 96, 4, 32, "codes")
    packed = gpu.LinearWna16().pack(given, HOPPER)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float16, torch.float32) if tokens < 130 else (torch.float16,):
        got = triton_op.run(x.to(dtype), *arguments(packed), None, None, None, "")
        assert got.shape == (tokens, 17) and got.dtype == dtype
        if tokens:
            y, scaled, moved = exact(given, x.to(dtype))
            u = UNIT.get(dtype, 2.0**-22)
            assert ((got - y).abs() <= (2.0**-11 + 3 * u + 96 * 2.0**-22) * (scaled + moved) + u * y.abs()).all()


def test_equal_layers_store_equal_bytes_and_equal_inputs_give_equal_outputs():
    first, second = (gpu.LinearWna16().pack(layer(33, 128, 4, 32, "float"), HOPPER) for _ in range(2))
    assert (
        all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
        and first.attributes == second.attributes
    )
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).half()
    a, b = (triton_op.product(FORMS["small_two_tiles"], HOPPER, x, stored(first), (None,) * 3, "") for _ in range(2))
    assert torch.equal(a, b)


def test_stored_bytes_are_those_of_the_codes_and_two_for_each_scale():
    packed = gpu.LinearWna16().pack(layer(64, 512, 4, 128, "none"), HOPPER)
    assert packed.tensors["codes"].nbytes == 64 * 512 // 2
    assert packed.tensors["scale"].nbytes == 64 * 4 * 2
    assert packed.tensors["row"].nbytes == 64 * 4


def test_what_no_kernel_takes_is_refused():
    refuses = gpu.LinearWna16().refuses
    assert "multiples of 16" in (refuses(layer(16, 96, 4, 24, "none"), HOPPER) or "")
    odd = layer(16, 64, 4, 32, "float")
    odd.tensors["zero_point"][0, 0] = -200.0
    assert "zero point" in (refuses(odd, HOPPER) or "")


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_defaults_and_candidates_fit_the_core(core):
    for m, n, k in itertools.product((1, 5, 16, 40, 128, 600, 5000), (16, 1024, 4096, 14336), (128, 4096, 14336)):
        for bits, group in ((4, 128), (4, 32), (8, 128), (2, 64)):
            chosen = triton_op.default(core, m, n, k, bits, group)
            assert chosen.form in ("small", "middle", "dequantize") and chosen.stages >= 1
            assert chosen.warps % 4 == 0 and chosen.constants.get("PARTS", 1) <= 16
            tried = triton_op.candidates(core, m, n, k, bits, group)
            assert 1 <= len(tried) <= 40
            for c in (chosen, *tried):
                if c.form != "dequantize":
                    taken = triton_op.shared_bytes(core, c.form, c.constants, bits, group, c.stages)
                    assert taken <= core.shared_bytes, c


@pytest.mark.slow
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_the_compiler_takes_the_shared_memory_that_is_planned(core):
    shapes = [(m, bits, group) for m in (1, 64) for bits, group in ((4, 128), (2, 32))]
    configs = [triton_op.default(core, m, 4096, 4096, bits, group) for m, bits, group in shapes]
    planned = [
        triton_op.shared_bytes(core, c.form, c.constants, bits, group, c.stages)
        for c, (_, bits, group) in zip(configs, shapes, strict=True)
    ]
    variants = [
        triton_op.variant(core, c, f"w{bits}, {m} tokens", bits, group, fraction=True)
        for c, (m, bits, group) in zip(configs, shapes, strict=True)
    ]
    for made, plan, (m, bits, _) in zip(ahead.compile_all(variants, core.name), planned, shapes, strict=True):
        assert plan * 0.9 <= made.shared_bytes <= plan, (bits, m)


def test_a_program_for_another_runtime_holds_no_product_of_torch():
    from planish.kernels.triton import record

    packed = gpu.LinearWna16().pack(layer(32, 128, 4, 128, "none"), HOPPER)
    names = ("codes", "scale", "zero", "row", "bits", "group", "fraction", "bias", "factor", "residual", "activation")
    values = dict(zip(names, (*arguments(packed), None, None, None, ""), strict=True))
    program = record.record("linear_wna16", triton_op.run, {"x": torch.zeros(4096, 128).half(), **values}, HOPPER)
    assert [launch.variant.kernel for launch in program.launches] == ["middle"]
