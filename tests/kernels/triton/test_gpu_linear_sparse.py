"""2:4 sparse layers on a GPU: packing and back, the kernel in Triton's interpreter, the bound against float64, and the choice of a form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planish.kernels import linear_sparse as definition
from planish.kernels.gpu import cusparselt, op
from planish.kernels.gpu import linear_sparse as gpu
from planish.kernels.gpu.core import CORES
from planish.kernels.gpu.op import Layer, Packed

pytest.importorskip("triton", reason="triton is not installed")
from planish.kernels.triton import linear_sparse as kernel
from planish.kernels.triton import linear_sparse_int8, record
from planish.kernels.triton.config import Config

CORE = CORES["sm_90"]
FORMS = [(16, 16), (8, 16), (8, 8)]
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def layer(out: int, inputs: int, bits: int, activation_bits: int) -> Layer:
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(inputs)) * inputs**-0.5
    positions = definition.choose(weight.abs())
    values, scale = definition.encode(weight, positions, bits)
    tensors = {"values": values, "positions": definition.pack(positions)} | ({} if scale is None else {"scale": scale})
    return Layer("linear_sparse", "fc", tensors, {"activation_bits": activation_bits})


def packed(made: Layer) -> Packed:
    form = op.ops()["linear_sparse"]
    assert form.refuses(made, CORE) is None
    return form.pack(made, CORE)


def ends(rows: int, out: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    factor, residual = (torch.randn(rows, out, generator=generator).to(dtype) for _ in range(2))
    return {"bias": torch.randn(out, generator=generator).to(dtype), "factor": factor, "residual": residual}


def call(target: Any, x: torch.Tensor, p: Packed, **more: Any) -> torch.Tensor:
    t, a = p.tensors, p.attributes
    given = [more.get(n) for n in ("bias", "factor", "residual")]
    return target(x, t["values"], t["positions"], t.get("scale"), a["bits"], a["activation_bits"], *given, more.get("activation", ""))  # fmt: skip


def tokens(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("out", "inputs"), [(5, 12), (33, 260), (3, 512)])
def test_packing_loses_nothing_and_equal_layers_give_equal_bytes(bits: int, out: int, inputs: int) -> None:
    made = layer(out, inputs, bits, 16)
    first, second = packed(made), packed(layer(out, inputs, bits, 16))
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    weight = gpu.dense(first.tensors["values"], first.tensors["positions"], bits)
    want = definition.decode(made.tensors["values"], made.tensors["positions"], None)
    assert torch.equal(weight[:, :inputs].float(), want) and not weight[:, inputs:].any()
    blocks = -(-inputs // 256) * 8
    assert first.tensors["positions"].shape == (out, blocks)
    assert first.tensors["values"].shape == (out, blocks * bits // 2)


HALVES = (torch.float16, torch.bfloat16)
RAGGED = [(1, 33, 260, d) for d in HALVES] + [
    (3, 70, 516, torch.bfloat16),
    (20, 12, 64, torch.float16),
    (2, 9, 260, torch.float32),
]


@pytest.mark.parametrize(("bits", "activation_bits"), FORMS)
@pytest.mark.parametrize(("rows", "out", "inputs", "dtype"), RAGGED)
def test_the_kernel_computes_the_reference(
    rows: int, out: int, inputs: int, dtype: torch.dtype, bits: int, activation_bits: int
) -> None:
    p, x = packed(layer(out, inputs, bits, activation_bits)), tokens(rows, inputs, dtype)
    more = {**ends(rows, out, dtype), "activation": "silu"} if rows == 3 else {}
    want = call(torch.ops.planish.gpu_linear_sparse, x, p, **more)
    got = call(kernel.run, x, p, **more)
    assert got.dtype == dtype and got.shape == (rows, out)
    step = 2 * UNIT_ROUNDOFF[dtype] * want.abs().float() + 3e-6 * want.abs().max().float()
    assert ((got.float() - want.float()).abs() <= step).all()


@pytest.mark.parametrize(("bits", "activation_bits"), FORMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_bound_against_float64_holds(dtype: torch.dtype, bits: int, activation_bits: int) -> None:
    out, inputs, rows = 64, 256, 5
    made = layer(out, inputs, bits, activation_bits)
    p, x = packed(made), tokens(rows, inputs, dtype)
    weight = definition.decode(made.tensors["values"], made.tensors["positions"], made.tensors.get("scale")).double()
    exact = x.double()
    if activation_bits == 8:
        from planish.kernels.linear_dynamic import PER_TOKEN, quantized

        exact = quantized(x.float(), 8, PER_TOKEN).double()
    y, total = exact @ weight.T, exact.abs() @ weight.abs().T
    relative = inputs * 2.0**-23
    relative += 2.0**-9 if dtype == torch.bfloat16 and bits == 16 else 0
    relative += 2.0**-11 if dtype == torch.float32 and activation_bits == 16 else 0
    for target in (torch.ops.planish.gpu_linear_sparse, kernel.run):
        got = call(target, x, p).double()
        assert ((got - y).abs() <= relative * total + UNIT_ROUNDOFF[dtype] * y.abs() + 1e-7).all()


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (2, 3, 64)])
def test_leading_shapes_and_no_rows(shape: tuple[int, ...]) -> None:
    p = packed(layer(5, 64, 16, 16))
    x = torch.ones(shape, dtype=torch.bfloat16)
    got, want = call(kernel.run, x, p), call(torch.ops.planish.gpu_linear_sparse, x, p)
    assert got.shape == want.shape == (*shape[:-1], 5)
    assert torch.allclose(got.float(), want.float(), rtol=2e-2)


def test_two_nodes_give_what_the_one_gives() -> None:
    made = layer(40, 260, 8, 8)
    p, x = packed(made), tokens(3, 260, torch.bfloat16)
    assert p.split is not None
    codes, step, *_ = torch.ops.planish.gpu_quantize_tokens(
        x, None, None, None, None, None, "", 0.0, 0, False, p.split.quantize["format"], p.split.quantize["group"], p.split.quantize["columns"],
    )  # fmt: skip
    t = p.split.tensors
    product = getattr(torch.ops.planish, f"gpu_{p.split.product}")
    two = product(codes, step, t["values"], t["positions"], t["scale"], "bfloat16", None, None, None, "")
    assert torch.equal(two, call(torch.ops.planish.gpu_linear_sparse, x, p))
    got = linear_sparse_int8.run(codes, step, t["values"], t["positions"], t["scale"], "bfloat16", None, None, None, "")
    assert torch.equal(got, call(kernel.run, x, p))


def test_the_sum_of_parts_does_not_depend_on_how_it_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    p, x = packed(layer(20, 768, 8, 8)), tokens(2, 768, torch.float16)
    results = []
    for split in (1, 2, 3):
        config = Config("expand", {"BN": 32, "BM": 16, "SPLIT": split}, 2, 2)
        monkeypatch.setattr(kernel, "choose", lambda *_, config=config: config)
        results.append(call(kernel.run, x, p, activation="relu"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_launches_can_be_recorded_and_carried_elsewhere() -> None:
    p, x = packed(layer(24, 520, 16, 16)), tokens(3, 520, torch.float16)
    t, ends = p.tensors, (None, None, None, "relu")
    codes = torch.randint(-127, 128, (3, 768), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    whole = packed(layer(24, 520, 8, 8)).tensors
    for op_name, run, values in (
        ("linear_sparse", kernel.run, (x, t["values"], t["positions"], None, 16, 16, *ends)),
        ("linear_sparse_int8", linear_sparse_int8.run, (codes, torch.rand(3, 1), *whole.values(), "float16", *ends)),
    ):
        names = [a.name for a in getattr(torch.ops.planish, f"gpu_{op_name}").default._schema.arguments]
        given = dict(zip(names, values, strict=True))
        program = record.record(op_name, run, given, CORE, interpreted=True)
        assert torch.equal(record.replay(program, given)[0], run(*values))


def test_sparse_tensor_cores_serve_many_tokens_where_they_can() -> None:
    assert kernel.default(CORE, 1024, 4096, 4096, 16, torch.bfloat16, True).form == kernel.HARDWARE
    for m, usable in ((1024, False), (1, True), (64, True)):
        assert kernel.default(CORE, m, 4096, 4096, 16, torch.bfloat16, usable).form == kernel.EXPAND
    assert cusparselt.takes(torch.int8, 64, 96) and not cusparselt.takes(torch.int8, 64, 80)
    assert cusparselt.takes(torch.bfloat16, 64, 80) and not cusparselt.takes(torch.float32, 64, 64)


def test_hardware_sums_are_finished_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product by cuSPARSELt replaced by PyTorch's: padding of tokens, scales and the epilogue around it."""
    monkeypatch.setattr(torch, "_cslt_compress", lambda w: w)

    def multiply(w: torch.Tensor, x: torch.Tensor, out_dtype: Any, transpose_result: bool) -> torch.Tensor:
        assert transpose_result and not x.is_contiguous() and x.shape[1] % cusparselt.TOKENS == 0
        y = x.t().double() @ w.double().t()
        return y.to(out_dtype or x.dtype)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(kernel, "choose", lambda *_: Config(kernel.HARDWARE))
    for bits, activation_bits in ((16, 16), (8, 8)):
        p, x = packed(layer(64, 512, bits, activation_bits)), tokens(20, 512, torch.bfloat16)
        for more in ({}, {**ends(20, 64, torch.bfloat16), "activation": "gelu"}):
            want = call(torch.ops.planish.gpu_linear_sparse, x, p, **more).float()
            got = call(kernel.run, x, p, **more).float()
            assert ((got - want).abs() <= 2.0**-6 * want.abs().max()).all()


@pytest.mark.parametrize(("m", "dtype"), [(1, torch.bfloat16), (16, torch.int8), (128, torch.float16)])
def test_candidates_are_many_and_hold_no_twins(m: int, dtype: torch.dtype) -> None:
    found = kernel.candidates(CORE, m, 4096, 4096, 8 if dtype == torch.int8 else 16, dtype)
    assert 8 <= len(found) <= 40 and len({str(c) for c in found}) == len(found)
