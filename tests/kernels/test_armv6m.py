"""Kernels for Cortex-M0+ equal the reference bit for bit, without floating point: on the emulated core and as plain C."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.export.narrow import node_in
from planish.kernels import integer
from planish.kernels import op as contract
from planish.kernels.c import version
from planish.kernels.c.armv6m import fully_connected, pairs, requantize
from planish.kernels.op import Node, ops
from planish.targets import target as targets

TARGET = "rp2040"
C = Path(contract.__file__).parent / "c"
NONE = (0, 0, 0, 0)
FULL = {"low": -128, "high": 127}


def kernel(node: Node) -> str:
    """Which kernel the target's core runs."""
    return version.choose(ops(), node, targets.load(TARGET).features).kernel


# ---- requantization ----


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("requantize")
    lines = ['#include "armv6m/requantize.h"']
    for name, function in (("fast", "planish_code"), ("exact", "planish_exact_code")):
        head = f"void {name}(const int32_t *sum, int32_t n, uint32_t word, const planish_scale *q, int8_t *y)"
        lines += [f"{head};", head, f"{{ for (; n > 0; n--) *y++ = (int8_t){function}(*sum++, word, q); }}"]
    (folder / "many.c").write_text("\n".join(lines) + "\n")
    sources = [str(folder / "many.c"), str(C / requantize.SOURCE)]
    command = [compiler, "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{C}", *sources]
    subprocess.run([*command, "-o", str(folder / "many.so")], check=True)
    return ctypes.CDLL(str(folder / "many.so"))


def sums(rng: np.random.Generator, rescale: float, largest: int) -> np.ndarray:
    """int32: random ones, and those on both sides of every rounding boundary."""
    boundaries = (np.arange(-260, 260)[:, None] + 0.5) / rescale + np.arange(-2, 4)
    inside = rng.uniform(-300, 300, 5000) / rescale
    anywhere = rng.integers(-largest, largest + 1, 5000)
    found = np.concatenate([np.rint(boundaries).ravel(), np.rint(inside), anywhere, [-largest, largest, 0, 1, -1]])
    return np.clip(found, -largest, largest).astype(np.int32)


@pytest.mark.parametrize("zero_point", [-128, -97, 3, 127])
def test_requantization_is_the_contract(zero_point: int, library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(zero_point + 128)
    taken = 0
    for trial in range(40):
        low, high = (-128, 127) if trial % 4 else sorted(rng.integers(-128, 128, 2).tolist())
        rescale = np.exp2(rng.uniform(-15, -3, 5)).astype(np.float32)
        if trial % 3 == 0:  # powers of two, where mantissas change, and ties are many
            rescale[:3] = np.float32(2.0**-8), np.nextafter(np.float32(2.0**-7), np.float32(0)), np.float32(2.0**-30)
        largest = np.array([1 << 25, 1 << 20, 1 << 20, 1 << 23, 1 << 16])
        scale = requantize.words(rescale, largest, zero_point, low, high)
        if scale is None:
            continue
        taken += 1
        f = list(scale.fields.values())  # planish_scale: three words, three halfwords, three bytes
        fields = np.frombuffer(struct.pack("<3I3h3Bx", *f), np.uint8)
        for word, factor, most in zip(scale.words, rescale, largest, strict=True):
            sum_ = sums(rng, float(factor), int(most))
            expected = integer.requantize(sum_, factor, zero_point, low, high)
            for name in ("fast", "exact"):
                y = np.zeros(len(sum_), np.int8)
                where = [v.ctypes.data_as(ctypes.c_void_p) for v in (sum_, fields, y)]
                library[name](where[0], len(sum_), ctypes.c_uint32(int(word)), where[1], where[2])
                np.testing.assert_array_equal(y, expected, err_msg=f"{name} {factor} {scale.fields}")
    assert taken > 20


def test_few_sums_take_the_exact_way() -> None:
    """The share of sums whose fraction lies in the window: under 4 percent."""
    for zero_point in (-128, 5):
        scale = requantize.words(np.exp2(np.linspace(-11, -7.5, 50)), np.full(50, 1 << 20), zero_point, -128, 127)
        assert scale is not None
        assert scale.fields["window"] / 2**32 < 0.04


def test_sums_that_float32_would_round_are_refused() -> None:
    tiny = np.array([2.0**-18], np.float32)
    assert requantize.words(tiny, np.array([1 << 26]), 0, -128, 127) is None
    assert requantize.words(tiny, np.array([1 << 10]), 0, -128, 127) is not None  # nothing but the zero point


# ---- weights in chunks ----


@pytest.mark.parametrize("taps", pairs.TAPS[8])
def test_chunks_fit_16_bits_and_add_up(taps: int) -> None:
    rng = np.random.default_rng(taps)
    rows = rng.integers(-128, 128, (6, 37)).astype(np.int8)
    rows[0], rows[1], rows[2] = -128, 127, 0
    found = pairs.split(rows, taps)
    assert found is not None
    total = found.weight.reshape(6, -1, taps).astype(np.int32) - 128
    assert pairs.fits(total).all()
    assert found.extra is not None
    stream = found.extra.tolist()
    for o in range(6):
        while (chunk := stream.pop(0)) != 255:
            part = np.array([stream.pop(0) - 128 for _ in range(taps)])
            assert pairs.fits(part)
            total[o, chunk] += part
    assert not stream
    np.testing.assert_array_equal(total.reshape(6, -1)[:, :37], rows)


# ---- kernels ----

CONVOLUTIONS: list[dict[str, Any]] = [
    {"c": 16, "o": 8, "size": (6, 6)},
    {"c": 3, "o": 8, "size": (7, 9)},
    {"c": 3, "o": 5, "size": (8, 8), "stride": 2, "pads": (0, 0, 1, 1)},
    {"c": 1, "o": 6, "size": (20, 10), "kernel": (10, 4), "stride": 2, "pads": (4, 1, 5, 1)},
    {"c": 8, "o": 5, "size": (7, 6), "dilation": 2, "pads": (2, 2, 2, 2), "with_bias": "none"},
    {"c": 8, "o": 3, "size": (5, 5), "kernel": (5, 5), "pads": (2, 2, 2, 2)},
    {"c": 1, "o": 1, "size": (5, 6), "pads": NONE, "per_channel": False},
    {"c": 4, "o": 9, "size": (6, 1), "kernel": (3, 1), "pads": (1, 0, 1, 0)},
    {"c": 8, "o": 4, "size": (4, 4), "pads": (3, 3, 3, 3)},
    {"c": 33, "o": 4, "size": (5, 4), "kernel": (2, 3), "pads": (0, 1, 0, 1)},
    *(
        {"c": c, "o": o, "size": size, "kernel": (1, 1), "pads": NONE, "stride": stride}
        for c, o, size, stride in (
            (8, 16, (6, 6), 1), (16, 8, (5, 5), 1), (64, 8, (5, 3), 1), (128, 3, (3, 3), 1), (1, 4, (3, 5), 1),
            (3, 4, (4, 4), 1), (12, 8, (7, 3), 2), (40, 10, (1, 1), 1), (17, 1, (4, 5), 1), (8, 4, (7, 7), 3),
        )
    ),
    {"c": 8, "o": 4, "size": (6, 5), "kernel": (1, 1), "pads": (1, 0, 0, 1)},
]  # fmt: skip


def extreme(node: Node, bits: int, index: int) -> Node:
    """The node in `bits` with the extreme weights among its own, and a range as below."""
    if bits < 8:
        node = node_in(node, bits)
    weight = node.constants["weight"].copy()
    weight.reshape(-1)[:2] = -(1 << bits - 1), (1 << bits - 1) - 1
    if index % 5 == 0:
        weight[0] = -(1 << bits - 1)
    return extreme_range(replace(node, constants={**node.constants, "weight": weight}), index)


def extreme_range(node: Node, index: int) -> Node:
    """The node whose range is, in turn, its own, whole, and whole with the zero point lowest."""
    if index % 3 == 1:
        node = replace(node, attributes={**node.attributes, **FULL})
    if index % 3 == 2:
        node = replace(node, attributes={**node.attributes, **FULL}, output=replace(node.output, zero_point=-128))
    return node


def convolutions(bench: Any, bits: int) -> list[Node]:
    rng = np.random.default_rng(7)
    found: list[Node] = []
    for i, shape in enumerate(CONVOLUTIONS[:: 1 if bits == 8 else 2]):
        bounds = {"low": 0.0, "high": 6.0} if i % 3 == 0 else {}
        found.append(extreme(bench.node_of("conv2d", bench.convolution(rng, **shape, **bounds)), bits, i + bits))
    return found


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_conv2d(bits: int, bench: Any, tmp_path: Path) -> None:
    found = convolutions(bench, bits)
    assert {kernel(n) for n in found} == {"armv6m_conv2d"}
    bench.equal_reference(found, TARGET, tmp_path)


def test_other_convolutions_run_portable(bench: Any) -> None:
    rng = np.random.default_rng(1)
    grouped = bench.node_of("conv2d", bench.convolution(rng, 8, 8, (5, 5), group=2))
    with_zero_point = bench.node_of("conv2d", bench.convolution(rng, 8, 8, (5, 5), unsigned=True, per_channel=False))
    assert {kernel(grouped), kernel(with_zero_point)} == {"conv2d"}


def test_output_of_conv2d_lies_over_the_input(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    node = bench.node_of("conv2d", bench.convolution(rng, 8, 8, (12, 12)))
    inputs = bench.random_inputs(rng, node, 1)
    call = version.choose(ops(), node, targets.load(TARGET).features)
    made = bench.on_device(node, [inputs], TARGET, tmp_path)
    np.testing.assert_array_equal(made.codes[0], ops()[node.op].reference(node, *inputs))
    assert call.overlap is not None
    assert made.arena_bytes <= 12 * 12 * 8 + call.overlap + call.scratch + 8


DEPTHWISE: list[dict[str, Any]] = [
    {"c": 8, "size": (9, 8)},
    {"c": 3, "size": (15, 5)},  # turned: its columns are longer
    {"c": 5, "size": (6, 6), "pads": NONE},
    {"c": 4, "size": (3, 3)},
    {"c": 4, "size": (4, 1)},
    {"c": 4, "size": (5, 5), "pads": (2, 0, 0, 2)},
    {"c": 2, "size": (5, 6), "pads": (3, 3, 3, 3)},  # windows that hold nothing but padding
    {"c": 8, "size": (9, 9), "stride": 2},
    {"c": 4, "size": (8, 8), "stride": 2, "pads": (0, 0, 1, 1)},
    {"c": 5, "size": (8, 7), "stride": 2},
    {"c": 3, "size": (9, 9), "kernel": (5, 5), "pads": (2, 2, 2, 2)},
    {"c": 3, "size": (10, 9), "kernel": (5, 5), "pads": (2, 2, 2, 2), "stride": 2},
    {"c": 4, "size": (8, 6), "kernel": (2, 4), "pads": (0, 1, 1, 2)},
    {"c": 6, "size": (12, 1), "kernel": (3, 1), "pads": (1, 0, 1, 0)},
    {"c": 4, "size": (1, 13), "kernel": (1, 2), "pads": NONE},
    {"c": 2, "size": (5, 6), "kernel": (1, 1), "pads": NONE},
    {"c": 4, "size": (3, 3), "pads": NONE},  # a single output
    {"c": 4, "size": (1, 1), "kernel": (1, 1), "pads": NONE},
    {"c": 4, "size": (1, 1)},
    {"c": 4, "size": (4, 2), "kernel": (3, 2), "pads": NONE, "stride": 2},
]


def depthwise(bench: Any, bits: int) -> list[Node]:
    rng = np.random.default_rng(8)
    found: list[Node] = []
    for i, shape in enumerate(DEPTHWISE[:: 1 if bits == 8 else 3]):
        bounds = {"low": 0.0, "high": 6.0} if i % 3 == 0 else {}
        node = bench.node_of(
            "depthwise_conv2d", bench.convolution(rng, o=shape["c"], group=shape["c"], **shape, **bounds)
        )
        found.append(extreme(node, bits, 5 * (i + bits) + 1))
    return found


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_depthwise_conv2d(bits: int, bench: Any, tmp_path: Path) -> None:
    found = depthwise(bench, bits)
    assert {kernel(n) for n in found} == {"armv6m_depthwise_conv2d"}
    bench.equal_reference(found, TARGET, tmp_path)


def test_depthwise_output_lies_in_the_place_of_the_input(bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for size in ((12, 12), (17, 5)):
        node = bench.node_of("depthwise_conv2d", bench.convolution(rng, 8, 8, size, group=8))
        inputs = bench.random_inputs(rng, node, 1)
        call = version.choose(ops(), node, targets.load(TARGET).features)
        assert call.in_place == (0,)
        made = bench.on_device(node, [inputs], TARGET, tmp_path / str(size[0]))
        np.testing.assert_array_equal(made.codes[0], ops()[node.op].reference(node, *inputs))
        assert made.arena_bytes <= size[0] * size[1] * 8 + call.scratch + 8


def test_other_depthwise_convolutions_run_portable(bench: Any) -> None:
    rng = np.random.default_rng(1)
    for other in (
        bench.convolution(rng, 4, 8, (6, 6), group=4),  # multiplier 2
        bench.convolution(rng, 4, 4, (9, 9), group=4, dilation=2),
        bench.convolution(rng, 4, 4, (6, 6), group=4, unsigned=True, per_channel=False),  # weight zero points
        bench.convolution(rng, 4, 4, (9, 9), group=4, stride=3),
    ):
        assert kernel(bench.node_of("depthwise_conv2d", other)) == "depthwise_conv2d"


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fully_connected(bits: int, bench: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    shapes = [(8, 6), (64, 10), (33, 3), (2, 1), (130, 4), (7, 2), (20, 5), (150, 69)]
    found = [bench.node_of("fully_connected", bench.linear(rng, k, n)) for k, n in shapes]
    found += [
        bench.node_of("fully_connected", bench.linear(rng, k, 6, rows=(3,), kind="MatMul", trans=0)) for k in (5, 16)
    ]
    found = [extreme(n, bits, i + bits) for i, n in enumerate(found)]
    assert [kernel(n) for n in found] == ["armv6m_fully_connected"] * len(shapes) + ["armv6m_conv2d"] * 2
    bench.equal_reference(found, TARGET, tmp_path)


@pytest.mark.parametrize("taps", fully_connected.TAPS[8])
def test_fully_connected_with_heavy_weights(
    taps: int, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every size of chunk, with extra chunks."""
    rng = np.random.default_rng(9)
    monkeypatch.setattr(fully_connected, "TAPS", {8: (taps,)})
    found: list[Node] = []
    for i, (k, n) in enumerate([(40, 6), (16, 3), (140, 5)]):
        node = bench.node_of("fully_connected", bench.linear(rng, k, n))
        weight = rng.choice([-128, -127, -60, 0, 127], (n, k)).astype(np.int8)
        found.append(extreme(replace(node, constants={**node.constants, "weight": weight}), 8, i + 1))
    assert {kernel(n) for n in found} == {"armv6m_fully_connected"}
    bench.equal_reference(found, TARGET, tmp_path)


# ---- elementwise ----


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_add_and_mul(op: str, powers_of_two: bool, bench: Any, tmp_path: Path) -> None:
    """Also with scales that are powers of two, where half of the sums are ties."""
    found = [bench.node_of(op, e) for e in bench.examples(op)]
    if powers_of_two:
        found = [n for n in found if len(n.inputs) == 2]
        found = [replace(n, output=replace(n.output, scale=np.float32(2.0**-6))) for n in found]
        found = [
            replace(n, attributes={**n.attributes, "scales": (np.float32(2.0**-7), np.float32(2.0**-5))}) for n in found
        ]
    assert {kernel(n) for n in found} <= {f"armv6m_{op}", f"armv6m_{op}_constant"}
    bench.equal_reference(found, TARGET, tmp_path)


def test_global_average_pool(bench: Any, tmp_path: Path) -> None:
    found = [bench.node_of("global_average_pool", e) for e in bench.examples("global_average_pool")]
    found = [extreme_range(n, i) for i, n in enumerate(found)]
    assert {kernel(n) for n in found} == {"armv6m_global_average_pool"}
    bench.equal_reference(found, TARGET, tmp_path)


def test_softmax(bench: Any, tmp_path: Path) -> None:
    found = [bench.node_of("softmax", e) for e in bench.examples("softmax")]
    assert {kernel(n) for n in found} == {"armv6m_softmax"}
    bench.equal_reference(found, TARGET, tmp_path)


def test_average_pool(bench: Any, tmp_path: Path) -> None:
    """Also with equal scales, where means of four lie between two codes all the time."""
    found = [bench.node_of("average_pool", e) for e in bench.examples("average_pool")]
    found += [replace(n, output=replace(n.output, scale=n.inputs[0].scale, zero_point=-128)) for n in found[:2]]
    assert "armv6m_average_pool" in {kernel(n) for n in found}
    bench.equal_reference(found, TARGET, tmp_path)
    assert [kernel(n) for n in found].count("armv6m_average_pool") > len(found) // 2
