"""Int8 .tflite files: every operator within one code of TFLite's reference kernels, whole networks equal to its default ones, clear refusals."""

import json

import numpy as np
import onnx
import pytest
from planish.common.errors import PlanishError
from planish.compress import tflite_file, tflite_import
from planish.export import qdq

NETWORKS = ("ic_resnet8", "kws_dscnn", "vww_mobilenet", "ad_autoencoder", "sww_dscnn1d")
SCALE, ZERO = 0.03, -11


@pytest.fixture(scope="module")
def reference():
    """reference(content, x) -> outputs (n, ...) of TFLite's reference kernels for codes x (n, ...), one list per output."""
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="TFLite's kernels: pip install ai-edge-litert")

    def run(content, x, kernels="BUILTIN_REF", tensors=None):
        chosen = getattr(litert.OpResolverType, kernels)
        options = {"experimental_op_resolver_type": chosen, "experimental_preserve_all_tensors": tensors is not None}
        interpreter = litert.Interpreter(model_content=content, **options)
        interpreter.allocate_tensors()
        source = interpreter.get_input_details()[0]["index"]
        wanted = tensors or [d["index"] for d in interpreter.get_output_details()]
        rows = []
        for sample in x:
            interpreter.set_tensor(source, sample[None])
            interpreter.invoke()
            rows.append([interpreter.get_tensor(i).copy() for i in wanted])
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    return run


@pytest.fixture
def imported(tmp_path):
    """imported(content) -> (ONNX model, deployment graph)."""

    def load(content):
        (tmp_path / "model.tflite").write_bytes(content)
        model = tflite_import.load(tmp_path / "model.tflite")
        onnx.checker.check_model(model, full_check=True)
        return model, qdq.read(model)

    return load


def samples(*shape):
    return np.random.default_rng(1).integers(-128, 128, shape).astype(np.int8)


def weight(s, *shape, axis=0):
    rng = np.random.default_rng(len(s.tensors))
    scales = rng.uniform(0.002, 0.01, shape[axis]) if axis is not None else 0.005
    return s.tensor(shape, scales, 0, data=rng.integers(-127, 128, shape), axis=axis or 0)


def bias(s, n):
    values = np.random.default_rng(n).integers(-2000, 2000, n)
    return s.tensor((n,), np.full(n, 1e-4, np.float32), dtype="INT32", data=values)


def conv(s, x, y, *shape, **options):
    options = {"Padding": 0, "StrideH": 1, "StrideW": 1} | options
    s.op("CONV_2D", [x, weight(s, *shape), bias(s, shape[0])], [y], **options)


def made(s, x, y, kind, *operands, scale=SCALE, zero=ZERO, **options):
    """One operator between x and an output of shape y."""
    y = s.tensor(y, scale, zero)
    s.op(kind, [x, *operands], [y], **options)
    return y


def same(s, x, y, kind, *operands, **options):
    """An operator that keeps its input's quantization."""
    return made(s, x, y, kind, *operands, scale=0.02, zero=4, **options)


def draw(s, name):
    """A file with the operator `name` in one of its forms: content, shape of the input."""
    shape = {"two": (1, 12), "three": (1, 6, 5), "image": (1, 7, 6, 4)}
    kind, _, form = name.partition(":")
    size = shape["two"] if "two" in form else shape["three"] if "three" in form else shape["image"]
    x = s.tensor(size, 0.02, 4)
    if kind == "conv":
        geometry = {
            "even": ((8, 3, 3, 4), (1, 4, 3, 8), {"StrideH": 2, "StrideW": 2, "FusedActivationFunction": 3}),
            "valid": ((8, 2, 3, 4), (1, 6, 4, 8), {"Padding": 1}),
            "dilated": ((6, 3, 3, 4), (1, 7, 6, 6), {"DilationHFactor": 2, "DilationWFactor": 2}),
            "groups": ((6, 3, 3, 2), (1, 7, 6, 6), {"FusedActivationFunction": 1}),
        }[form]
        y = s.tensor(geometry[1], SCALE, ZERO)
        conv(s, x, y, *geometry[0], **geometry[2])
    elif kind == "depthwise":
        w = weight(s, 1, 3, 3, 8 if form == "twice" else 4, axis=3)
        y = s.tensor((1, 4, 3, 8) if form == "twice" else (1, 7, 6, 4), SCALE, ZERO)
        step = 2 if form == "twice" else 1
        options = {"Padding": 0, "StrideH": step, "StrideW": step, "DepthMultiplier": step}
        s.op("DEPTHWISE_CONV_2D", [x, w, bias(s, step * 4)], [y], **options)
    elif kind == "pad":
        padded = s.tensor((1, 8, 8, 4), 0.02, 4)
        s.op("PAD", [x, s.numbers([[0, 0], [0, 1], [1, 1], [0, 0]])], [padded])
        y = s.tensor((1, 3, 3, 5), SCALE, ZERO)
        conv(s, padded, y, 5, 3, 3, 4, Padding=1, StrideH=2, StrideW=2)
    elif kind == "dense":
        depth = {"two": 12, "image": 168, "three": 5}[form]
        out = (1, 6, 7) if form == "three" else (1, 7)
        options = {"KeepNumDims": form == "three", "FusedActivationFunction": 1}
        y = made(s, x, out, "FULLY_CONNECTED", weight(s, 7, depth, axis=None), bias(s, 7), **options)
    elif kind in ("add", "mul"):
        if form == "channel":
            other = s.tensor((4,), 0.01, -3, data=samples(4))
        elif form == "itself":
            other = x
        else:
            other = s.tensor((1, 7, 6, 4), 0.05, 9, data=samples(1, 7, 6, 4))
        y = made(s, x, size, kind.upper(), other, FusedActivationFunction=1 if form == "relu" else 0)
    elif kind in ("average", "max"):
        window = {
            "FilterHeight": 3,
            "FilterWidth": 2,
            "StrideH": 2,
            "StrideW": 2,
            "Padding": 0 if form == "same" else 1,
        }
        pool = {"average": "AVERAGE_POOL_2D", "max": "MAX_POOL_2D"}[kind]
        y = same(s, x, (1, 4, 3, 4) if form == "same" else (1, 3, 3, 4), pool, **window)
    elif kind == "mean":
        axes, out, keep = {
            "keep": ([1, 2], (1, 1, 1, 4), True),
            "drop": ([1, 2], (1, 4), False),
            "three": ([1], (1, 5), False),
        }[form]
        y = made(s, x, out, "MEAN", s.numbers(axes), KeepDims=keep)
    elif kind == "reshape":
        out = {"flat": (1, 168), "two image": (1, 2, 2, 3), "image": (1, 3, 14, 4), "three": (1, 5, 6)}[form]
        y = same(s, x, out, "RESHAPE", s.numbers(out))
    elif kind == "softmax":
        y = made(s, x, size, "SOFTMAX", scale=1 / 256, zero=-128, Beta=1.0)
    elif kind == "concat":
        other = s.tensor(size, 0.02, 4)
        s.op("TANH" if form == "tanh" else "QUANTIZE", [x], [other])
        out = (1, 7, 6, 8) if form == "3" else (1, 14, 6, 4)
        y = same(s, x, out, "CONCATENATION", other, Axis=3 if form == "3" else 1)
    elif kind == "transpose":
        order = [0, 2, 1] if "three" in form else [0, 2, 1, 3] if form == "turn" else [0, 3, 1, 2]
        y = same(s, x, tuple(size[a] for a in order), "TRANSPOSE", s.numbers(order))
    elif kind == "squeeze":
        up = s.tensor((1, 1, 6, 5), 0.02, 4)
        s.op("EXPAND_DIMS", [x, s.numbers(1)], [up])
        y = same(s, up, (1, 6, 5), "SQUEEZE", SqueezeDims=[1])
    elif kind == "strided":
        numbers = [s.numbers(v) for v in ([0, 1, -1, 0], [1, 7, 0, 4], [1, 2, -1 if form == "back" else 1, 1])]
        if form == "back":
            y = same(s, x, (1, 3, 5, 4), "STRIDED_SLICE", *numbers, BeginMask=1, EndMask=9)
        else:
            y = same(s, x, (1, 3, 4), "STRIDED_SLICE", *numbers, BeginMask=1, EndMask=9, ShrinkAxisMask=4)
    elif kind == "slice":
        y = same(s, x, (1, 3, 6, 2), "SLICE", s.numbers([0, 2, 0, 1]), s.numbers([1, 3, -1, 2]))
    elif kind == "split":
        parts = [s.tensor((1, 7, 6, 2), 0.02, 4) for _ in range(2)]
        s.op("SPLIT", [s.numbers(3), x], parts, NumSplits=2)
        y = made(s, parts[0], (1, 7, 6, 2), "ADD", parts[1])
    elif kind == "requantize":
        y = made(s, x, size, "QUANTIZE")
    else:
        out = {"LOGISTIC": (1 / 256, -128), "TANH": (1 / 128, 0)}.get(
            kind, (0.02, 4) if kind[:4] == "RELU" else (SCALE, ZERO)
        )
        y = made(s, x, size, kind, scale=out[0], zero=out[1], **({"Alpha": 0.1} if kind == "LEAKY_RELU" else {}))
    return s.content([x], [y]), size


FORMS = (
    "conv:even", "conv:valid", "conv:dilated", "conv:groups", "depthwise:once", "depthwise:twice", "pad:conv", "dense:two",
    "dense:image", "dense:three", "add:relu", "add:channel", "add:itself", "mul:other", "mul:channel", "average:same",
    "average:valid", "max:same", "max:valid", "mean:keep", "mean:drop", "mean:three", "reshape:flat", "reshape:two image",
    "reshape:image", "reshape:three", "softmax:two", "softmax:image", "concat:3", "concat:1", "transpose:turn",
    "transpose:first", "transpose:three", "squeeze:three", "strided:back", "strided:shrink", "slice:image", "split:image",
    "requantize:image", "RELU:image", "RELU6:two", "LOGISTIC:two", "TANH:image", "HARD_SWISH:two", "LEAKY_RELU:image",
)  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("name", FORMS)
def test_operators_are_within_one_code_of_tflite(name, sketch, imported, reference, ort_outputs):
    content, shape = draw(sketch, name)
    x = samples(40, *shape[1:])
    model, graph = imported(content)
    source = graph.inputs[0].name
    (ours,) = graph.reference({source: x}).values()
    (theirs,) = reference(content, x)
    apart = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape
    assert apart.max() <= 1
    exact = name.split(":")[0] in (
        "reshape",
        "transpose",
        "squeeze",
        "strided",
        "slice",
        "max",
        "concat",
        "RELU",
        "RELU6",
    )
    ties = name.startswith(("average", "mean", "LEAKY"))  # halves are frequent there, and go to even or away from zero
    assert (apart > 0).mean() <= (0 if exact else 0.15 if ties else 0.03)
    (runtime,) = ort_outputs(model, {source: x}).values()
    assert np.abs(runtime.astype(int) - ours).max() <= (1 if name.startswith(("LOGISTIC", "TANH", "mean:three")) else 0)


def test_moves_that_are_free_in_c_run_no_code(sketch, imported):
    x = sketch.tensor((1, 12), 0.02, 4)
    image = same(sketch, x, (1, 2, 3, 2), "RESHAPE", sketch.numbers([1, 2, 3, 2]))
    y = sketch.tensor((1, 2, 3, 5), SCALE, ZERO)
    conv(sketch, image, y, 5, 1, 1, 2)
    flat = made(sketch, y, (1, 30), "RESHAPE", sketch.numbers([1, 30]))
    _, graph = imported(sketch.content([x], [flat]))
    assert [n.op for n in graph.nodes if not graph.alias(n)] == ["conv2d"]


def test_padding_before_a_convolution_is_its_own(sketch, imported):
    content, _ = draw(sketch, "pad:conv")
    _, graph = imported(content)
    assert [n.op for n in graph.nodes] == ["conv2d"]
    assert graph.nodes[0].attributes["pads"] == (0, 1, 1, 1)


def test_float_borders(sketch, imported):
    x, y = sketch.tensor((1, 7, 6, 4), dtype="FLOAT32"), sketch.tensor((1, 7, 6, 4), dtype="FLOAT32")
    q = sketch.tensor((1, 7, 6, 4), 0.02, 4)
    sketch.op("QUANTIZE", [x], [q])
    sketch.op("DEQUANTIZE", [same(sketch, q, (1, 7, 6, 4), "RELU")], [y])
    model, graph = imported(sketch.content([x], [y]))
    real = np.random.default_rng(0).normal(0, 1, (5, 7, 6, 4)).astype(np.float32)
    (got,) = graph.reference({"t0": real}).values()
    np.testing.assert_allclose(got, np.clip(real, 0, 0.02 * 123), atol=0.0101)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_four_bit_weights_are_unpacked(small_tflite, monkeypatch):
    reader = object.__new__(tflite_file._Reader)

    class Buffer:
        Offset = staticmethod(lambda: 0)
        DataAsNumpy = staticmethod(lambda: np.array([0x2F, 0x78, 0x09], np.uint8))

    class Root:
        BuffersLength = staticmethod(lambda: 2)
        Buffers = staticmethod(lambda i: Buffer)

    reader.root = Root
    assert reader._data(1, "w", (5,), "INT4").tolist() == [-1, 2, -8, 7, -7]


# --- trained networks


def network(data_folder, name):
    path = data_folder / "mlperf_tiny" / f"{name}_int8.tflite"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the data folder")
    return path


def inputs(data_folder, name, count):
    """Codes (count, ...) of real samples, except CIFAR images enlarged for vww and random levels for ad."""
    if name in ("ic_resnet8", "vww_mobilenet"):
        x = np.load(data_folder / "cifar10" / "cifar10_test_dev.npz")["x"][:count]
        x = x.repeat(3, 1).repeat(3, 2) if name == "vww_mobilenet" else x
        return (x.astype(np.int16) - 128).astype(np.int8)
    if name == "kws_dscnn":
        return np.load(data_folder / "kws_mfcc" / "kws_mfcc_dev.npz")["x"][:count]
    if name == "sww_dscnn1d":
        x = np.load(data_folder / "mlperf_tiny" / "sww_calibration_samples.npz")["specs"][:count]
        return np.clip(np.rint(x / 0.0037010475) - 128, -128, 127).astype(np.int8)
    level = np.random.default_rng(0).normal(-20, 12, (count, 640))
    return np.clip(np.rint(level / 0.39101523) + 89, -128, 127).astype(np.int8)


@pytest.mark.peer
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_of_a_network_is_within_one_code_of_the_reference_kernels(name, data_folder, reference):
    path = network(data_folder, name)
    read, graph = tflite_file.read(path), qdq.read(tflite_import.load(path))
    x = inputs(data_folder, name, 4)
    indices = [*read.inputs, *(op.outputs[0] for op in read.operators)]
    values = reference(path.read_bytes(), x, tensors=indices)
    theirs = {i: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for i, v in zip(indices, values, strict=True)}
    assert len(graph.nodes) == len(read.operators)
    different, total = 0, 0
    for node, op in zip(graph.nodes, read.operators, strict=True):
        y = graph.ops[node.op].reference(node, *(theirs[i] for i in op.inputs if i in theirs))
        apart = np.abs(y.astype(int) - theirs[op.outputs[0]])
        assert apart.max() <= 1, op.label
        different, total = different + int((apart > 0).sum()), total + apart.size
    assert different <= 0.005 * total


@pytest.mark.peer
@pytest.mark.parametrize("name", NETWORKS[1:])
def test_a_whole_network_equals_the_default_kernels(name, data_folder, reference):
    # TFLite's default kernels on a CPU (XNNPACK) round as planish does: one float32 multiply, half to even
    path = network(data_folder, name)
    graph = qdq.read(tflite_import.load(path))
    x = inputs(data_folder, name, 12)
    (ours,) = graph.reference({graph.inputs[0].name: x}).values()
    (theirs,) = reference(path.read_bytes(), x, "AUTO")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name, count, accuracy", [("ic_resnet8", 500, 0.84), ("kws_dscnn", 500, 0.88)])
def test_accuracy_is_kept(name, count, accuracy, data_folder):
    graph = qdq.read(tflite_import.load(network(data_folder, name)))
    folder = {"ic_resnet8": "cifar10/cifar10_test_dev.npz", "kws_dscnn": "kws_mfcc/kws_mfcc_dev.npz"}[name]
    labels = np.load(data_folder / folder)["y"][:count]
    (y,) = graph.reference({graph.inputs[0].name: inputs(data_folder, name, count)}).values()
    assert (y.argmax(1) == labels).mean() >= accuracy


# --- by one command, and refusals


def test_export_by_one_command(small_tflite, tmp_path, capsys, monkeypatch):
    from planish import cli

    (tmp_path / "small.tflite").write_bytes(small_tflite)
    monkeypatch.setattr(
        "sys.argv",
        ["planish", "export", str(tmp_path / "small.tflite"), "-f", "c", "-o", str(tmp_path / "out"), "--json"],
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    report = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None)
    assert report["format"] == "c"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["golden_differences"]["onnxruntime"] == 0
    assert [i["dtype"] for i in manifest["inputs"]] == ["int8"]


def test_inspect_and_evaluate_take_it(small_tflite, tmp_path):
    from planish import pipeline

    (tmp_path / "small.tflite").write_bytes(small_tflite)
    found = pipeline.inspect(str(tmp_path / "small.tflite"))
    assert [r["shape"] for r in found["layers"]] == [(8, 3, 3, 3), (8, 1, 3, 3), (4, 32)]


def refused(sketch, tmp_path, inputs, outputs):
    (tmp_path / "m.tflite").write_bytes(sketch.content(inputs, outputs))
    with pytest.raises(PlanishError) as error:
        tflite_import.load(tmp_path / "m.tflite")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind, name", [("CUMSUM", "CUMSUM"), ("MyOwnOp", "MyOwnOp")])
def test_an_unknown_operator_is_named(kind, name, sketch, tmp_path):
    x = sketch.tensor((1, 4), 0.02)
    text = refused(sketch, tmp_path, [x], [made(sketch, x, (1, 4), kind)])
    assert name in text
    assert "CONV_2D" in text


def test_float_and_partly_quantized_models_are_refused(sketch, tmp_path):
    x, y = (sketch.tensor((1, 4), dtype="FLOAT32") for _ in range(2))
    sketch.op("RELU", [x], [y])
    assert "a float model" in refused(sketch, tmp_path, [x], [y])
    w, z = weight(sketch, 4, 4, axis=None), sketch.tensor((1, 4), dtype="FLOAT32")
    sketch.op("FULLY_CONNECTED", [x, w, -1], [z])
    text = refused(sketch, tmp_path, [x], [z])
    assert "dynamic-range" in text
    assert "'t3'" in text


def test_int16_activations_are_refused(sketch, tmp_path):
    x, y = (sketch.tensor((1, 4), 0.02, dtype="INT16") for _ in range(2))
    sketch.op("RELU", [x], [y])
    assert "INT16" in refused(sketch, tmp_path, [x], [y])


def test_open_dimensions_and_batches_are_refused(sketch, tmp_path):
    x = sketch.tensor((1, 8, 8, 3), 0.02, signature=(-1, -1, 8, 3))
    assert "dimension 1" in refused(sketch, tmp_path, [x], [same(sketch, x, (1, 8, 8, 3), "RELU")])
    x = sketch.tensor((2, 8), 0.02)
    assert "(2, 8)" in refused(sketch, tmp_path, [x], [same(sketch, x, (2, 8), "RELU")])


def test_a_stated_shape_that_the_operator_does_not_give_is_refused(sketch, tmp_path):
    x, y = sketch.tensor((1, 7, 6, 4), 0.02), sketch.tensor((1, 4, 4, 8), SCALE)
    conv(sketch, x, y, 8, 3, 3, 4, StrideH=2, StrideW=2)
    assert "(1, 4, 4, 8)" in refused(sketch, tmp_path, [x], [y])


def test_real_float_models_are_refused(data_folder):
    for name, text in (("ic_resnet8_float", "a float model"), ("kws_dscnn_dynrange", "dynamic-range")):
        path = data_folder / "mlperf_tiny" / f"{name}.tflite"
        if path.is_file():
            with pytest.raises(PlanishError, match=text):
                tflite_import.load(path)


def test_what_is_no_tflite_file_is_refused(tmp_path):
    pytest.importorskip("tflite")
    for content in (b"", b"TFL3", b"\0" * 64, b"\x10\0\0\0TFL3"):
        (tmp_path / "m.tflite").write_bytes(content)
        with pytest.raises(PlanishError):
            tflite_import.load(tmp_path / "m.tflite")
    with pytest.raises(PlanishError, match="does not exist"):
        tflite_import.load(tmp_path / "none.tflite")
