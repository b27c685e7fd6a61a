"""LLM.int8()'s kernels against the definition in float64 and against the packed reference: frozen and found columns, counts."""

import pytest
import torch
from planish.common.errors import PlanishError
from planish.kernels import linear_int8_outlier as definition
from planish.kernels.gpu import linear_int8_outlier as gpu
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer
from planish.kernels.triton import linear_int8_outlier as kernel
from planish.kernels.triton import record

CORE = CORES["sm_90"]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
THRESHOLD = 6.0


def case(m, k, n, frozen=(), exact=True, dynamic=False, hot=(), samples=-1, seed=0):
    """(layer, x): some columns of x are 20 times larger, `frozen` ones are stored."""
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(n, k, generator=g) * 0.1, torch.randn(m, k, generator=g).clamp(-4, 4)
    x[:, list(hot)] *= 20
    codes, scale = definition.quantize_rows(weight)
    tensors = {"codes": codes, "scale": scale}
    if frozen:
        tensors["columns"] = torch.tensor(frozen)
        if exact:
            tensors["outlier_weight"] = weight[:, list(frozen)].half()
    attributes = {"threshold": THRESHOLD, "dynamic": dynamic, "samples": samples}
    return Layer("linear_int8_outlier", "layer", tensors, attributes), x


def arguments(made):
    packed = gpu.LinearInt8Outlier().pack(made, CORE)
    return [packed.tensors.get(n) for n in ("codes", "scale", "stored", "columns", "thick")] + list(
        packed.attributes.values()
    )


def truth(made, x):
    """(y float64, count, bound) by the definition."""
    t, a = made.tensors, made.attributes
    rest = (t.get("columns"), t.get("outlier_weight"), None, THRESHOLD, a["dynamic"], a["samples"])
    y, count = definition.linear_int8_outlier(x.double(), t["codes"], t["scale"].double(), *rest)
    hot = x.abs() >= THRESHOLD
    outlier = torch.zeros(x.shape[1], dtype=torch.bool)
    if a["dynamic"]:
        outlier = hot.any(0)
    elif "columns" in t:
        outlier[t["columns"]] = True
    peak = torch.where(hot & outlier, 0.0, x.abs()).amax(1, keepdim=True).double()
    kept = torch.where(outlier, 0.0, x).double()
    weight = (t["codes"] * t["scale"][:, None]).double().abs()
    near = ((kept * 127 / peak).abs().frac() - 0.5).abs() < 2.0**-15
    branch = x[:, outlier].double().abs() @ (weight[:, outlier].T + 1e-3)
    bound = 2.0**-22 * kept.abs() @ weight.T + (outlier.sum() + 2) * 2.0**-24 * branch
    bound += (near * peak / 127) @ weight.T
    return y, count, bound + (2.0**-11 * branch if x.dtype == torch.float32 else 0)


CASES = [
    (1, 64, 40, {}),
    (3, 200, 72, {"frozen": (5, 190), "hot": (5, 190)}),
    (17, 300, 130, {"frozen": (0, 7, 299), "hot": (7, 100), "exact": False}),
    (130, 256, 200, {"frozen": tuple(range(3, 43)), "hot": (4, 200)}),
    (5, 130, 48, {"dynamic": True, "hot": (0, 64, 129)}),
    (19, 256, 64, {"dynamic": True, "frozen": (3, 70), "hot": (70, 71, *range(100, 120))}),
    (33, 140, 56, {"dynamic": True, "frozen": (3, 70), "hot": (70, 71), "exact": False}),
    (4, 128, 40, {"dynamic": True}),
]


@pytest.mark.parametrize(("m", "k", "n", "how"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_within_the_bound_of_the_definition_and_equal_to_the_packed_reference(m, k, n, how, dtype):
    made, x = case(m, k, n, **how)
    x = x.to(dtype)
    y, count, bound = truth(made, x)
    packed = (*arguments(made), None, None, None, "")
    expected, got = torch.ops.planish.gpu_linear_int8_outlier(x, *packed), kernel.run(x, *packed)
    cut = 2 if dtype == torch.bfloat16 else 1  # the interpreter cuts float32 to bfloat16 where a GPU rounds
    for name, result, times in (("reference", expected, 1), ("kernel", got, cut)):
        assert result[0].dtype == dtype
        assert torch.equal(result[1], count), name
        off = (result[0].double() - y).abs()
        assert (off <= bound + times * UNIT[dtype] * (y.abs() + bound) + 1e-7).all(), name
    whole = x.float()
    close = torch.ops.planish.gpu_linear_int8_outlier(whole, *packed)[0]
    assert torch.allclose(kernel.run(whole, *packed)[0], close, rtol=1e-5, atol=1e-5 * float(close.abs().max()))


def test_without_outliers_it_is_plain_int8_with_frozen_or_found_columns_none():
    made, x = case(9, 160, 48)
    found, _ = case(9, 160, 48, dynamic=True)
    x = x.half()
    a, b = (kernel.run(x, *arguments(layer), None, None, None, "") for layer in (made, found))
    assert torch.equal(a[0], b[0])
    assert int(a[1]) == int(b[1]) == 0


@pytest.mark.parametrize("samples", [-1, 0, 1])
def test_counts_along_a_dimension_and_the_end_is_fused(samples):
    made, x = case(12, 96, 40, frozen=(8,), hot=(8, 9), samples=samples)
    g = torch.Generator().manual_seed(1)
    x = x.reshape(2, 3, 2, 96).half()
    x[1, :, 0, 9] = 0
    bias, factor, residual = torch.randn(40, generator=g), *torch.randn(2, 2, 3, 2, 40, generator=g).half()
    packed = (*arguments(made), bias, factor, residual, "gelu")
    (expected, counted), (got, count) = torch.ops.planish.gpu_linear_int8_outlier(x, *packed), kernel.run(x, *packed)
    assert torch.allclose(got.float(), expected.float(), rtol=4e-3, atol=4e-3)
    assert torch.equal(count, counted)
    assert count.dtype == torch.int64
    assert int(count.sum()) == int((x[..., 9].abs() >= THRESHOLD).sum()) > 0
    empty, none = kernel.run(x[:0], *arguments(made), None, None, None, "")
    assert empty.shape == (0, 3, 2, 40)
    assert none.shape == {-1: (1,), 0: (0,), 1: (3,)}[samples]


def test_counting_along_channels_is_refused():
    made, x = case(2, 64, 40, samples=1)
    with pytest.raises(PlanishError, match="counted along dimension 1"):
        kernel.run(x, *arguments(made), None, None, None, "")


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_of_the_sum_and_long_tokens_change_nothing_but_rounding(monkeypatch, split, dynamic):
    made, x = case(3, 300, 72, frozen=(5, 190), hot=(5, 190, 290), dynamic=dynamic)
    packed = (*arguments(made), None, None, None, "relu")
    whole, count = torch.ops.planish.gpu_linear_int8_outlier(x, *packed)
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": split}
    monkeypatch.setattr(kernel, "choose", lambda *_: kernel.Config("gemm", tile))
    monkeypatch.setattr(kernel, "LONGEST", 128)
    (first, counted), (second, _) = (kernel.run(x, *packed) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(counted, count)
    assert torch.allclose(first, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_zero_tokens_equal_layers_and_refusal():
    made, _ = case(3, 128, 48, frozen=(3,))
    packed = (*arguments(made), None, None, None, "")
    assert torch.equal(kernel.run(torch.zeros(3, 128).half(), *packed)[0], torch.zeros(3, 48).half())
    op = gpu.LinearInt8Outlier()
    first, again = (op.pack(case(3, 128, 48, frozen=(3,))[0], CORE).tensors for _ in range(2))
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    assert op.refuses(made, CORE) is None
    wide = Layer("linear_int8_outlier", "wide", {"codes": torch.zeros(1, 1 << 18, dtype=torch.int8)}, {})
    assert "262144 input columns" in (op.refuses(wide, CORE) or "")


@pytest.mark.parametrize("dynamic", [False, True])
def test_launches_can_be_recorded_and_carried_elsewhere(dynamic):
    made, x = case(3, 300, 72, frozen=(5, 190), hot=(5, 190, 290), dynamic=dynamic)
    names = [a.name for a in torch.ops.planish.gpu_linear_int8_outlier.default._schema.arguments]
    given = dict(zip(names, (x.half(), *arguments(made), None, None, None, "relu"), strict=True))
    program = record.record("linear_int8_outlier", kernel.run, given, CORE, interpreted=True)
    for carried, run in zip(record.replay(program, given), kernel.run(*given.values()), strict=True):
        assert torch.equal(carried, run)


def test_configs_fit_every_core():
    for core in CORES.values():
        for m in (1, 16, 128, 1024, 8192):
            tried = kernel.candidates(core, m, 4096, 4096)
            assert 3 <= len(tried) <= 40
            assert kernel.default(core, m, 4096, 4096).constants.keys() == tried[0].constants.keys()
