"""The deployment graph computes what ONNX Runtime computes, bit for bit, and refuses what it does not know."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from planish.common.errors import PlanishError
from planish.export import qdq

NAMES = ("residual", "branches", "flatten", "matmul", "channels_last", "padded")
X, Y = np.float32(0.05), np.float32(0.04)


def scalar(name, value, dtype):
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def hand_made(nodes, shape, constants=(), dtype=TensorProto.FLOAT, out_dtype=TensorProto.FLOAT):
    """A model with input x and output y around `nodes`; constants xs, xz, ys, yz hold two quantizations."""
    fixed = [
        scalar("xs", X, np.float32),
        scalar("xz", 120, np.uint8),
        scalar("ys", Y, np.float32),
        scalar("yz", 131, np.uint8),
    ]
    graph = helper.make_graph(
        [
            helper.make_node(kind, inputs, outputs, name=f"n_{outputs[0]}", **extra)
            for kind, inputs, outputs, extra in nodes
        ],
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", out_dtype, None)],
        [*fixed, *constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def around(nodes, shape, constants=()):
    """quantize -> dequantize -> nodes (from d to o) -> quantize -> dequantize."""
    first = [("QuantizeLinear", ["x", "xs", "xz"], ["q"], {}), ("DequantizeLinear", ["q", "xs", "xz"], ["d"], {})]
    last = [("QuantizeLinear", ["o", "ys", "yz"], ["p"], {}), ("DequantizeLinear", ["p", "ys", "yz"], ["y"], {})]
    return hand_made([*first, *nodes, *last], shape, constants)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_equals_onnxruntime(name, unsigned, per_channel, tiny, ort_outputs):
    model, x = tiny(name, unsigned, per_channel)
    graph = qdq.read(model)
    ours, theirs = graph.reference({"x": x})["y"], ort_outputs(model, {"x": x})["y"]
    if name == "branches" and not unsigned:
        # on int8 codes ONNX Runtime's padded average pool rounds otherwise than on the same codes as uint8
        assert np.abs(ours - theirs).max() <= 2.01 * graph.outputs[0].tensor.scale
        return
    np.testing.assert_array_equal(ours, theirs)


def test_flattening_before_a_dense_layer_costs_nothing(tiny):
    graph = qdq.read(tiny("flatten")[0])
    assert [n.op for n in graph.nodes if not graph.alias(n)] == ["conv2d", "fully_connected"]


def test_transposes_at_the_borders_vanish(tiny):
    graph = qdq.read(tiny("channels_last")[0])
    assert [n.op for n in graph.nodes] == ["conv2d", "conv2d"]
    assert graph.inputs[0].order == graph.outputs[0].order == (0, 1, 2, 3)


def test_zero_padding_goes_into_the_convolution(tiny):
    graph = qdq.read(tiny("padded")[0])
    assert [n.op for n in graph.nodes] == ["conv2d", "slice"]
    assert graph.nodes[0].attributes["pads"] == (0, 0, 1, 1)


def test_macs(tiny):
    assert qdq.read(tiny("flatten")[0]).macs == 8 * 8 * 4 * 27 + 256 * 7


def test_movement_on_codes_and_gather(ort_outputs):
    """Reshape, Transpose, Pad, Slice and MaxPool between the integer tensors themselves, and integer borders."""
    nodes = [
        ("Pad", ["x", "pads"], ["a"], {}),
        ("MaxPool", ["a"], ["b"], {"kernel_shape": [2, 2], "strides": [1, 1]}),
        ("Transpose", ["b"], ["c"], {"perm": [0, 1, 3, 2]}),
        ("Gather", ["c", "rows"], ["e"], {"axis": 2}),
        ("Reshape", ["e", "shape"], ["f"], {}),
        ("DequantizeLinear", ["f", "xs", "xz"], ["g"], {}),
        ("Relu", ["g"], ["o"], {}),
        ("QuantizeLinear", ["o", "ys", "yz"], ["y"], {}),
    ]
    constants = [
        scalar("pads", [0, 0, 1, 0, 0, 0, 0, 1], np.int64),
        scalar("rows", [1, 3], np.int64),
        scalar("shape", [0, -1], np.int64),
    ]
    first = [
        ("DequantizeLinear", ["x", "xs", "xz"], ["d"], {}),
        ("QuantizeLinear", ["d", "xs", "xz"], ["r"], {}),
    ]
    nodes[0] = ("Pad", ["r", "pads"], ["a"], {})
    model = hand_made([*first, *nodes], [1, 2, 5, 4], constants, TensorProto.UINT8, TensorProto.UINT8)
    x = np.random.default_rng(0).integers(0, 256, (1, 2, 5, 4)).astype(np.uint8)
    np.testing.assert_array_equal(qdq.read(model).reference({"x": x})["y"], ort_outputs(model, {"x": x})["y"])


def test_shape_computations_are_folded(ort_outputs):
    """Shape, Gather and Concat that feed a Reshape, as exporters write them."""
    nodes = [
        ("Shape", ["d"], ["s"], {}),
        ("Gather", ["s", "zero"], ["batch"], {}),
        ("Concat", ["batch", "rest"], ["target"], {"axis": 0}),
        ("Reshape", ["d", "target"], ["o"], {}),
    ]
    model = around(nodes, ["n", 2, 3, 3], [scalar("zero", [0], np.int64), scalar("rest", [-1], np.int64)])
    x = np.random.default_rng(0).normal(0, 3, (5, 2, 3, 3)).astype(np.float32)
    graph = qdq.read(model)
    assert graph.outputs[0].shape == (1, 18)
    np.testing.assert_array_equal(graph.reference({"x": x})["y"], ort_outputs(model, {"x": x})["y"])


def test_whole_map_average_rounds_ties_like_onnxruntime(ort_outputs):
    """An AveragePool over the whole image and equal scales: every 64th mean is a tie."""
    fixed = [("AveragePool", ["d"], ["o"], {"kernel_shape": [8, 8]})]
    model = around(fixed, ["n", 64, 8, 8])
    for node in model.graph.node[-2:]:
        node.input[1], node.input[2] = "xs", "xz"
    x = np.random.default_rng(0).uniform(-6, 6, (16, 64, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(qdq.read(model).reference({"x": x})["y"], ort_outputs(model, {"x": x})["y"])


def test_dead_nodes_are_dropped():
    nodes = [("LpNormalization", ["d"], ["unused"], {}), ("Relu", ["d"], ["o"], {})]
    assert [n.op for n in qdq.read(around(nodes, [1, 4])).nodes] == ["clamp"]


def refused(model):
    with pytest.raises(PlanishError) as caught:
        qdq.read(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_op_is_named_with_the_known_ones():
    message = refused(around([("LpNormalization", ["d"], ["o"], {})], [1, 4]))
    assert "'n_o' is a 'LpNormalization'" in message
    assert "Conv" in message
    assert "Gemm" in message


def test_float_tensor_is_named():
    message = refused(around([("Sigmoid", ["d"], ["s"], {}), ("Softmax", ["s"], ["o"], {})], [1, 4]))
    assert "'n_o' (Softmax) reads the float tensor 's'" in message


def gelu():
    """Ops of GELU written out, from d to o."""
    nodes = [
        ("Div", ["d", "root"], ["a"], {}),
        ("Erf", ["a"], ["b"], {}),
        ("Add", ["b", "one"], ["c"], {}),
        ("Mul", ["d", "c"], ["e"], {}),
        ("Mul", ["e", "half"], ["o"], {}),
    ]
    return nodes, [scalar("root", 2**0.5, np.float32), scalar("one", 1, np.float32), scalar("half", 0.5, np.float32)]


def test_a_function_written_as_several_ops_is_one_table(ort_outputs):
    nodes, constants = gelu()
    silu = [("Sigmoid", ["d"], ["a"], {}), ("Mul", ["a", "d"], ["b"], {}), ("Relu", ["b"], ["o"], {})]
    for found, given in ((nodes, constants), (silu, [])):
        model = around(found, ["n", 5], given)
        graph = qdq.read(model)
        assert [n.op for n in graph.nodes] == ["lookup"]
        x = np.random.default_rng(0).normal(0, 3, (200, 5)).astype(np.float32)
        ours, theirs = graph.reference({"x": x})["y"], ort_outputs(model, {"x": x})["y"]
        assert np.abs(ours - theirs).max() <= 1.01 * Y
        assert (ours != theirs).mean() < 0.01


def test_a_scale_that_changes_no_code_costs_nothing(ort_outputs):
    model = around([("Mul", ["d", "c"], ["o"], {})], ["n", 5], [scalar("c", Y / X, np.float32)])
    for node in model.graph.node[-2:]:
        node.input[2] = "xz"
    graph = qdq.read(model)
    assert all(graph.alias(n) for n in graph.nodes)
    x = np.random.default_rng(0).normal(0, 3, (50, 5)).astype(np.float32)
    np.testing.assert_array_equal(graph.reference({"x": x})["y"], ort_outputs(model, {"x": x})["y"])


def test_float_output_is_named():
    first = [("QuantizeLinear", ["x", "xs", "xz"], ["q"], {}), ("DequantizeLinear", ["q", "xs", "xz"], ["d"], {})]
    assert "output 'y' (Sigmoid) is a float tensor" in refused(
        hand_made([*first, ("Sigmoid", ["d"], ["y"], {})], [1, 4])
    )


def test_float_model_is_refused():
    assert "not quantized" in refused(hand_made([("Relu", ["x"], ["y"], {})], [1, 4]))


def test_dynamic_shapes_are_refused():
    assert "'width' at axis 3" in refused(around([("Relu", ["d"], ["o"], {})], ["n", 3, 8, "width"]))
    assert "fixed batch of 4" in refused(around([("Relu", ["d"], ["o"], {})], [4, 3]))


def test_old_opset_is_refused():
    model = around([("Relu", ["d"], ["o"], {})], [1, 4])
    model.opset_import[0].version = 11
    assert "opset 11" in refused(model)


def test_missing_input_and_wrong_shape():
    graph = qdq.read(around([("Relu", ["d"], ["o"], {})], ["n", 4]))
    with pytest.raises(PlanishError, match="input 'x' is missing"):
        graph.reference({})
    with pytest.raises(PlanishError, match="has shape"):
        graph.reference({"x": np.zeros((2, 5), np.float32)})


def test_reading_does_not_change_the_model(tiny):
    model = tiny("residual")[0]
    before = onnx.ModelProto.SerializeToString(model, deterministic=True)
    qdq.read(model)
    assert model.SerializeToString(deterministic=True) == before
