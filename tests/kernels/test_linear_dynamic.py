"""Integer products with activations rounded at run time: ONNX Runtime gives the reference's numbers in each of the forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish.export import lowering
from planish.export.onnx import float_weight_bytes, optimized, weight_bytes
from planish.kernels import packing
from planish.kernels.linear_dynamic import PER_TENSOR, PER_TOKEN, quantized
from planish.runtimes import ort

OUT = 24


def drawn(channels: int, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Tensor arguments of the op, drawn."""
    g = torch.Generator().manual_seed(channels + bits + group)
    codes = torch.randint(0, 1 << bits, (OUT, channels), generator=g, dtype=torch.uint8)
    scale = torch.rand(OUT, channels // group, generator=g) * 0.02 + 0.01
    return {"codes": packing.pack(codes, bits, group), "scale": scale, "bias": torch.randn(OUT, generator=g)}


def lowered(tensors: dict[str, torch.Tensor], **attributes: int) -> onnx.ModelProto:
    """An ONNX model of one layer 'fc', x (batch, tokens, in)."""
    inputs = ["x", *(f"fc.weight_{n}" if n in tensors else "" for n in ("codes", "scale", "bias"))]
    settings: dict[str, Any] = {"name": "fc", "domain": "planish", **attributes}
    node = helper.make_node("linear_dynamic", inputs, ["y"], **settings)
    constants = [numpy_helper.from_array(v.numpy(), f"fc.weight_{n}") for n, v in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", "in"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", OUT])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("planish", 1)]
    graph = helper.make_graph([node], "g", [x], [y], constants)
    return lowering.lowered(helper.make_model(graph, opset_imports=opsets, ir_version=10))


GRID = [
    (bits, channels, group, activation_bits, activation_group)
    for bits in (8, 4)
    for channels, group in [(256, 256), (256, 64), (172, 172), (172, 43), (96, 48)]
    for activation_bits in (8, 4)
    for activation_group in (PER_TENSOR, PER_TOKEN, group, 16)
    if (activation_bits == 8 or activation_group != PER_TENSOR) and channels % max(activation_group, 1) == 0
]


@pytest.mark.parametrize(("bits", "channels", "group", "activation_bits", "activation_group"), GRID)
def test_onnx_runtime_equals_the_reference(
    bits: int, channels: int, group: int, activation_bits: int, activation_group: int
) -> None:
    tensors = drawn(channels, bits, group)
    given = {"bits": bits, "group": group, "activation_bits": activation_bits, "activation_group": activation_group}
    session = ort.create(lowered(tensors, **given).SerializeToString(), 1)
    for batch in (1, 3):
        x = torch.randn(batch, 5, channels, generator=torch.Generator().manual_seed(batch))
        x[0, 0] = 0  # a token without a scale
        want = torch.ops.planish.linear_dynamic(
            x, tensors["codes"], tensors["scale"], tensors["bias"], *given.values()
        ).numpy()
        got = ort.run(session, {"x": x.numpy()})["y"]
        assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()


def test_all_zero_input_gives_the_bias() -> None:
    for group in (PER_TENSOR, PER_TOKEN, 32):
        tensors = drawn(64, 8, 64)
        model = lowered(tensors, bits=8, group=64, activation_bits=8, activation_group=group)
        got = ort.run(ort.create(model.SerializeToString(), 1), {"x": np.zeros((1, 2, 64), np.float32)})["y"]
        assert np.array_equal(got, np.broadcast_to(tensors["bias"].numpy(), got.shape))


def test_finer_activation_groups_err_less() -> None:
    """An outlier in one column costs its whole tensor, its token or only its group."""
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    x[3, 7] = 100
    for bits in (8, 4):
        errors = [float((quantized(x, bits, group) - x).norm()) for group in (PER_TOKEN, 128, 32)]
        assert errors == sorted(errors, reverse=True)
    assert float((quantized(x, 8, PER_TENSOR) - x).norm()) > float((quantized(x, 8, PER_TOKEN) - x).norm())
    assert (quantized(x, 8, 32) - x)[4:].abs().max() < 0.02


@pytest.mark.parametrize(
    ("given", "ops", "weight_bits"),
    [
        ((8, 512, 8, PER_TENSOR), {"DynamicQuantizeMatMul"}, 8),
        ((8, 512, 8, PER_TOKEN), {"MatMulInteger"}, 8),
        ((4, 64, 8, 64), {"MatMulNBits"}, 4),
        ((8, 64, 8, 64), {"MatMulNBits"}, 8),
        ((4, 64, 4, 64), {"MatMulNBits"}, 4),
    ],
)
def test_the_weight_stays_packed_in_the_graph_that_runs(
    given: tuple[int, ...], ops: set[str], weight_bits: int, tmp_path: Path
) -> None:
    bits, group, activation_bits, activation_group = given
    model = lowered(
        drawn(512, bits, group),
        bits=bits,
        group=group,
        activation_bits=activation_bits,
        activation_group=activation_group,
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    runs = optimized(tmp_path / "m.onnx")
    assert {n.op_type for n in runs.graph.node} & {
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulNBits",
        "MatMul",
    } == ops
    scales = OUT * (512 // group) * 4
    assert float_weight_bytes(runs) <= scales
    assert weight_bytes(runs) <= OUT * 512 * weight_bits // 8 + scales + OUT * 4 + 64
