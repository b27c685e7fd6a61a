"""The C kernels equal the numpy reference bit for bit, on every op and under every compiler that is here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.kernels import op as contract
from planish.kernels.op import Call, Node

C = Path(contract.__file__).parent / "c"
FLAGS = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-ffp-contract=off"]
BATCH = 3


def compiler() -> list[str]:
    for name in ("gcc", "clang", "cc"):
        if shutil.which(name):
            return [name]
    pytest.skip("no C compiler")


@pytest.fixture(scope="session", params=["-O2", "-O3 -march=native"])
def library(
    request: pytest.FixtureRequest, bench: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ctypes.CDLL, dict[str, Any]]:
    """The kernels and the examples, plainly optimized and with everything that the compiler can do on this CPU."""
    folder = tmp_path_factory.mktemp("kernels")
    text, nodes = bench.harness()
    (folder / "harness.c").write_text(text)
    sources = [str(p) for p in sorted(C.glob("*.c"))]
    command = [
        *compiler(),
        *FLAGS,
        *request.param.split(),
        "-shared",
        "-fPIC",
        f"-I{C}",
        *sources,
        str(folder / "harness.c"),
    ]
    done = subprocess.run([*command, "-o", str(folder / "kernels.so")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    return ctypes.CDLL(str(folder / "kernels.so")), nodes


def pointer(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))


def run(function: Any, node: Node, call: Call, inputs: list[np.ndarray]) -> np.ndarray:
    """Outputs (n, size) in the order of memory for inputs (n, size). Guards around the buffers must survive."""
    rows: list[np.ndarray] = []
    for sample in zip(*inputs, strict=True):
        flat = [np.ascontiguousarray(x) for x in sample]
        array = (ctypes.POINTER(ctypes.c_int8) * len(flat))(*[pointer(x) for x in flat])
        y = np.full(node.output.size + 16, 77, np.int8)
        if call.updates is not None:
            y[: node.output.size] = flat[call.updates]
        scratch = np.full(call.scratch + 16, 55, np.int8)
        function(array, pointer(y), pointer(scratch))
        assert (y[node.output.size :] == 77).all(), "wrote behind its output"
        assert (scratch[call.scratch :] == 55).all(), "wrote behind its scratch"
        rows.append(y[: node.output.size])
    return np.stack(rows)


def test_c_equals_reference(op_name: str, bench: Any, library: tuple[ctypes.CDLL, dict[str, Any]]) -> None:
    dll, nodes = library
    op = bench.op(op_name)
    rng = np.random.default_rng(1)
    for i, (node, call) in enumerate(nodes[op_name]):
        inputs = bench.random_inputs(rng, node, BATCH)
        expected = op.reference(node, *inputs)
        assert expected.dtype == np.int8
        assert expected.shape == (BATCH, *node.output.shape[1:])
        memory = [bench.layout.to_memory(x) for x in inputs]
        if call is None:
            got = memory[0]
        else:
            assert set(call.sources) <= {p.name for p in C.glob("*.c")}
            got = run(getattr(dll, f"run_{op_name}_{i}"), node, call, memory)
        np.testing.assert_array_equal(
            got, bench.layout.to_memory(expected), err_msg=f"{op_name} example {i}: {node.attributes}"
        )


def test_batch_is_independent(op_name: str, bench: Any) -> None:
    """A sample's result does not depend on the samples beside it."""
    op = bench.op(op_name)
    for example in bench.examples(op_name):
        node = bench.node_of(op_name, example)
        inputs = bench.random_inputs(np.random.default_rng(2), node, BATCH)
        whole = op.reference(node, *inputs)
        np.testing.assert_array_equal(whole[1:2], op.reference(node, *(x[1:2] for x in inputs)))


def test_extreme_inputs_do_not_overflow(bench: Any, library: tuple[ctypes.CDLL, dict[str, Any]]) -> None:
    """Codes that are all lowest or all highest, where sums are largest."""
    dll, nodes = library
    for name in ("conv2d", "depthwise_conv2d", "fully_connected", "global_average_pool", "layer_norm", "matmul"):
        for i, (node, call) in enumerate(nodes[name]):
            inputs = [np.stack([np.full(t.shape[1:], v, np.int8) for v in (-128, 127)]) for t in node.inputs]
            expected = bench.layout.to_memory(bench.op(name).reference(node, *inputs))
            got = run(getattr(dll, f"run_{name}_{i}"), node, call, [bench.layout.to_memory(x) for x in inputs])
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_compiles_without_warnings(name: str, bench: Any, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "harness.c").write_text(bench.harness()[0])
    for level in ("-O0", "-O3"):
        for source in [*sorted(C.glob("*.c")), tmp_path / "harness.c"]:
            command = [name, *FLAGS, level, f"-I{C}", "-c", str(source), "-o", str(tmp_path / "out.o")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{source.name}: {done.stderr[:2000]}"


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_sanitizers_find_nothing(name: str, bench: Any, tmp_path: Path) -> None:
    """Every example once, with buffers of exact size, under the address and undefined-behaviour sanitizers."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    text, nodes = bench.harness()
    body: list[str] = []
    for op_name, found in nodes.items():
        for i, (node, call) in enumerate(found):
            if call is None:
                continue
            sizes = [t.size for t in node.inputs]
            body += [
                "    {",
                f"        int8_t *x[{len(sizes)}], *y = malloc({node.output.size});",
                f"        int8_t *scratch = malloc({call.scratch} + 1) ;",
                *(f"        x[{k}] = fill({s}, seed++);" for k, s in enumerate(sizes)),
                f"        run_{op_name}_{i}((const int8_t *const *)x, y, scratch);",
                *(f"        free(x[{k}]);" for k in range(len(sizes))),
                "        free(y);",
                "        free(scratch);",
                "    }",
            ]
    main = [
        "#include <stdlib.h>",
        text,
        "static int8_t *fill(int size, unsigned seed)",
        "{",
        "    int8_t *x = malloc((size_t)size);",
        "    for (int i = 0; i < size; i++) { seed = seed * 1664525u + 1013904223u; x[i] = (int8_t)(int)(seed >> 24); }",
        "    return x;",
        "}",
        "int main(void)",
        "{",
        "    unsigned seed = 1;",
        *body,
        "    return 0;",
        "}",
    ]
    (tmp_path / "main.c").write_text("\n".join(main) + "\n")
    flags = ["-std=c99", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(p) for p in sorted(C.glob("*.c"))]
    command = [name, *flags, f"-I{C}", *sources, str(tmp_path / "main.c"), "-o", str(tmp_path / "main")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"{name} has no sanitizer libraries")
    assert built.returncode == 0, built.stderr[:2000]
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.parametrize(
    ("target", "cpu"),
    [
        ("thumb-freestanding-eabi", "cortex_m0plus"),
        ("thumb-freestanding-eabihf", "cortex_m4+vfp4d16sp"),
        ("thumb-freestanding-eabihf", "cortex_m7+fp_armv8d16sp-fp64"),
        ("thumb-freestanding-eabihf", "cortex_m33+fp_armv8d16sp"),
    ],
)
def test_compiles_for_microcontrollers_without_a_c_library(target: str, cpu: str, tmp_path: Path) -> None:
    """Freestanding, with no header but stdint.h; with an FPU no arithmetic is a library call."""
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is not installed (extra 'mcu')")
    for source in sorted(C.glob("*.c")):
        out = tmp_path / f"{source.stem}.o"
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, f"-mcpu={cpu}", *FLAGS, "-O2"]
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{source.name}: {done.stderr[:2000]}"
        with out.open("rb") as file:
            symbols = elffile.ELFFile(file).get_section_by_name(".symtab").iter_symbols()
            outside = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF" and s.name}
        assert all(n.startswith("__aeabi_") for n in outside), outside
        if "+" in cpu:
            assert all(n.startswith(("__aeabi_unwind", "__aeabi_mem")) for n in outside), outside
