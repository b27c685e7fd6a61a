"""Layer normalization in integers: the code of real arithmetic, but next to a rounding boundary; the square root of every core."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from planish.kernels.op import Constant, Tensor


def example(bench, rng, size, scale, epsilon=1e-5):
    x = Tensor("x", (1, 16, size), np.float32(scale), int(rng.integers(-128, 128)))
    gain, shift = rng.uniform(-2, 2, size), rng.normal(0, 1, size)
    y = Tensor("y", x.shape, np.float32(rng.uniform(0.01, 0.06)), int(rng.integers(-60, 60)))
    constants = (Constant("g", gain.astype(np.float32)), Constant("b", shift.astype(np.float32)))
    return bench.node_of("layer_norm", bench.made("LayerNormalization", (x, *constants), y, {"epsilon": epsilon}))


@pytest.mark.parametrize("size", [1, 2, 16, 64, 1000, 5000])
@pytest.mark.parametrize("spread", [0, 1, 128])
def test_within_one_code_of_real_arithmetic(size, spread, bench):
    """Rows of one value, of nearly one value, and of all values: where the code differs, the real result is next to a tie."""
    rng = np.random.default_rng([size, spread])
    for scale in (1e-4, 0.02, 1.5):
        node = example(bench, rng, size, scale)
        x = np.clip(rng.integers(-spread, spread + 1, (4, 16, size)) + rng.integers(-20, 20), -128, 127)
        got = bench.op("layer_norm").reference(node, x.astype(np.int8))
        real = x.astype(np.float64) * float(np.float32(scale))
        real = (real - real.mean(-1, keepdims=True)) / np.sqrt(real.var(-1, keepdims=True) + 1e-5)
        gain, shift = (node.constants[k].astype(np.float64) for k in ("gain", "shift"))
        codes = real * gain + shift + node.output.zero_point  # not yet rounded
        inside = (codes > -128.5) & (codes < 127.5)
        off = got != np.clip(np.rint(codes), -128, 127)
        assert np.abs(got - np.clip(np.rint(codes), -128, 127)).max() <= 1
        tie = np.abs(codes - np.floor(codes) - 0.5)
        assert (tie[off & inside] < 1e-3).all()


def test_zero_point_of_the_input_does_not_matter(bench):
    rng = np.random.default_rng(0)
    node = example(bench, rng, 32, 0.03)
    x = rng.integers(-100, 100, (2, 16, 32)).astype(np.int8)
    op = bench.op("layer_norm")
    np.testing.assert_array_equal(op.reference(node, x), op.reference(node, x + np.int8(20)))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_square_root_without_an_instruction_is_the_rounded_one(compiler, tmp_path):
    """The form for cores without a floating-point unit equals IEEE's square root on 2 million normal numbers of all sizes."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    from planish.kernels import op as contract

    folder = contract.__file__.rpartition("/")[0] + "/c"
    (tmp_path / "root.c").write_text(
        '#include "square_root.h"\n'
        "void roots(const float *x, float *y, int n) { int i; for (i = 0; i < n; i++) y[i] = planish_square_root(x[i]); }\n"
    )
    command = [compiler, "-O2", "-shared", "-fPIC", f"-I{folder}", str(tmp_path / "root.c"), "-o", str(tmp_path / "r.so")]  # fmt: skip
    subprocess.run(command, check=True)
    rng = np.random.default_rng(0)
    bits = rng.integers(0x00800000, 0x7F800000, 2_000_000).astype(np.uint32)
    bits[:4096] = np.arange(4096) + 0x3F7FF800  # around 1
    x = bits.view(np.float32)
    y = np.empty_like(x)
    pointers = (a.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for a in (x, y))
    ctypes.CDLL(str(tmp_path / "r.so")).roots(*pointers, len(x))
    np.testing.assert_array_equal(y, np.sqrt(x))


def test_what_it_does_not_take_is_said(bench):
    from planish.kernels.op import Unsupported

    x, y = Tensor("x", (1, 4, 8), np.float32(0.1), 0), Tensor("y", (1, 4, 8), np.float32(0.1), 0)
    gain = Constant("g", np.ones(8, np.float32))
    op = bench.op("layer_norm")
    for attributes, inputs, words in (
        ({"axis": 1}, (x, gain), "more than the last axis"),
        ({"epsilon": 0.0}, (x, gain), "epsilon"),
        ({}, (x, Constant("g", np.ones(4, np.float32))), "4 elements; 8"),
        ({}, (x, y), "activation inputs"),
    ):
        with pytest.raises(Unsupported, match=words):
            op.parse(bench.made("LayerNormalization", inputs, y, attributes))


def test_with_smlad(bench, tmp_path):
    """Rows of whole words on a Cortex-M4, and plain C of the same code here."""
    from planish.kernels.c import version
    from planish.kernels.op import ops
    from planish.targets import target as targets

    rng = np.random.default_rng(0)
    nodes = [example(bench, rng, size, scale) for size, scale in ((4, 0.01), (64, 0.03), (300, 1.0), (1000, 0.002))]
    kernels = [version.choose(ops(), n, targets.load("stm32f446").features).kernel for n in nodes]
    assert set(kernels) == {"dsp_layer_norm"}
    odd = example(bench, rng, 7, 0.1)
    assert version.choose(ops(), odd, targets.load("stm32f446").features).kernel == "layer_norm"
    bench.equal_reference([*nodes, odd], "stm32f446", tmp_path)
