"""Hadamard matrices of every promised order, the fast transform against them, and the ONNX form against the reference."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from planish.kernels import hadamard
from planish.kernels.fused import Builder, Call

BASES = (12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 256, *BASES, 92, 100, 116, 24, 192, 344, 384, 416])
def test_a_matrix_is_orthogonal_with_entries_of_equal_size(order):
    matrix = hadamard.hadamard_matrix(order)
    assert hadamard.largest_block(order) == order
    assert torch.equal(matrix.abs(), torch.full((order, order), 1.0, dtype=torch.float64) / order**0.5)
    assert (matrix @ matrix.T - torch.eye(order)).abs().max() < 1e-12


def test_other_orders_use_the_largest_block_that_divides_them():
    assert hadamard.largest_block(14) == 2
    assert hadamard.largest_block(5) == 1
    assert hadamard.largest_block(188) == 4
    assert all(hadamard.largest_block(n) == n for n in range(4, 188, 4))
    assert hadamard.largest_block(288) == 288  # 8 x 36
    with pytest.raises(ValueError, match="order 14"):
        hadamard.hadamard_matrix(14)


@pytest.mark.parametrize(("n", "block"), [(64, 64), (172, 172), (96, 24), (10, 2), (7, 1), (256, 128)])
@pytest.mark.parametrize("signed", [False, True])
def test_the_fast_transform_is_the_product_and_its_transpose_undoes_it(n, block, signed):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3, n, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1 if signed else None
    whole = torch.block_diag(*[hadamard.hadamard_matrix(block)] * (n // block))
    expected = (x if signs is None else x * signs.double()) @ whole
    found = torch.ops.planish.hadamard(x, signs, block, False)
    assert (found - expected).abs().max() < 1e-12
    assert (torch.ops.planish.hadamard(found, signs, block, True) - x).abs().max() < 1e-12


def lowered(n, signs, block, transposed):
    graph = onnx.GraphProto(name="hadamard")
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, n]))
    builder = Builder(graph, {})
    tensors = {"x": "x"}
    if signs is not None:
        tensors["signs"] = builder.constant("signs", signs.numpy())
    call = Call("layer", tensors, {"block": block, "transposed": int(transposed)})
    (name,) = hadamard.Hadamard().lower(call, builder)
    graph.node.extend(builder.nodes)
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None, n]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("n", "block"), [(64, 64), (172, 172), (384, 384), (96, 24), (10, 2), (7, 1), (512, 512)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_onnx_form_equals_the_reference(n, block, transposed):
    generator = torch.Generator().manual_seed(n)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1 if n != 64 else None
    session = lowered(n, signs, block, transposed)
    for shape in [(1, 1, n), (3, 5, n)]:
        x = torch.randn(shape, generator=generator)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, torch.ops.planish.hadamard(x, signs, block, transposed).numpy(), atol=2e-6)
