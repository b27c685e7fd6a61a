"""A writer of small `.tflite` files for the tests: what a converter other than TensorFlow's might write."""

import numpy as np
import pytest

OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "ADD": "AddOptions",
    "MUL": "MulOptions",
    "MEAN": "ReducerOptions",
    "SOFTMAX": "SoftmaxOptions",
    "CONCATENATION": "ConcatenationOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "SPLIT": "SplitOptions",
    "RESHAPE": "ReshapeOptions",
    "SQUEEZE": "SqueezeOptions",
}
NUMPY = {"INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16, "INT32": np.int32, "FLOAT32": np.float32}


class Sketch:
    """Tensors and operators in the order in which they are added; `content` is the file."""

    def __init__(self):
        self.tensors, self.operators = [], []

    def tensor(self, shape, scale=None, zero=0, dtype="INT8", data=None, axis=0, signature=None):
        """Its index."""
        name = f"t{len(self.tensors)}"
        self.tensors.append((name, shape, scale, zero, dtype, data, axis, signature))
        return len(self.tensors) - 1

    def numbers(self, values):
        """A constant of INT32."""
        values = np.asarray(values, np.int32)
        return self.tensor(values.shape, dtype="INT32", data=values)

    def op(self, kind, inputs, outputs, **options):
        """Options by the names of the schema, e.g. StrideH=2."""
        self.operators.append((kind, inputs, outputs, options))

    def content(self, inputs, outputs):
        import flatbuffers
        import tflite

        b = flatbuffers.Builder(1024)

        def vector(values, kind):
            return b.CreateNumpyVector(np.asarray(values, kind))

        def tables(values, start):
            start(b, len(values))
            for v in reversed(values):
                b.PrependUOffsetTRelative(v)
            return b.EndVector()

        def table(name, **fields):
            getattr(tflite, f"{name}Start")(b)
            for key, value in fields.items():
                if value is not None:
                    getattr(tflite, f"{name}Add{key}")(b, value)
            return getattr(tflite, f"{name}End")(b)

        buffers, tensors = [table("Buffer")], []
        for name, shape, scale, zero, dtype, data, axis, signature in self.tensors:
            label, dims = b.CreateString(name), vector(shape, np.int32)
            sign = None if signature is None else vector(signature, np.int32)
            quantization = None
            if scale is not None:
                scales = np.atleast_1d(np.asarray(scale, np.float32))
                zeros = np.broadcast_to(np.asarray(zero, np.int64), scales.shape)
                given = {"Scale": vector(scales, np.float32), "ZeroPoint": vector(zeros, np.int64)}
                quantization = table("QuantizationParameters", **given, QuantizedDimension=axis)
            number = 0
            if data is not None:
                number = len(buffers)
                raw = vector(np.frombuffer(np.ascontiguousarray(data, NUMPY[dtype]).tobytes(), np.uint8), np.uint8)
                buffers.append(table("Buffer", Data=raw))
            kind = getattr(tflite.TensorType, dtype)
            given = {"Shape": dims, "ShapeSignature": sign, "Name": label, "Quantization": quantization}
            tensors.append(table("Tensor", **given, Type=kind, Buffer=number))
        codes, operators = [], []
        for kind, read, written, options in self.operators:
            number = getattr(tflite.BuiltinOperator, kind, None)
            custom = None if number is not None else b.CreateString(kind)
            number = tflite.BuiltinOperator.CUSTOM if number is None else number
            codes.append(
                table(
                    "OperatorCode",
                    DeprecatedBuiltinCode=min(number, 127),
                    BuiltinCode=number,
                    Version=1,
                    CustomCode=custom,
                )
            )
            extra = {}
            if kind in OPTIONS:
                lists = {k: vector(v, np.int32) for k, v in options.items() if isinstance(v, list)}
                extra["BuiltinOptions"] = table(OPTIONS[kind], **options | lists)
                extra["BuiltinOptionsType"] = getattr(tflite.BuiltinOptions, OPTIONS[kind])
            ends = {"Inputs": vector(read, np.int32), "Outputs": vector(written, np.int32)}
            operators.append(table("Operator", OpcodeIndex=len(codes) - 1, **ends, **extra))
        graph = table(
            "SubGraph",
            Tensors=tables(tensors, tflite.SubGraphStartTensorsVector),
            Operators=tables(operators, tflite.SubGraphStartOperatorsVector),
            Inputs=vector(inputs, np.int32),
            Outputs=vector(outputs, np.int32),
        )
        model = table(
            "Model",
            Version=3,
            OperatorCodes=tables(codes, tflite.ModelStartOperatorCodesVector),
            Subgraphs=tables([graph], tflite.ModelStartSubgraphsVector),
            Buffers=tables(buffers, tflite.ModelStartBuffersVector),
        )
        b.Finish(model, b"TFL3")
        return bytes(b.Output())


@pytest.fixture
def sketch():
    """An empty sketch of a `.tflite` file."""
    pytest.importorskip("tflite", reason="reading .tflite needs planish[mcu]")
    return Sketch()


@pytest.fixture(scope="session")
def small_tflite():
    """A small convolutional network with every common part, as the bytes of a file: input (1, 9, 9, 3) int8, output (1, 4)."""
    pytest.importorskip("tflite", reason="reading .tflite needs planish[mcu]")
    rng, s = np.random.default_rng(0), Sketch()

    def codes(*shape):
        return rng.integers(-127, 128, shape).astype(np.int8)

    def bias(n):
        return rng.integers(-300, 300, n).astype(np.int32)

    x = s.tensor((1, 9, 9, 3), 0.02, -5, signature=(-1, 9, 9, 3))
    w = s.tensor((8, 3, 3, 3), rng.uniform(0.002, 0.02, 8), 0, data=codes(8, 3, 3, 3))
    c = s.tensor((8,), 1e-4, dtype="INT32", data=bias(8))
    a = s.tensor((1, 5, 5, 8), 0.03, -128)
    s.op("CONV_2D", [x, w, c], [a], Padding=0, StrideH=2, StrideW=2, FusedActivationFunction=1)
    w = s.tensor((1, 3, 3, 8), rng.uniform(0.002, 0.02, 8), 0, data=codes(1, 3, 3, 8), axis=3)
    c = s.tensor((8,), 1e-4, dtype="INT32", data=bias(8))
    d = s.tensor((1, 5, 5, 8), 0.02, 3)
    s.op("DEPTHWISE_CONV_2D", [a, w, c], [d], Padding=0, StrideH=1, StrideW=1, DepthMultiplier=1)
    e = s.tensor((1, 5, 5, 8), 0.04, -20)
    s.op("ADD", [a, d], [e], FusedActivationFunction=1)
    f = s.tensor((1, 2, 2, 8), 0.04, -20)
    s.op("MAX_POOL_2D", [e], [f], Padding=1, StrideH=2, StrideW=2, FilterHeight=2, FilterWidth=2)
    g = s.tensor((1, 32), 0.04, -20)
    s.op("RESHAPE", [f, s.numbers([-1, 32])], [g])
    w, c = s.tensor((4, 32), 0.01, 0, data=codes(4, 32)), s.tensor((4,), 4e-4, dtype="INT32", data=bias(4))
    h = s.tensor((1, 4), 0.3, 10)
    s.op("FULLY_CONNECTED", [g, w, c], [h])
    y = s.tensor((1, 4), 1 / 256, -128)
    s.op("SOFTMAX", [h], [y], Beta=1.0)
    return s.content([x], [y])
