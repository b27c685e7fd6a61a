"""Keys and values rounded to 8 bits: what a cache stores gives the node's values, within half a step, and the same in ONNX and TVM."""

import numpy as np
import pytest
import torch
from planish.kernels import fused, kv_cache
from planish.runtimes import ort

fused.ops()
FORMATS = kv_cache.FORMATS


def values(*shape, seed=0):
    """Tokens of very different size, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(*shape[:-1], 1, generator=generator).exp()
    x[0, 0, 0] = 0
    return x


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_keeps_its_value_whatever_comes_behind_it(format):
    """What makes a graph that rounds new tokens the same as a cache of codes."""
    x = values(2, 3, 9, 64)
    whole = torch.ops.planish.kv_cache(x, format)
    parts = [torch.ops.planish.kv_cache(p, format) for p in x.split([4, 1, 4], 2)]
    assert torch.equal(torch.cat(parts, 2), whole)
    codes, scale = kv_cache.encode(x, format)
    assert codes.dtype == {"int8": torch.int8, "e4m3": torch.uint8}[format] and scale.shape == x.shape[:3]
    assert torch.equal(kv_cache.decode(codes, scale, format), whole)
    again, same = kv_cache.encode(whole, format)
    assert torch.equal(again, codes)
    torch.testing.assert_close(same[scale > 1e-30], scale[scale > 1e-30])


@pytest.mark.parametrize("format", FORMATS)
def test_error_is_half_a_step(format):
    x = values(2, 2, 50, 96)
    y = torch.ops.planish.kv_cache(x, format)
    _, scale = kv_cache.encode(x, format)
    step = scale[..., None] if format == "int8" else torch.maximum(x.abs() * 2.0**-3, scale[..., None] * 2.0**-9)
    assert ((y - x).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(y[0, 0, 0], torch.zeros(96))
    assert (y.abs().amax(-1) - x.abs().amax(-1)).abs().max() <= 1e-6 * x.abs().max(), "the largest value stays"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_type_stays_and_scales_are_float32(format, dtype):
    x = values(1, 2, 3, 32).to(dtype)
    y = torch.ops.planish.kv_cache(x, format)
    assert y.dtype == dtype
    assert torch.equal(y, torch.ops.planish.kv_cache(x.float(), format).to(dtype))
    assert kv_cache.encode(x, format)[1].dtype == torch.float32
    assert torch.ops.planish.kv_cache(x[:, :, :0], format).shape == (1, 2, 0, 32)


@pytest.mark.parametrize("format", FORMATS)
def test_onnx_gives_the_same_to_the_bit(format, lowered):
    x = values(2, 3, 7, 64)
    session = ort.create(lowered("kv_cache", {}, {"format": format}, rank=4).SerializeToString(), 1)
    found = ort.run(session, {"x": x.numpy()})["y"]
    np.testing.assert_array_equal(found, torch.ops.planish.kv_cache(x, format).numpy())


@pytest.mark.parametrize("format", FORMATS)
def test_tvm_gives_the_same_to_the_bit(format):
    tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from onnx import TensorProto, helper
    from planish.export import tvm_import
    from planish.export.tvm import compile_model
    from planish.runtimes.tvm import bound_main
    from planish.targets import target

    x = values(1, 2, 5, 48)
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(x.shape)) for n in ("x", "y")]
    node = helper.make_node("kv_cache", ["x"], ["y"], name="layer", domain="planish", format=format)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("planish", 1)]
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]), opset_imports=versions, ir_version=10)
    made = compile_model(tvm_import.fix_batch(model), target.load("host"), {})
    machine = tvm.relax.VirtualMachine(made.executable, tvm.cpu())
    found = bound_main(machine)(tvm.runtime.tensor(x.numpy())).numpy()
    np.testing.assert_array_equal(found, torch.ops.planish.kv_cache(x, format).numpy())
