"""Fused low-bit ops in TVM: equal to their references, weights packed in the module, whole transformers through the format."""

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from planish.common.errors import PlanishError
from planish.export import tvm_import, tvm_schedule
from planish.export.tvm import Tvm, compile_model
from planish.kernels import codebooks, fused, hadamard, linear_fp8, linear_int8_outlier, linear_svd, packing
from planish.kernels.outlier_victim import codec, search
from planish.kernels.tvm import packed
from planish.kernels.tvm.lowering import VectorUnit, lowerings
from planish.runtimes.tvm import bound_main
from planish.targets import target

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

HOST = target.load("host")
ROUNDING = 2.0**-23
"""of one float32 operation, twice the unit roundoff"""


def arguments(op, tensors, attributes):
    """What the torch op takes, in the order of its schema."""
    schema = getattr(torch.ops.planish, op).default._schema
    return [tensors.get(a.name, attributes.get(a.name)) for a in schema.arguments]


def graph(op, tensors, attributes):
    """An ONNX model of one planish node: x is the input, every other tensor a constant."""
    schema = getattr(torch.ops.planish, op).default._schema
    names = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
    inputs = [n if tensors.get(n) is not None else "" for n in names]
    while not inputs[-1]:
        inputs.pop()
    outputs = [f"y{i}" for i in range(len(schema.returns))]
    given = {k: int(v) if isinstance(v, bool) else v for k, v in attributes.items()}
    node = helper.make_node(op, inputs, outputs, name="layer", domain="planish", **given)
    first = names[0]
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(first, TensorProto.FLOAT, list(tensors[first].shape))],
        [helper.make_empty_tensor_value_info(o) for o in outputs],
        [numpy_helper.from_array(tensors[n].numpy(), n) for n in inputs if n and n != first],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("planish", 1)]
    return helper.make_model(made, opset_imports=versions, ir_version=10)


def compiled(op, tensors, attributes):
    return compile_model(tvm_import.fix_batch(graph(op, tensors, attributes)), HOST, {})


def outputs(op, tensors, attributes):
    machine = tvm.relax.VirtualMachine(compiled(op, tensors, attributes).executable, tvm.cpu())
    first = next(iter(tensors.values()))
    value = bound_main(machine)(tvm.runtime.tensor(first.numpy()))
    return [v.numpy() for v in ([value] if hasattr(value, "numpy") else value)]


def check(op, tensors, attributes, peak):
    """TVM against the reference: the error of a sum of n products in any order is at most n * rounding * sum of magnitudes.

    `peak` bounds a weight as the kernel computes with it.
    """
    fused.ops()
    want = getattr(torch.ops.planish, op)(*arguments(op, tensors, attributes))
    want = [w.numpy() for w in (want if isinstance(want, tuple) else (want,))]
    got = outputs(op, tensors, attributes)
    first = next(iter(tensors.values()))
    reach = first.abs().sum(-1, keepdim=True).numpy() * peak + 10.0
    bound = (first.shape[-1] + 16) * ROUNDING * reach
    assert got[0].shape == want[0].shape
    assert got[0].dtype == np.float32
    assert (np.abs(got[0] - want[0]) <= bound).all()
    for more, other in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(more, other)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [((1, 64), 64, 32), ((2, 5, 48), 13, 24), ((7, 40), 100, 40)]
"""(shape of x, outputs, group): one row; a batch and a group that fills no word; rows that no tile divides, a scale a channel"""


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "out", "group"), SHAPES)
def test_weight_only(shape, out, group, bits):
    rng = np.random.default_rng(bits)
    groups = shape[-1] // group
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (out, shape[-1])).astype(np.uint8))
    tensors = {
        "x": normal(*shape),
        "codes": packing.pack(codes, bits, group),
        "scale": torch.from_numpy(rng.uniform(0.01, 0.02, (out, groups)).astype(np.float32)),
    }
    attributes = {"bits": bits, "group": group}
    check("linear_wna16", tensors, attributes, 0.02 * 2**bits)
    zero = rng.uniform(0, 1 << bits, (out, groups))
    tensors["zero_point"] = torch.from_numpy(zero.astype(np.float32 if bits == 3 else np.uint8))
    tensors["bias"] = normal(out)
    check("linear_wna16", tensors, attributes, 0.02 * 2**bits)


@pytest.mark.parametrize(("bits", "activation_bits", "activation_group"), [(8, 8, 0), (8, 8, -1), (4, 8, 0), (4, 4, 8)])
@pytest.mark.parametrize(("shape", "out", "group"), SHAPES)
def test_dynamic(shape, out, group, bits, activation_bits, activation_group):
    codes = torch.randint(0, 1 << bits, (out, shape[-1]), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    tensors = {
        "x": normal(*shape),
        "codes": packing.pack(codes, bits, group),
        "scale": 0.01 + 0.01 * torch.rand(out, shape[-1] // group),
        "bias": normal(out),
    }
    tensors["x"][..., 0, :8] = 0
    attributes = {"bits": bits, "group": group, "activation_bits": activation_bits}
    check("linear_dynamic", tensors, attributes | {"activation_group": activation_group}, 0.02 * 2 ** (bits - 1))


@pytest.mark.parametrize(
    ("form", "group", "nested"),
    [("nf4", 32, False), ("nf4", 64, True), ("fp4", 32, False), ("mxfp4", 32, False), ("nvfp4", 16, False)],
)
@pytest.mark.parametrize(("shape", "out"), [((1, 64), 64), ((2, 3, 96), 13)])
def test_codebook(shape, out, form, group, nested):
    weight = normal(out, shape[-1], seed=1)
    coded = codebooks.encode(weight, form, group, nested)
    tensors = {"x": normal(*shape), "codes": coded.codes, "scale": coded.scale, "bias": normal(out)}
    tensors |= {"second_scale": coded.second_scale, "offset": coded.offset}
    tensors = {k: v for k, v in tensors.items() if v is not None}
    check("linear_codebook", tensors, {"format": form, "group": group}, float(weight.abs().max()) * 1.2)


@pytest.mark.parametrize("activations", ["none", "e4m3", "e5m2"])
@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("shape", "out"), [((1, 64), 64), ((2, 3, 41), 13)])
def test_fp8(shape, out, form, activations):
    weight = normal(out, shape[-1], seed=1)
    weight[0, 0] = 1e-4  # below the normal numbers of the format
    codes, scale = linear_fp8.encode(weight, form)
    tensors = {"x": normal(*shape), "codes": codes, "scale": scale, "bias": normal(out)}
    tensors["x"][..., 0] = 1e-6
    check("linear_fp8", tensors, {"format": form, "activations": activations}, float(weight.abs().max()) * 1.1)


@pytest.mark.parametrize("columns", [None, [3, 17], [5]])
@pytest.mark.parametrize("samples", [0, -1])
def test_int8_outlier(columns, samples):
    weight = normal(30, 40, seed=1)
    codes, scale = linear_int8_outlier.quantize_rows(weight)
    x = normal(2, 5, 40)
    x[0, 1, 3] = 9.0
    x[1, 2, 20] = -7.0
    tensors = {"x": x, "codes": codes, "scale": scale, "bias": normal(30)}
    if columns is not None:
        tensors["columns"] = torch.tensor(columns)
        tensors["outlier_weight"] = weight[:, columns].half()
    check("linear_int8_outlier", tensors, {"threshold": 6.0, "dynamic": False, "samples": samples}, 4.0)


@pytest.mark.parametrize("columns", [[3, 17, 20], [5]])
def test_int8_outlier_columns_restored_from_int8_may_lie_beyond_float16(columns):
    weight = normal(30, 40, seed=1)
    weight[7] *= 1e6
    codes, scale = linear_int8_outlier.quantize_rows(weight)
    tensors = {"x": normal(2, 5, 40), "codes": codes, "scale": scale, "columns": torch.tensor(columns)}
    tensors["x"][..., columns] *= 30
    peak = float((codes.float() * scale[:, None]).abs()[:, columns].max())
    assert peak > torch.finfo(torch.float16).max
    attributes = {"threshold": 6.0, "dynamic": False, "samples": 0}
    check("linear_int8_outlier", tensors, attributes, float(weight.abs().max()))
    quiet = weight.abs().amax(1) < 10  # rows that are within float16 are as exact as before
    tensors |= {"codes": codes[quiet], "scale": scale[quiet]}
    check("linear_int8_outlier", tensors, attributes, 5.0)


def test_int8_outlier_of_run_time_is_refused():
    codes, scale = linear_int8_outlier.quantize_rows(normal(8, 16))
    attributes = {"threshold": 6.0, "dynamic": True, "samples": -1}
    with pytest.raises(PlanishError, match=r"layer 'layer'.*no TVM form"):
        compiled("linear_int8_outlier", {"x": normal(2, 16), "codes": codes, "scale": scale}, attributes)


@pytest.mark.parametrize(("activation_bits", "shift", "unsigned"), [(16, 0.0, False), (4, 0.0, False), (4, 0.2, True)])
@pytest.mark.parametrize(("shape", "out", "rank"), [((1, 64), 64, 8), ((2, 3, 44), 13, 3), ((3, 64), 32, 0)])
def test_svd(shape, out, rank, activation_bits, shift, unsigned):
    weight = normal(out, shape[-1], seed=1)
    codes, scale = linear_svd.quantize_residual(weight, 4, 16)
    tensors = {
        "x": normal(*shape).clamp_min(-0.17) if unsigned else normal(*shape),
        "codes": codes,
        "scale": scale,
        "smooth": 0.5 + torch.rand(shape[-1]),
        "down": normal(rank, shape[-1], seed=2).half(),
        "up": normal(out, rank, seed=3).half(),
        "bias": normal(out),
    }
    attributes = {"bits": 4, "group": 16, "activation_bits": activation_bits, "shift": shift, "unsigned": unsigned}
    check("linear_svd", tensors, attributes, 1.5 * (4 + 4 * 4 * rank))


@pytest.mark.parametrize(
    ("bits", "grid", "x_bits", "x_grid"),
    [
        (4, "int", 4, "int"),
        (4, "flint", 0, "int"),
        (4, "flint", 4, "flint"),
        (8, "int", 0, "int"),
        (8, "int", 8, "int"),
    ],
)
@pytest.mark.parametrize(("shape", "out"), [((1, 64), 64), ((2, 3, 42), 13)])
def test_outlier_victim_pairs(shape, out, bits, grid, x_bits, x_grid):
    weight, x = normal(out, shape[-1], seed=1), normal(*shape)
    weight.view(-1)[::37] *= 12
    x.view(-1)[::23] *= 15
    form = codec(bits, grid)
    scale, _ = search(weight, form, by_row=True)
    tensors = {"x": x, "codes": form.store(form.encode(weight / scale[:, None])), "scale": scale, "bias": normal(out)}
    if x_bits:
        tensors["x_scale"] = search(x.reshape(-1, shape[-1]), codec(x_bits, x_grid), by_row=False)[0]
    attributes = {"bits": bits, "grid": grid, "x_bits": x_bits, "x_grid": x_grid, "unpacked": False}
    check("linear_ovp", tensors, attributes, 2 * float(weight.abs().max()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("channels", "block"), [(64, 64), (96, 12), (344, 172), (256, 128), (20, 1)])
def test_hadamard(channels, block, transposed):
    signs = torch.sign(normal(channels, seed=1))
    for tensors in ({"x": normal(3, channels)}, {"x": normal(2, 2, channels), "signs": signs}):
        check("hadamard", tensors, {"block": block, "transposed": transposed}, 1.0)


def test_hadamard_factors_give_the_matrix():
    for block in (1, 2, 12, 64, 128, 172, 344, 2048, 40):
        orders = packed_orders(block)
        assert math.prod(orders) == block
        found = torch.ones(1, 1, dtype=torch.float64)
        for order in orders:
            found = torch.kron(found, hadamard.hadamard_matrix(order))
        if block <= 344:
            torch.testing.assert_close(found, hadamard.hadamard_matrix(block))


def packed_orders(block):
    from planish.kernels.tvm.hadamard import factors

    return factors(block)


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0].contiguous()


@pytest.mark.parametrize("scale", [0.0, 0.05])
@pytest.mark.parametrize("rotations", ["none", "states", "both"])
@pytest.mark.parametrize(("batch", "time", "parts", "states"), [(1, 6, (4, 8), 16), (2, 3, (3, 5), 4)])
def test_selective_scan(batch, time, parts, states, rotations, scale):
    channels = parts[0] * parts[1]
    tensors = {
        "x": normal(batch, time, channels),
        "delta": 0.01 + 0.3 * torch.rand(batch, time, channels),
        "a_log": normal(channels, states),
        "b": normal(batch, time, states, seed=1),
        "c": normal(batch, time, states, seed=2),
        "d": normal(channels),
        "state": normal(batch, channels, states, seed=3),
        "rotation": orthogonal(states, 4) if rotations != "none" else None,
        "outer": orthogonal(parts[0], 5) if rotations == "both" else None,
        "inner": orthogonal(parts[1], 6) if rotations == "both" else None,
    }
    tensors = {k: v for k, v in tensors.items() if v is not None}
    inputs = ("x", "delta", "b", "c", "state")
    fused.ops()
    want = torch.ops.planish.selective_scan(*arguments("selective_scan", tensors, {"state_scale": scale}))
    proto = graph("selective_scan", tensors, {"state_scale": scale})
    for name in inputs[1:]:
        (stored,) = [t for t in proto.graph.initializer if t.name == name]
        proto.graph.initializer.remove(stored)
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(stored.dims)))
    made = compile_model(tvm_import.fix_batch(proto), HOST, {})
    machine = tvm.relax.VirtualMachine(made.executable, tvm.cpu())
    got = [v.numpy() for v in machine["main"](*(tvm.runtime.tensor(tensors[n].numpy()) for n in inputs))]
    error = [np.abs(g - w.numpy()).max() for g, w in zip(got, want, strict=True)]
    assert error[1] <= 1e-5
    assert error[0] <= 1e-4 + scale * float(tensors["c"].abs().max()), "one code of one state at the most"


def test_every_fused_op_has_a_lowering():
    assert set(lowerings()) == set(fused.ops())


def test_weights_stay_packed_in_the_library(tmp_path):
    from planish.export.format import Source

    pytest.importorskip("ziglang", reason="ziglang is not installed")
    codes = torch.randint(0, 16, (256, 512), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    tensors = {"x": normal(1, 512), "codes": packing.pack(codes, 4, 64), "scale": torch.rand(256, 8)}
    proto = graph("linear_wna16", tensors, {"bits": 4, "group": 64})
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    written = Tvm().write(Source(proto, {"x": tensors["x"].numpy()}, "net", fused=proto), HOST, tmp_path)
    (row,) = [k for k in written.details["kernels"] if k["schedule"] == "kernel"]
    assert row["op"] == "linear_wna16"
    assert row["macs"] == 256 * 512
    assert {"kernel": row["kernel"], "layer": "layer"} in written.details["calls"]
    packed_bytes = 256 * 512 // 2 + 256 * 8 * 4
    assert written.details["fused"] == {"ops": ["linear_wna16"], "packed_bytes": packed_bytes}
    empty = 60_000  # code and tables of a library without weights
    assert packed_bytes < (tmp_path / "model.so").stat().st_size < packed_bytes + empty < 256 * 512 * 4
    assert written.ram_bytes is not None
    assert written.ram_bytes < packed_bytes


@pytest.mark.parametrize("unit", [VectorUnit(16, 32), VectorUnit(8, 16), VectorUnit(4, 32), VectorUnit(4, 16)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_tiles_fit_the_registers_and_the_rows(unit, bits):
    for rows in (1, 2, 7, 13, 128, 127):
        for out in (1, 13, 64, 100, 384):
            tile = packed.choose(rows, out, bits, unit)
            assert rows % tile.rows == 0
            assert tile.rows * tile.vectors <= unit.accumulators


def test_a_computed_weight_is_named():
    codes = torch.zeros((8, 1, 8), dtype=torch.uint8)
    proto = graph(
        "linear_wna16", {"x": normal(1, 16), "codes": codes, "scale": torch.ones(8, 1)}, {"bits": 4, "group": 16}
    )
    proto.graph.input.append(helper.make_tensor_value_info("codes", TensorProto.UINT8, [8, 1, 8]))
    del proto.graph.initializer[0]
    with pytest.raises(PlanishError, match="'layer': 'codes' of linear_wna16 is computed"):
        tvm_import.to_relax(proto, tvm_schedule.vector_unit(HOST))
