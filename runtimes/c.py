"""Runtime `c`: a `c` artifact compiled for this machine, fast enough for whole test sets."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..common.errors import Missing, PlanishError
from ..export.artifact import Artifact
from . import c_model
from .measure import latency, machine, peak_memory
from .session import Arrays, Layer, Profile, Runtime, Session

FLAGS = ("-std=gnu99", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-w")
"""as the artifact's own build; warnings are the concern of its build files"""
PROFILED = 50
"""inferences for the per-layer table"""


class C(Runtime):
    """The generated C as a shared library of this machine. One thread: the code has no others."""

    formats: ClassVar[tuple[str, ...]] = ("c",)

    def open(self, artifact: Artifact, threads: int) -> CSession:
        """Compile the artifact with $CC, gcc, clang or the ziglang wheel; Missing when there is none."""
        if threads != 1:
            raise PlanishError(f"{threads} threads were asked for; the generated C runs in one")
        return CSession(artifact)


class CSession(Session):
    """A compiled artifact; its library lives in a temporary folder until `close`."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.model = c_model.load(artifact)
        self.compiler = find_compiler()
        self.folder = tempfile.TemporaryDirectory(prefix="planish-c-")
        self.library = self._compile("model")

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch; the loop over the samples runs in C."""
        packed = self.model.pack(inputs)
        memory = [np.empty((len(packed[0]), b.size), np.int8) for b in self.model.outputs]
        self._call(self.library, packed, memory)
        return self.model.unpack(memory)

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Time of the code on this machine, which says nothing about the time on the artifact's target."""
        packed = self.model.pack(inputs)
        memory = [np.empty((len(packed[0]), b.size), np.int8) for b in self.model.outputs]
        timing = latency(lambda: self._call(self.library, packed, memory), runs, warmup)
        return Profile(
            target="host",
            format=self.artifact.format,
            kind="measured",
            latency_ms=timing,
            macs=self.model.macs,
            ram_bytes=self.model.facts["memory"]["arena"],
            peak_memory_bytes=peak_memory(),
            file_bytes=Path(self.library._name).stat().st_size,
            layers=self._layers(packed, memory),
            environment=machine(
                1, compiler=self._version(), flags=" ".join(FLAGS), artifact_target=self.artifact.target
            ),
        )

    def close(self) -> None:
        """Delete the library's file."""
        self.folder.cleanup()

    def _layers(self, packed: list[np.ndarray], memory: list[np.ndarray]) -> tuple[Layer, ...]:
        """Median time of every layer, from a second library whose layers call a clock."""
        library = self._compile("profile", "-DPLANISH_LAYER_DONE=planish_host_layer")
        count = len(self.model.layers)
        times = (ctypes.c_double * count).in_dll(library, "planish_host_times")
        rows: list[list[float]] = []
        for _ in range(PROFILED):
            self._call(library, [p[:1] for p in packed], [m[:1] for m in memory])
            rows.append(list(times))
        medians = [statistics.median(row[i] for row in rows) * 1e3 for i in range(count)]
        return tuple(Layer(x["name"], x["op"], x["macs"], ms) for x, ms in zip(self.model.layers, medians, strict=True))

    def _call(self, library: ctypes.CDLL, packed: list[np.ndarray], memory: list[np.ndarray]) -> None:
        sources, sinks = (
            (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)) for arrays in (packed, memory)
        )
        library.planish_host_run(ctypes.c_int64(len(packed[0])), sources, sinks)

    def _compile(self, stem: str, *options: str) -> ctypes.CDLL:
        folder = Path(self.folder.name)
        wrapper = folder / "host.c"
        wrapper.write_text(_wrapper(self.model), encoding="utf-8")
        library = folder / f"{stem}.so"
        root = self.artifact.folder.absolute()
        command = [*self.compiler, *FLAGS, *options, f"-I{root}", f"-I{root / 'kernels'}"]
        command += [*(str(root / s) for s in self.model.sources), str(wrapper), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [x for x in done.stderr.splitlines() if "error" in x] or done.stderr.splitlines() or ["no message"]
            raise PlanishError(f"the generated C does not compile with '{self.compiler[0]}': {lines[0][:300]}")
        return ctypes.CDLL(str(library))

    def _version(self) -> str:
        option = ["version"] if self.compiler[1:3] == ["-m", "ziglang"] else ["--version"]
        command = self.compiler[:3] if option == ["version"] else self.compiler
        found = subprocess.run([*command, *option], capture_output=True, text=True, check=False).stdout
        prefix = "zig " if option == ["version"] else ""
        return prefix + (found.splitlines() or ["unknown"])[0]


def find_compiler() -> list[str]:
    """A C compiler of this machine as a command: $CC, gcc, clang, else the ziglang wheel's."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given, ["gcc"], ["clang"], ["cc"]]:
        if command and shutil.which(command[0]):
            return command
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all"]
    raise Missing(
        "running C on this machine needs a C compiler: install gcc or clang, or pip install 'planish[mcu]' (zig)"
    )


def _wrapper(model: c_model.CModel) -> str:
    """C that runs many samples, and takes the time of each layer when the model calls it."""
    lines: list[Any] = [
        "#include <stdint.h>",
        "#include <string.h>",
        "#include <time.h>",
        f'#include "{model.name}.h"',
        f"double planish_host_times[{max(1, len(model.layers))}];",
        "static double before;",
        "static double now(void)",
        "{",
        "    struct timespec t;",
        "    clock_gettime(CLOCK_MONOTONIC, &t);",
        "    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;",
        "}",
        "void planish_host_layer(int layer)",
        "{",
        "    double time = now();",
        "    planish_host_times[layer] = time - before;",
        "    before = now();",
        "}",
        "void planish_host_run(int64_t n, const int8_t *const *inputs, int8_t *const *outputs)",
        "{",
        "    for (int64_t i = 0; i < n; i++) {",
        *(f"        memcpy({b.function}(), inputs[{k}] + i * {b.size}, {b.size});" for k, b in enumerate(model.inputs)),
        "        before = now();",
        f"        {model.name}_run();",
        *(
            f"        memcpy(outputs[{k}] + i * {b.size}, {b.function}(), {b.size});"
            for k, b in enumerate(model.outputs)
        ),
        "    }",
        "}",
    ]
    return "\n".join(lines) + "\n"
