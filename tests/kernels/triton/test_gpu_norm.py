"""RMSNorm and LayerNorm with the residual addition before them."""

import pytest
import torch
from planish.common.errors import PlanishError
from planish.kernels.gpu import norm as reference
from torch.nn import functional as F

kernel = pytest.importorskip("planish.kernels.triton.norm")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@pytest.mark.parametrize("dtype", list(HALF_UNIT))
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("count", "channels"), [(1, 48), (3, 300), (17, 1000), (130, 64)])
@pytest.mark.parametrize("added", [False, True])
def test_within_the_bound_of_float64(dtype, norm, count, channels, added):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(count, channels, generator=generator).mul(4).to(dtype).to(DEVICE) for _ in range(2))
    weight, bias = (torch.randn(channels, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    bias = bias if norm == "layer" else None
    y, total = kernel.run(x, residual if added else None, weight, bias, norm, 1e-5)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype)) if added else total.shape == (0,)
    h = (total if added else x).double().cpu()
    shift = 0.0 if bias is None else bias.double().cpu()
    expected = F.rms_norm(h, (channels,), weight.double().cpu(), 1e-5)
    if norm == "layer":
        expected = F.layer_norm(h, (channels,), weight.double().cpu(), bias.double().cpu(), 1e-5)
    size = (h.abs() / h.std(1, keepdim=True).clamp_min(1e-3) * weight.double().cpu().abs()) + abs(shift)
    bound = (channels + 8) * 2.0**-24 * (expected.abs() + size) + HALF_UNIT[dtype] * (expected.abs() + 2.0**-14)
    assert y.dtype == dtype
    assert ((y.double().cpu() - expected).abs() <= bound).all()
    theirs = reference.gpu_norm(*(None if a is None else a.cpu() for a in (x, residual if added else None, weight, bias)), norm, 1e-5)  # fmt: skip
    assert ((y.double().cpu() - theirs[0].double()).abs() <= 2 * bound).all()
    assert torch.equal(total.cpu(), theirs[1])


def test_leading_shapes_and_no_rows():
    weight = torch.ones(32, device=DEVICE)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y, total = kernel.run(x, x, weight, None, "rms", 1e-6)
    assert y.shape == total.shape == (2, 3, 32)
    assert kernel.run(x[:0], None, weight, None, "layer", 1e-6)[0].shape == (0, 3, 32)


def test_the_node_is_the_reference_on_a_cpu():
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    y, total = torch.ops.planish.gpu_norm(x, x, None, None, "rms", 1e-6)
    assert torch.equal(y, reference.gpu_norm(x, x, None, None, "rms", 1e-6)[0])
    assert torch.equal(total, 2 * x)


def test_what_is_not_taken():
    with pytest.raises(PlanishError, match="rms, layer"):
        kernel.run(torch.zeros(1, 8), None, None, None, "batch", 1e-6)
    with pytest.raises(PlanishError, match="at most 65536"):
        kernel.run(torch.zeros(1, 65537), None, None, None, "rms", 1e-6)
