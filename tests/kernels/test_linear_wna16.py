"""Weight-only linears: packing is exact, and ONNX Runtime gives the reference's numbers with the weight still packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish.common.errors import PlanishError
from planish.compress.model import trace
from planish.export import accuracy, lowering, metadata
from planish.export.onnx import float_weight_bytes, optimized, weight_bytes
from planish.kernels import packing
from planish.kernels.linear_wna16 import dequantize
from planish.runtimes import ort


def drawn(out: int, channels: int, bits: int, group: int, zero: str) -> dict[str, torch.Tensor]:
    """Tensor arguments of the op, drawn."""
    g = torch.Generator().manual_seed(out + channels + bits + group)
    groups = channels // group
    codes = torch.randint(0, 1 << bits, (out, channels), generator=g, dtype=torch.uint8)
    zeros = {
        "codes": torch.randint(0, 1 << bits, (out, groups), generator=g, dtype=torch.uint8),
        "float": torch.rand(out, groups, generator=g) * ((1 << bits) + 1) - 1,  # also beyond the codes
    }
    found = {
        "codes": packing.pack(codes, bits, group),
        "scale": torch.rand(out, groups, generator=g) * 0.02 + 0.01,
        "zero_point": zeros.get(zero),
        "bias": torch.randn(out, generator=g),
    }
    return {k: v for k, v in found.items() if v is not None}


def lowered(tensors: dict[str, torch.Tensor], **attributes: int) -> onnx.ModelProto:
    """An ONNX model of one layer 'fc', x (batch, tokens, in)."""
    names = ["codes", "scale", "zero_point", "bias"]
    inputs = ["x", *(f"fc.weight_{n}" if n in tensors else "" for n in names)]
    node = helper.make_node("linear_wna16", inputs, ["y"], name="fc", domain="planish", **attributes)
    constants = [numpy_helper.from_array(v.numpy(), f"fc.weight_{n}") for n, v in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", "in"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", len(tensors["codes"])])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("planish", 1)]
    return lowering.lowered(
        helper.make_model(helper.make_graph([node], "g", [x], [y], constants), opset_imports=opsets, ir_version=10)
    )


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("group", [1, 5, 8, 16, 43, 172])
def test_packing_is_exact(bits: int, group: int) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (7, 2 * group), generator=g, dtype=torch.uint8)
    packed = packing.pack(codes, bits, group)
    assert packed.shape == (7, 2, -(-group * bits // 8))
    assert torch.equal(packing.unpack(packed, bits, group), codes)


def test_the_layout_is_a_little_endian_stream() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    for bits in (3, 4):
        stream = sum(int(c) << (bits * i) for i, c in enumerate(codes[0]))
        assert packing.pack(codes, bits, 8).numpy().tobytes() == stream.to_bytes(bits, "little")


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(PlanishError, match="code 8 does not fit 3 bits"):
        packing.pack(torch.full((1, 8), 8, dtype=torch.uint8), 3, 8)
    with pytest.raises(PlanishError, match="group 3 does not divide 8"):
        packing.pack(torch.zeros(1, 8, dtype=torch.uint8), 4, 3)
    with pytest.raises(PlanishError, match="5 bits are not known"):
        packing.pack(torch.zeros(1, 8, dtype=torch.uint8), 5, 8)
    with pytest.raises(
        PlanishError, match="layer 'fc': group 64 does not divide its 172 input channels; these do: '43', '86'"
    ):
        packing.check_group("fc", 172, 64)


GRID = [
    (bits, channels, group, zero)
    for bits in packing.BITS
    for channels, group in [(256, 16), (256, 64), (512, 256), (192, 96), (172, 172), (172, 43), (40, 8), (24, 24)]
    for zero in ("none", "codes", "float")
]


@pytest.mark.parametrize(("bits", "channels", "group", "zero"), GRID)
def test_onnx_runtime_equals_the_reference(bits: int, channels: int, group: int, zero: str) -> None:
    tensors = drawn(20, channels, bits, group, zero)
    if zero == "codes":
        del tensors["bias"]
    session = ort.create(lowered(tensors, bits=bits, group=group).SerializeToString(), 1)
    for batch in (1, 3):
        x = torch.randn(batch, 3, channels, generator=torch.Generator().manual_seed(batch))
        want = torch.ops.planish.linear_wna16(
            x, tensors["codes"], tensors["scale"], tensors.get("zero_point"), tensors.get("bias"), bits, group
        ).numpy()
        got = ort.run(session, {"x": x.numpy()})["y"]
        assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()


@pytest.mark.parametrize(("bits", "channels", "group", "zero"), GRID[::5])
def test_nodes_of_four_bits_stand_for_eight_and_two(bits: int, channels: int, group: int, zero: str) -> None:
    """`in_floats`, which keeps activations in float at full speed, changes nothing but the rounding of float32 sums."""
    model = lowered(drawn(20, channels, bits, group, zero), bits=bits, group=group)
    x = np.random.default_rng(0).standard_normal((2, 3, channels), np.float32)
    want = ort.run(ort.create(model.SerializeToString(), 1), {"x": x})["y"]
    accuracy.in_floats(model)
    widths = [helper.get_node_attr_value(n, "bits") for n in model.graph.node if n.op_type == "MatMulNBits"]
    assert widths == [4] * (2 if bits == 8 else 1)
    got = ort.run(ort.create(model.SerializeToString(), 1), {"x": x})["y"]
    assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()


@pytest.mark.parametrize(("bits", "container"), [(2, 2), (3, 4), (4, 4), (8, 8)])
def test_the_weight_stays_packed_in_the_graph_that_runs(bits: int, container: int, tmp_path: Path) -> None:
    model = lowered(drawn(256, 512, bits, 64, "none"), bits=bits, group=64)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    runs = optimized(tmp_path / "m.onnx")
    weights, scales = 256 * 512, 256 * 8 * 4
    assert float_weight_bytes(runs) == scales
    assert weight_bytes(runs) == weights * container // 8 + scales + 256 * 4
    assert [(n.op_type, n.name) for n in runs.graph.node] == [("MatMulNBits", "fc")]
    assert bool(metadata.get(model, metadata.NOTES)) == (bits == 3)


def test_a_group_that_onnx_runtime_lacks_is_named_with_its_bytes() -> None:
    (note,) = metadata.get(lowered(drawn(20, 172, 4, 43, "none"), bits=4, group=43), metadata.NOTES)
    assert "'fc'" in note and "groups of 43 are filled up to 48" in note and f"({20 * 4 * 5 // 2} bytes more)" in note


def test_zeros_stay_zero() -> None:
    codes = packing.pack(torch.full((4, 32), 8, dtype=torch.uint8), 4, 16)
    assert torch.equal(dequantize(codes, torch.ones(4, 2), None, 4, 16), torch.zeros(4, 32))


def test_a_traced_layer_keeps_its_name_and_shape() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Module()
            for name, value in drawn(20, 64, 4, 32, "none").items():
                self.fc.register_buffer(f"weight_{name}", value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            f = self.fc
            return torch.ops.planish.linear_wna16(x, f.weight_codes, f.weight_scale, None, f.weight_bias, 4, 32)

    proto = lowering.to_onnx(trace(Layer(), {"x": torch.zeros(1, 3, 64)}, "layer"))
    (node,) = proto.graph.node
    assert (node.op_type, node.name, node.output[0]) == ("MatMulNBits", "fc", "output")
    assert [d.dim_param or d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == ["batch", 3, 20]
