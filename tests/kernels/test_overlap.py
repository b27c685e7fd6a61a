"""The portable kernels give the same codes when their output lies over their input as `Call.overlap` and `Call.in_place` allow."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.kernels import op as contract
from planish.kernels.op import Call, Node

C = Path(contract.__file__).parent / "c"


@pytest.fixture(scope="module")
def library(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("overlap")
    text, nodes = bench.harness()
    (folder / "harness.c").write_text(text)
    sources = [str(p) for p in sorted(C.glob("*.c"))]
    command = ["gcc", "-std=c99", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{C}", *sources]
    try:
        done = subprocess.run(
            [*command, str(folder / "harness.c"), "-o", str(folder / "kernels.so")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("gcc is not installed")
    assert done.returncode == 0, done.stderr[:2000]
    return ctypes.CDLL(str(folder / "kernels.so")), nodes


def codes(function: Any, node: Node, call: Call, inputs: list[np.ndarray], over: int, distance: int) -> np.ndarray:
    """The output's codes when it begins `distance` bytes before input `over`."""
    room = max(distance, 0) + max(node.output.size, inputs[over].size + distance) + 64
    arena = np.full(room, 99, np.int8)
    buffers = [np.ascontiguousarray(x) for x in inputs]
    arena[distance : distance + inputs[over].size] = inputs[over]
    base = arena.ctypes.data
    places = [b.ctypes.data for b in buffers]
    places[over] = base + distance
    given = (ctypes.c_void_p * len(places))(*places)
    scratch = np.zeros(call.scratch + 8, np.int8)
    function(given, ctypes.c_void_p(base), scratch.ctypes.data_as(ctypes.c_void_p))
    return arena[: node.output.size]


def test_output_over_its_input(op_name: str, bench: Any, library: tuple[ctypes.CDLL, dict[str, Any]]) -> None:
    dll, nodes = library
    rng = np.random.default_rng(5)
    for i, (node, call) in enumerate(nodes[op_name]):
        if call is None or call.updates is not None:
            continue
        function = getattr(dll, f"run_{op_name}_{i}")
        inputs = bench.random_inputs(rng, node, 1)
        expected = bench.layout.to_memory(bench.op(op_name).reference(node, *inputs))[0]
        flat = [bench.layout.to_memory(x)[0] for x in inputs]
        if call.overlap is not None:
            got = codes(function, node, call, flat, 0, call.overlap)
            np.testing.assert_array_equal(got, expected, err_msg=f"{op_name} {i}: {call.overlap} bytes before")
        for over in call.in_place:
            assert node.inputs[over].size == node.output.size
            got = codes(function, node, call, flat, over, 0)
            np.testing.assert_array_equal(got, expected, err_msg=f"{op_name} {i}: in place of input {over}")


@pytest.mark.parametrize("name", ["conv2d", "depthwise_conv2d"])
def test_the_distance_is_not_larger_than_needed(
    name: str, bench: Any, library: tuple[ctypes.CDLL, dict[str, Any]]
) -> None:
    """With less, some example goes wrong: the distance is no guess on the safe side. A pixel's own bytes may be to spare."""
    dll, nodes = library
    rng = np.random.default_rng(6)
    wrong = 0
    for i, (node, call) in enumerate(nodes[name]):
        less = (call.overlap or 0) - 2 * max(node.output.shape[1], node.inputs[0].shape[1])
        if less < 0:
            continue
        inputs = bench.random_inputs(rng, node, 1)
        expected = bench.layout.to_memory(bench.op(name).reference(node, *inputs))[0]
        flat = [bench.layout.to_memory(x)[0] for x in inputs]
        wrong += bool((codes(getattr(dll, f"run_{name}_{i}"), node, call, flat, 0, less) != expected).any())
    assert wrong
