"""A cache of 8 bits on a GPU: what is written is what kv_cache rounds to, attention to it keeps its bound, and no place beyond the length is read."""

import math

import pytest
import torch
from planish.common.errors import PlanishError
from planish.kernels import kv_cache
from planish.kernels.gpu import attention_decode as reference
from planish.kernels.gpu import kv_write
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.kv_write import empty_cache

pytest.importorskip("triton", reason="triton is not installed")
from planish.kernels.triton import attention_decode as kernel
from planish.kernels.triton import cache_codes
from planish.kernels.triton import kv_write as writer

CAPACITY = 320
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24}
"""what rounding to the type errs by at most, relatively"""


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens, rotary, first=0, batch=None):
    rate = 1e4 ** (-torch.arange(0, rotary, 2) / rotary)
    angle = (torch.arange(first, first + tokens)[:, None] * rate).repeat(1, 2)  # (tokens, rotary)
    angle = angle if batch is None else torch.stack([angle + b for b in range(batch)])
    return angle.cos(), angle.sin()


def filled(format, dtype, batch, kv_heads, size, length, seed=0):
    """A cache with `length` places taken, and what must not be read behind them: the largest codes and scales."""
    if format == "none":
        sides = [normal(batch, kv_heads, CAPACITY, size, seed=seed + i, dtype=dtype) for i in range(2)]
        for cache in sides:
            cache[:, :, length:] = torch.nan
        return sides[0], None, sides[1], None
    found = []
    for i in range(2):
        scaled = (
            normal(batch, kv_heads, CAPACITY, size, seed=seed + i)
            * normal(batch, kv_heads, CAPACITY, 1, seed=9 + i).exp()
        )
        codes, scale = kv_cache.encode(scaled, format)
        codes[:, :, length:], scale[:, :, length:] = 127, torch.nan
        found += [codes, scale]
    return tuple(found)


def exact(query, cache, length, scale, format):
    """Attention in float64 on the values of the stored codes; and for each row the sum of magnitudes in its largest score."""
    key, value = (
        (c if s is None else kv_cache.decode(c, s, format))[:, :, :length].double() for c, s in (cache[:2], cache[2:])
    )
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    hidden = torch.arange(length) > torch.arange(length - tokens, length)[:, None]
    scores = (query.double() @ key.mT * scale).masked_fill(hidden, -torch.inf)
    sizes = query.double().abs()
    reach = ((sizes + 2.0**-14 * sizes.amax(-1, keepdim=True)) @ key.abs().mT * abs(scale)).amax(-1, keepdim=True)
    return torch.softmax(scores, -1) @ value, reach, value.abs().amax()


def bound(reach, peak, dtype, format):
    """As kernels/gpu/attention_decode.py states it, and the rounding of y."""
    unit = 2.0**-11 if format != "none" else HALF_UNIT[dtype]
    exact_sums = torch.exp(2 * reach * (unit + 2.0**-15)) - 1 + 2 * unit + 2.0**-15 + 2.0**-25 * CAPACITY
    return (exact_sums * (1 + HALF_UNIT[dtype]) + HALF_UNIT[dtype]) * peak


CASES = [
    # format, type, length, tokens, query heads, cache heads, size
    ("int8", torch.float16, 1, 1, 4, 4, 64),
    ("int8", torch.bfloat16, 7, 5, 4, 1, 80),
    ("int8", torch.float16, 130, 1, 8, 1, 128),
    ("int8", torch.bfloat16, 257, 5, 8, 2, 96),
    ("e4m3", torch.bfloat16, 1, 1, 8, 1, 80),
    ("e4m3", torch.float16, 64, 5, 8, 2, 64),
    ("e4m3", torch.bfloat16, 257, 1, 8, 1, 256),
    ("none", torch.float16, 64, 1, 8, 2, 128),
    ("none", torch.bfloat16, 130, 5, 4, 4, 96),
    ("none", torch.float16, 257, 5, 8, 1, 64),
    ("int8", torch.float32, 130, 5, 4, 1, 64),
]


@pytest.mark.parametrize(("format", "dtype", "length", "tokens", "heads", "kv_heads", "size"), CASES)
def test_attention_keeps_its_bound(format, dtype, length, tokens, heads, kv_heads, size):
    batch = 2
    query = normal(batch, tokens, heads, size, seed=5, dtype=dtype).transpose(1, 2)
    cache = filled(format, dtype, batch, kv_heads, size, length)
    scale = size**-0.5
    got = kernel.run(query, *cache, torch.tensor(length), None, None, scale, format)
    want = reference.attention_decode(query, *cache, torch.tensor(length), None, None, scale, format)
    ideal, reach, peak = exact(query, cache, length, scale, format)
    assert got.dtype == query.dtype and got.shape == query.shape and got.stride() == want.stride()
    allowed = bound(reach, peak, dtype, format)
    assert ((want - ideal).abs() <= allowed).all()
    assert ((got - ideal).abs() <= allowed).all()
    assert (got.double() - ideal).norm() <= 8 * (HALF_UNIT[dtype] + 2.0**-11) * ideal.norm()  # and most of it by far


@pytest.mark.parametrize("format", ["int8", "e4m3"])
def test_a_prompt_is_one_part(format, monkeypatch):
    """Blocks of rows that end in the middle of a token's heads, tiles that some rows may see only a part of."""
    tokens, length, size = 35, 110, 64
    query = normal(1, 3, tokens, size, seed=3, dtype=torch.float16)
    cache = filled(format, torch.float16, 1, 1, size, length)
    ideal, reach, peak = exact(query, cache, length, 0.1, format)
    for constants in ({"BM": 64, "BN": 32, "PARTS": 1}, {"BM": 64, "BN": 64, "PARTS": 2}):
        monkeypatch.setattr(kernel, "choose", lambda *_, c=constants: kernel.Config("", c, 4, 2))
        got = kernel.run(query, *cache, torch.tensor([length]), None, None, 0.1, format)
        assert ((got - ideal).abs() <= bound(reach, peak, torch.float16, format)).all()


def test_sequences_of_their_own_length_and_extreme_scales():
    """Small values beside large ones, a token of zeros, lengths that differ."""
    batch, size = 3, 64
    values = normal(batch, 1, CAPACITY, size) * 10.0 ** torch.linspace(-6, 4, CAPACITY)[:, None]
    values[:, :, 3] = 0
    key, key_scale = kv_cache.encode(normal(batch, 1, CAPACITY, size, seed=1), "int8")
    value, value_scale = kv_cache.encode(values, "int8")
    query = normal(batch, 4, 1, size, seed=2, dtype=torch.float16) * 10
    lengths = torch.tensor([4, 33, 200], dtype=torch.int32)
    got = kernel.run(query, key, key_scale, value, value_scale, lengths, None, None, 0.125, "int8")
    want = reference.attention_decode(query, key, key_scale, value, value_scale, lengths, None, None, 0.125, "int8")
    for b, length in enumerate(lengths):
        alone = [t[b : b + 1] for t in (key, key_scale, value, value_scale)]
        ideal, reach, peak = exact(query[b : b + 1], alone, int(length), 0.125, "int8")
        for y in (got, want):
            assert ((y[b] - ideal[0]).abs() <= bound(reach, peak, torch.float16, "int8")[0] + 2.0**-25).all()


@pytest.mark.parametrize(("format", "tokens"), [("int8", 1), ("int8", 11), ("e4m3", 11), ("none", 1)])
def test_written_is_what_kv_cache_rounds_to(format, tokens):
    batch, kv_heads, size, length = 2, 3, 80, 20
    joined = normal(
        batch, tokens, (4 + 2 * kv_heads) * size, dtype=torch.float16
    )  # as one linear layer gives q, k and v
    _, key, value = joined.split([4 * size, kv_heads * size, kv_heads * size], -1)
    key, value = (x.view(batch, tokens, kv_heads, size).transpose(1, 2) for x in (key, value))
    value = value * torch.tensor([0.0, 1e-3, 100.0])[:, None, None].half()  # a head of zeros
    caches = [empty_cache(batch, kv_heads, 32, size, format) for _ in range(4)]
    (kc, ks), (vc, vs), (kc2, ks2), (vc2, vs2) = caches
    writer.run(kc, ks, vc, vs, key, value, torch.tensor(length), None, None, format)
    torch.ops.planish.gpu_kv_write(kc2, ks2, vc2, vs2, key, value, torch.tensor(length), None, None, format)
    assert torch.equal(kc, kc2) and torch.equal(vc, vc2)
    for cache, scale, new in ((kc, ks, key), (vc, vs, value)):
        outside = torch.cat([cache[:, :, : length - tokens], cache[:, :, length:]], 2)
        assert not outside.any()
        if format != "none":
            stored = kv_cache.decode(cache, scale, format)[:, :, length - tokens : length]
            assert torch.equal(stored.half(), torch.ops.planish.kv_cache(new, format))
    assert ks is None or (torch.equal(ks, ks2) and torch.equal(vs, vs2))


def test_every_8_bit_float_is_made_and_read():
    """Codes, halves between neighbours and what lies beyond them, through the kernels' own arithmetic."""
    codes = torch.arange(127, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()  # 0 ... 448
    between = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, between, between * (1 + 1e-6), between * (1 - 1e-6), torch.tensor([448.0, 1e-5])])
    x = torch.cat([x, -x])
    x = torch.cat([x, torch.full((-x.numel() % 255,), 1.0)]).view(1, 1, -1, 255)
    x = torch.cat([x, torch.full((*x.shape[:3], 1), 448.0)], 3)  # the scale is 1
    tokens = x.shape[2]
    (kc, ks), (vc, vs) = (empty_cache(1, 1, tokens, 256, "e4m3") for _ in range(2))
    writer.run(kc, ks, vc, vs, x, x, torch.tensor(tokens), None, None, "e4m3")
    assert torch.equal(ks, torch.ones_like(ks))
    assert torch.equal(kc, x.to(torch.float8_e4m3fn).view(torch.uint8))


def machine(program, word):
    """The two words that PTX makes of one: the few instructions that the decoding uses."""

    def prmt(a, b, pick):
        source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
        return int.from_bytes(bytes(source[pick >> 4 * i & 7] for i in range(4)), "little")

    def sub(a, b):
        halves = [torch.tensor([v], dtype=torch.uint32).view(torch.float16) for v in (a, b)]
        return int((halves[0] - halves[1]).view(torch.uint32))

    def lop3(a, b, c, table):
        return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))

    known = {
        "mov.b32": lambda a: a, "xor.b32": int.__xor__, "and.b32": int.__and__, "shr.u32": int.__rshift__,
        "prmt.b32": prmt, "sub.f16x2": sub, "lop3.b32": lop3,
    }  # fmt: skip
    registers = {"$2": word}
    for line in program.strip("{} ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.split(maxsplit=1)
        target, *operands = (r.strip() for r in rest.split(","))
        registers[target] = known[name](*(registers[o] if o in registers else int(o, 0) for o in operands))
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("format", ["int8", "e4m3"])
def test_machine_code_of_the_decoding_gives_every_value(format):
    """The interpreter does not run it: here its instructions are followed one by one, for all bytes in all four places."""
    program = (cache_codes.FROM_INT8 if format == "int8" else cache_codes.FROM_E4M3).value
    codes = torch.arange(256, dtype=torch.uint8)
    kind = torch.int8 if format == "int8" else torch.float8_e4m3fn
    want = codes.view(kind).float() / (1 if format == "int8" else 256)
    for first in range(0, 256, 2):
        four = [first, 255 - first, (first + 85) % 256, (first + 170) % 256]
        made = machine(program, int.from_bytes(bytes(four), "little"))
        got = torch.tensor(made, dtype=torch.uint32).view(torch.float16).float()
        expected = want[four]
        number = ~expected.isnan()
        assert torch.equal(got[number], expected[number]), four


def test_rotary_embedding_on_the_way():
    batch, heads, kv_heads, tokens, size, length, rotary = 2, 4, 2, 3, 64, 40, 32
    cos, sin = angles(tokens, rotary, length - tokens, batch)
    key, value = (normal(batch, kv_heads, tokens, size, seed=s) for s in (1, 2))
    query = normal(batch, heads, tokens, size, seed=4)
    caches = [filled("int8", torch.float32, batch, kv_heads, size, length) for _ in range(2)]
    for run, cache in zip((writer.run, torch.ops.planish.gpu_kv_write), caches, strict=True):
        run(*cache, key, value, torch.tensor(length), cos, sin, "int8")
    codes = [c[0][:, :, length - tokens : length].int() for c in caches]
    assert (codes[0] - codes[1]).abs().max() <= 1 and (codes[0] != codes[1]).float().mean() < 0.01
    turned = kv_write.rotated(key, cos, sin)
    assert torch.equal(turned[..., rotary:], key[..., rotary:])
    assert torch.allclose(turned.norm(dim=-1), key.norm(dim=-1))
    got = kernel.run(query, *caches[1], torch.tensor(length), cos, sin, 0.125, "int8")
    ideal, reach, peak = exact(kv_write.rotated(query, cos, sin), caches[1], length, 0.125, "int8")
    assert ((got - ideal).abs() <= bound(reach, peak, torch.float32, "int8")).all()
    want = torch.ops.planish.gpu_attention_decode(query, *caches[1], torch.tensor(length), cos, sin, 0.125, "int8")
    assert ((want - ideal).abs() <= bound(reach, peak, torch.float32, "int8")).all()


def test_one_step_through_both_nodes_is_attention_to_the_rounded_cache():
    """What a program with kv_cache and a concatenation computes, up to rounding in 16 bits."""
    past, tokens, size = 12, 2, 64
    old_key, old_value, key, value = (normal(1, 2, n, size, seed=s) for s, n in enumerate((past, past, tokens, tokens)))
    query = normal(1, 4, tokens, size, seed=8)
    (kc, ks), (vc, vs) = (empty_cache(1, 2, 32, size, "int8") for _ in range(2))
    for k, v, end in ((old_key, old_value, past), (key, value, past + tokens)):
        torch.ops.planish.gpu_kv_write(kc, ks, vc, vs, k, v, torch.tensor(end), None, None, "int8")
    rounded = [
        torch.cat([torch.ops.planish.kv_cache(x, "int8") for x in pair], 2).repeat_interleave(2, 1)
        for pair in ((old_key, key), (old_value, value))
    ]
    mask = torch.arange(past + tokens) <= torch.arange(past, past + tokens)[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(query, *rounded, attn_mask=mask)
    got = torch.ops.planish.gpu_attention_decode(
        query, kc, ks, vc, vs, torch.tensor(past + tokens), None, None, size**-0.5, "int8"
    )
    torch.testing.assert_close(got, want)


def test_nodes_describe_themselves():
    """Schemas tell what is written in place; shapes and strides are known without running."""
    schema = torch.ops.planish.gpu_kv_write.default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == [
        "key_cache", "key_scale", "value_cache", "value_scale",
    ]  # fmt: skip
    (kc, ks), (vc, vs) = (empty_cache(1, 2, 16, 64, "int8") for _ in range(2))
    args = (normal(1, 4, 3, 64), kc, ks, vc, vs, torch.tensor(5), None, None, 0.1, "int8")
    torch.library.opcheck(
        torch.ops.planish.gpu_attention_decode.default, args, test_utils=("test_schema", "test_faketensor")
    )
    new = normal(1, 2, 3, 64)
    args = (kc, ks, vc, vs, new, new, torch.tensor(5), None, None, "int8")
    torch.library.opcheck(torch.ops.planish.gpu_kv_write.default, args, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_one_line():
    (kc, ks), (vc, vs) = (empty_cache(1, 2, 16, 64, "int8") for _ in range(2))
    query, new, length = normal(1, 4, 1, 64), normal(1, 2, 1, 64), torch.tensor(1)
    with pytest.raises(PlanishError, match="format 'e4m3'"):
        kernel.run(query, kc, ks, vc, vs, length, None, None, 0.1, "e4m3")
    with pytest.raises(PlanishError, match="scales of a cache"):
        writer.run(kc, None, vc, None, new, new, length, None, None, "int8")
    with pytest.raises(PlanishError, match="one integer, or one for each of 1"):
        kernel.run(query, kc, ks, vc, vs, torch.tensor(1.0), None, None, 0.1, "int8")
    with pytest.raises(PlanishError, match="queries"):
        kernel.run(query[:, :3], kc, ks, vc, vs, length, None, None, 0.1, "int8")
    with pytest.raises(PlanishError, match="do not fit a cache of 16"):
        torch.ops.planish.gpu_kv_write(kc, ks, vc, vs, new, new, torch.tensor(17), None, None, "int8")


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_candidates_are_sound(core):
    for tokens, format, size in ((1, "int8", 128), (4, "e4m3", 64), (512, "none", 256)):
        tried = kernel.candidates(core, 1, tokens, 32, 8, size, 8192, format)
        assert 8 <= len(tried) <= 40
        assert all(c.constants["BM"] >= 16 and math.log2(c.constants["PARTS"]).is_integer() for c in tried)
