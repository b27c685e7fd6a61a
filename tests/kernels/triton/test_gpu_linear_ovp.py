"""Outlier-victim pairs: the machine form evaluated line by line, rounding of activations, and the product against the definition."""

import pytest
import torch
from planish.kernels import linear_ovp as definition
from planish.kernels.gpu import linear_ovp as gpu
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer
from planish.kernels.outlier_victim import codec
from planish.kernels.triton import linear_ovp as kernel
from planish.kernels.triton import nibbles, pairs, record

CORE = CORES["sm_90"]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
FORMS = [(4, "int"), (4, "flint"), (8, "int")]


def ptx(text, **registers):
    """Registers after PTX of and, or, xor, add, sub, shr, shl, prmt on 32-bit words, int64 tensors."""

    def prmt(a, b, c):
        both = a | b << 32
        total = torch.zeros_like(both)
        for i in range(4):
            choice = c >> 4 * i & 15
            byte = both >> (8 * (choice & 7)) & 255
            sign = torch.where(byte > 127, 255, 0)
            total = total | torch.where(choice > 7, sign, byte) << 8 * i
        return total

    do = {
        "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b, "shr": lambda a, b: a >> b, "shl": lambda a, b: a << b, "prmt": prmt,
    }  # fmt: skip
    like = next(iter(registers.values()))
    for line in text.strip("{} \n").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, _, rest = line.strip().partition(" ")
        target, *sources = (part.strip() for part in rest.split(","))
        read = [registers[s] if s in registers else torch.full_like(like, int(s, 0)) for s in sources]
        registers[target] = do[name.split(".")[0]](*read) & 0xFFFFFFFF
    return registers


def test_the_machine_form_of_int4_pairs_means_what_the_codec_says():
    every = torch.randperm(256 * 16, generator=torch.Generator().manual_seed(0)).reshape(-1, 4) % 256
    word = (every << torch.tensor([0, 8, 16, 24])).sum(1)
    after = ptx(pairs.INT4, **{"$2": word})
    left, right = (after[n][:, None] >> torch.tensor([0, 8, 16, 24]) & 255 for n in ("$0", "$1"))
    values = torch.stack([left, right], -1).to(torch.uint8).view(torch.int8)  # (words, 4, 2)
    assert torch.equal(values.float(), codec(4, "int").pairs()[every])


def test_the_machine_form_of_nibbles_is_the_plain_form():
    import inspect

    source = inspect.getsource(nibbles.low.fn) + inspect.getsource(nibbles.high.fn)
    low, high = (part for part in source.split('"') if "and.b32" in part)
    byte = torch.arange(256, dtype=torch.int64)
    word = byte | byte.flip(0) << 8 | byte << 16 | byte.roll(7) << 24
    for text, names, plain in (
        (low, ("$1", "$0"), lambda b: b << 4 & 255),
        (high, ("$1", "$0"), lambda b: b & 240),
    ):
        after = ptx(text, **{names[0]: word})[names[1]]
        assert torch.equal(after & 255, plain(byte))
        assert torch.equal(after >> 24, plain(byte.roll(7)))


@pytest.mark.parametrize(("bits", "grid"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_of_activations_is_the_codec_exactly(bits, grid, dtype):
    form = codec(bits, grid)
    ticks = torch.arange(0, 2 * int(form.outliers[-1]) + 40) / 2 if bits == 4 else torch.arange(0, 4000) / 8
    q = torch.cat([ticks, torch.logspace(-3, 4.7, 500)])
    q = torch.cat([q, -q, q.flip(0), torch.tensor([0.0, torch.nan, torch.inf, -torch.inf])])
    q = q[: len(q) // 6 * 6].reshape(3, -1).to(dtype)
    step = torch.tensor(0.25)
    half = -(-q.shape[1] // 128) * 64
    got = torch.empty(3, 2, half, dtype=torch.float16)
    block = kernel.PLANES.constants["BLOCK"]
    grid_of = (3, -(-half // block))
    kernel.launch(
        kernel.planes, grid_of, kernel.PLANES, q * 0.25, step, got, q.shape[1], half, FORM=f"{grid}{bits}", BLOCK=block
    )
    expected = form.round_trip((q * 0.25).float() / step)
    interleaved = got.transpose(1, 2).flatten(1)[:, : q.shape[1]].float()
    assert torch.equal(interleaved, expected)


def layer(k, n, form, x_form=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    bits, grid = form
    made = codec(bits, grid)
    q = torch.randn(n, k, generator=g) * 3
    q[torch.rand(n, k, generator=g) < 0.05] *= 12
    tensors = {"codes": made.store(made.encode(q)), "scale": torch.rand(n, generator=g) * 0.02 + 0.01}
    attributes = {"bits": bits, "grid": grid, "x_bits": 0, "x_grid": "int", "unpacked": False}
    if x_form:
        tensors["x_scale"] = torch.tensor(0.37)
        attributes |= {"x_bits": x_form[0], "x_grid": x_form[1]}
    return Layer("linear_ovp", "layer", tensors, attributes)


def arguments(made):
    packed = gpu.LinearOvp().pack(made, CORE)
    return [packed.tensors.get(n) for n in ("codes", "scale", "x_scale")] + list(packed.attributes.values())


def truth(made, x):
    """(y float64, bound): the definition."""
    t, a = made.tensors, made.attributes
    form = codec(a["bits"], a["grid"])
    values, left, scale = form.decode(form.read(t["codes"])).double(), x.double(), t["scale"].double()
    if "x_scale" in t:
        left = codec(a["x_bits"], a["x_grid"]).round_trip(x.float() / t["x_scale"]).double()
        scale = scale * t["x_scale"].double()
    y = left @ values.T * scale
    if definition.integer(dict(a)):
        return y, 2.0**-22 * y.abs()
    size = left.abs() @ values.abs().T * scale
    more = 2.0**-11 if x.dtype == torch.float32 and "x_scale" not in t else 0
    return y, ((x.shape[1] + 8) * 2.0**-23 + more) * size


CASES = [
    (1, 64, 40, (4, "int"), (4, "int")),
    (17, 300, 130, (4, "int"), (4, "int")),
    (130, 130, 72, (4, "flint"), (4, "flint")),
    (3, 200, 48, (8, "int"), (8, "int")),
    (5, 258, 40, (8, "int"), (4, "int")),
    (3, 200, 72, (4, "int"), None),
    (9, 140, 40, (8, "int"), None),
    (2, 130, 56, (4, "flint"), None),
]


@pytest.mark.parametrize(("m", "k", "n", "form", "x_form"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_within_the_bound_of_the_definition_and_equal_to_the_packed_reference(m, k, n, form, x_form, dtype):
    if x_form is None and dtype == torch.bfloat16:
        dtype = torch.float32  # the interpreter multiplies the bits of bfloat16 as integers
    made = layer(k, n, form, x_form)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=g)
    x[torch.rand(m, k, generator=g) < 0.03] *= 15
    x = x.to(dtype)
    y, bound = truth(made, x)
    packed = (*arguments(made), None, None, None, "")
    expected, got = torch.ops.planish.gpu_linear_ovp(x, *packed), kernel.run(x, *packed)
    cut = 2 if dtype == torch.bfloat16 else 1  # the interpreter cuts float32 to bfloat16 where a GPU rounds
    for name, result, times in (("reference", expected, 1), ("kernel", got, cut)):
        assert result.dtype == dtype
        assert ((result.double() - y).abs() <= bound + times * UNIT[dtype] * (y.abs() + bound) + 1e-7).all(), name
    if definition.integer(made.attributes) and dtype != torch.bfloat16:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("split", [1, 2])
def test_the_end_is_fused_and_parts_of_the_sum_repeat_exactly(monkeypatch, split):
    made = layer(520, 72, (4, "int"), (4, "int"))
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT": split}
    monkeypatch.setattr(kernel, "choose", lambda *_: kernel.Config("gemm", tile))
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 520, generator=g).half()
    bias, factor, residual = torch.randn(72, generator=g), *torch.randn(2, 2, 3, 72, generator=g).half()
    packed = (*arguments(made), bias, factor, residual, "silu")
    first, second = (kernel.run(x, *packed) for _ in range(2))
    assert torch.equal(first, second)
    expected = torch.ops.planish.gpu_linear_ovp(x, *packed)
    assert torch.allclose(first.float(), expected.float(), rtol=2e-3, atol=2e-3)
    assert kernel.run(x[:0], *packed[:-4], None, None, None, "").shape == (0, 3, 72)


def test_zero_tokens_equal_layers_and_refusal():
    made = layer(128, 48, (4, "int"), (4, "int"))
    packed = (*arguments(made), None, None, None, "")
    assert torch.equal(kernel.run(torch.zeros(3, 128).half(), *packed), torch.zeros(3, 48).half())
    op = gpu.LinearOvp()
    first, again = (op.pack(layer(128, 48, (4, "int"), (4, "int")), CORE).tensors for _ in range(2))
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    assert op.refuses(made, CORE) is None
    other = Layer("linear_ovp", "layer", made.tensors, {**made.attributes, "x_bits": 6})
    assert "pairs of 6 bits" in (op.refuses(other, CORE) or "")


def test_launches_can_be_recorded_and_carried_elsewhere():
    made = layer(258, 72, (4, "int"), (4, "int"))
    x = torch.randn(3, 258, generator=torch.Generator().manual_seed(3)).half()
    names = [a.name for a in torch.ops.planish.gpu_linear_ovp.default._schema.arguments]
    given = dict(zip(names, (x, *arguments(made), None, None, None, "relu"), strict=True))
    program = record.record("linear_ovp", kernel.run, given, CORE, interpreted=True)
    assert torch.equal(record.replay(program, given)[0], kernel.run(*given.values()))


def test_configs_fit_every_core():
    for core in CORES.values():
        for m in (1, 16, 128, 1024, 8192):
            tried = kernel.candidates(core, m, 4096, 4096)
            assert 3 <= len(tried) <= 40
            assert kernel.default(core, m, 4096, 4096).constants.keys() == tried[0].constants.keys()
