"""SVDQuant's op: its parts, the unsigned form, ragged groups, and the ONNX form against the reference."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from planish.kernels import linear_svd as op
from planish.kernels.fused import Builder, Call
from planish.kernels.linear_wna16 import dequantize


def parts(out, inputs, rank, bits=4, group=64, seed=0, bias=True):
    """Tensors by argument name, and the residual (out, in) as stored."""
    generator = torch.Generator().manual_seed(seed)
    codes, scale = op.quantize_residual(torch.randn(out, inputs, generator=generator), bits, group)
    tensors = {
        "codes": codes,
        "scale": scale,
        "smooth": torch.rand(inputs, generator=generator) + 0.5,
        "down": torch.randn(rank, inputs, generator=generator).half(),
        "up": torch.randn(out, rank, generator=generator).half(),
        "bias": torch.randn(out, generator=generator) if bias else None,
    }
    return tensors, dequantize(codes, scale, None, bits, group)[:, :inputs]


def run(x, tensors, bits=4, group=64, activation_bits=4, shift=0.0, unsigned=False):
    return torch.ops.planish.linear_svd(x, *tensors.values(), bits, group, activation_bits, shift, unsigned)


def test_float_activations_give_the_product_with_residual_and_branch():
    tensors, residual = parts(20, 100, 8)
    x = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(1))
    weight = (residual + tensors["up"].float() @ tensors["down"].float()) * tensors["smooth"]
    expected = x @ weight.T + tensors["bias"]
    assert torch.allclose(run(x, tensors, activation_bits=16), expected, rtol=1e-4, atol=1e-3)


def test_four_bits_use_the_codes_from_minus_seven_to_seven_and_the_whole_unsigned_range():
    h = torch.tensor([[-1.0, -0.45, 0.0, 0.25, 1.0, 0.1]])
    grid = op.quantized(h, 4, 6, False) * 7
    assert grid.tolist() == [pytest.approx([-7, -3, 0, 2, 7, 1])]
    positive = op.quantized(h, 4, 6, True) * 15
    assert positive.tolist() == [pytest.approx([0, 0, 0, 4, 15, 2])]
    codes, scale = op.quantize_residual(torch.tensor([[-1.0, 0.5, 1.0], [0, 0, 0]]), 4, 3)
    assert scale.flatten().tolist() == [pytest.approx(1 / 7), 1.0]
    assert dequantize(codes, scale, None, 4, 3)[1].tolist() == [0, 0, 0]


def test_a_short_last_group_has_its_own_scale():
    tensors, residual = parts(8, 172, 0)
    assert tensors["codes"].shape == (8, 3, 32)
    assert tensors["scale"].shape == (8, 3)
    x = torch.randn(4, 172, generator=torch.Generator().manual_seed(1))
    x[:, 128:] *= 100  # the last 44 columns
    smoothed = x * tensors["smooth"]
    rounded = op.quantized(smoothed, 4, 64, False)
    assert rounded.shape == (4, 192)
    assert torch.equal(rounded[:, 172:], torch.zeros(4, 20))
    error = (rounded[:, :128] - smoothed[:, :128]).abs().max()
    assert error < smoothed[:, :128].abs().max() / 7
    assert torch.allclose(run(x, tensors), rounded[:, :172] @ residual.T + tensors["bias"], rtol=1e-4, atol=1e-2)


def test_the_shift_makes_inputs_bounded_below_use_every_code():
    tensors, residual = parts(16, 64, 4)
    x = torch.nn.functional.gelu(torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) * 2)
    exact = run(x, tensors, activation_bits=16)
    folded = tensors | {"bias": tensors["bias"] - 0.171875 * residual @ tensors["smooth"]}
    signed = (run(x, tensors) - exact).norm()
    unsigned = (run(x, folded, shift=0.171875, unsigned=True) - exact).norm()
    assert unsigned < 0.7 * signed
    lossless = run(x, folded, activation_bits=16, shift=0.171875, unsigned=True)
    assert torch.allclose(lossless, exact, rtol=1e-4, atol=1e-3)


def lowered(tensors, channels, attributes):
    graph = onnx.GraphProto(name="linear")
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", channels]))
    builder = Builder(graph, {})
    names = {"x": "x"} | {
        n: builder.constant(f"layer.weight_{n}", t.numpy()) for n, t in tensors.items() if t is not None
    }
    (name,) = op.LinearSvd().lower(Call("layer", names, attributes), builder)
    graph.node.extend(builder.nodes)
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", len(tensors["up"])]))
    used = {i for n in graph.node for i in n.input}
    for item in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(item)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize(("channels", "group"), [(128, 64), (172, 64), (64, 16), (48, 32), (20, 20), (192, 128)])
@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 4), (4, 8), (8, 8), (4, 16)])
@pytest.mark.parametrize("rank", [0, 6])
def test_the_onnx_form_equals_the_reference(channels, group, bits, activation_bits, rank):
    for unsigned in (False, True):
        tensors, _ = parts(24, channels, rank, bits, group, bias=rank > 0)
        shift = 0.25 if unsigned else 0.0
        attributes = {"bits": bits, "group": group, "activation_bits": activation_bits}
        attributes |= {"shift": shift, "unsigned": int(unsigned)}
        model = lowered(tensors, channels, attributes)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for shape in [(1, 1, channels), (2, 3, channels)]:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
            (found,) = session.run(None, {"x": x.numpy()})
            expected = run(x, tensors, bits, group, activation_bits, shift, unsigned)
            step = float((x * tensors["smooth"]).abs().max()) / (1 << (activation_bits - 1))
            close = np.abs(np.asarray(found) - expected.numpy()) < 1e-3
            assert close.mean() > 0.9  # the rest: one activation code beside a tie
            assert np.abs(np.asarray(found) - expected.numpy()).max() < 4 * step + 1e-3


def test_onnx_runtime_keeps_the_residual_packed(tmp_path):
    tensors, _ = parts(256, 512, 8)
    attributes = {"bits": 4, "group": 64, "activation_bits": 4, "shift": 0.0, "unsigned": 0}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = lowered(tensors, 512, attributes)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    sizes = {i.name: len(i.raw_data) for i in optimized.graph.initializer}
    weight_bytes = 4 * 256 * 512  # in float32
    floats = [int(np.prod(i.dims)) for i in optimized.graph.initializer if i.data_type == TensorProto.FLOAT]
    assert max(floats) <= 8 * 512  # the branch, widened
    assert sum(sizes.values()) < weight_bytes / 4
