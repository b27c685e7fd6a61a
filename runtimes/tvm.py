"""Runtime `tvm`: libraries compiled by TVM, on this machine, or for Arm Linux under QEMU."""

from __future__ import annotations

import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from ..common.errors import Missing, PlanishError
from ..export import _tvm_compat, tvm_weights
from ..export.artifact import Artifact
from ..targets import target as targets
from . import qemu_user
from .measure import latency, machine, peak_memory
from .session import Arrays, Layer, Profile, Runtime, Session

LIBRARY = "model.so"
ALWAYS = {"neon"}
"""features that every machine of their architecture has"""
BIG_CORES, LAYER_RUNS = 1, 30
"""TVM's number for 'prefer big cores'; runs behind the per-layer table"""


class Tvm(Runtime):
    """TVM's virtual machine: in this process for this machine's artifacts, emulated for aarch64 artifacts elsewhere."""

    formats: ClassVar[tuple[str, ...]] = ("tvm",)

    def open(self, artifact: Artifact, threads: int) -> Session:
        """Load model.so. Raises Missing without TVM, without the GPU that it is compiled for, or without what emulation needs (qemu_user.kit names it)."""
        core = artifact.manifest.get("details", {}).get("core")
        if core is not None:
            return CudaSession(artifact, str(core))
        triple = str(artifact.manifest.get("details", {}).get("llvm_target", {}).get("mtriple", ""))
        here = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
        if not triple or triple.startswith(here):
            return HostSession(artifact, threads)
        if triple.startswith("aarch64"):
            return EmulatedSession(artifact)
        raise Missing(
            f"artifact '{artifact.folder}' is compiled for {triple}; this machine is {here} and has no emulator for it"
        )


def bound_main(machine: Any) -> Callable[..., Any]:
    """`main` of a relax.VirtualMachine, called with the model's inputs alone: weights stored as codes are widened here, once."""
    main = machine["main"]
    if not machine.module.implements_function(tvm_weights.FUNCTION):
        return main
    widened = machine[tvm_weights.FUNCTION]()
    return lambda *inputs: main(*inputs, widened)


class _Model(Session):
    """What both ways of running share: the order and shapes of inputs and outputs, and one sample at a time."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.library = artifact.folder / LIBRARY
        if not self.library.is_file():
            raise PlanishError(f"artifact '{artifact.folder}' has no {LIBRARY}")
        details = artifact.manifest.get("details", {})
        self.kernels: dict[str, dict[str, Any]] = {k["kernel"]: k for k in details.get("kernels", [])}
        self.calls: list[dict[str, Any]] = details.get("calls", [])

    def samples(self, inputs: Arrays) -> list[list[np.ndarray]]:
        """One list of input tensors a sample, in the model's order and with the shapes it was compiled for."""
        batch = self.artifact.inputs[0]["shape"][0] if self.artifact.inputs[0]["shape"] else 1
        columns: list[list[np.ndarray]] = []
        for item in self.artifact.inputs:
            name, shape = item["name"], tuple(item["shape"])
            if name not in inputs:
                raise PlanishError(f"input '{name}' is missing; given: {', '.join(inputs) or 'nothing'}")
            array = inputs[name]
            if array.shape[1:] != shape[1:] or array.dtype != np.dtype(item["dtype"]) or len(array) % batch:
                raise PlanishError(
                    f"input '{name}' has shape {list(array.shape)} and type {array.dtype}; "
                    f"the model takes samples of {list(shape)} {item['dtype']}"
                )
            columns.append([np.ascontiguousarray(array[i : i + batch]) for i in range(0, len(array), batch)])
        return [list(row) for row in zip(*columns, strict=True)]

    def join(self, rows: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
        """Outputs by name, the samples one after another."""
        return {o["name"]: np.concatenate([r[i] for r in rows]) for i, o in enumerate(self.artifact.outputs)}

    def layers(self, calls: Sequence[tuple[str, int | None, float | None]]) -> tuple[Layer, ...]:
        """The per-layer table from (kernel, instructions, milliseconds) in the order of the calls.

        A row is named by the layer that the manifest gives for the call, else by its kind and place, such as 'elementwise 12'.
        """
        known = [c["layer"] for c in self.calls] if [c["kernel"] for c in self.calls] == [c[0] for c in calls] else []
        rows = [self.kernels.get(name, {}) for name, _, _ in calls]
        kinds = [row.get("op", "kernel") for row in rows]
        names = [
            layer or f"{kind} {i}"
            for i, (layer, kind) in enumerate(zip(known or [None] * len(calls), kinds, strict=True))
        ]
        return tuple(
            Layer(names[i], kinds[i], rows[i].get("macs"), ms, count) for i, (_, count, ms) in enumerate(calls)
        )

    def base(self, target: str) -> dict[str, Any]:
        """Profile fields that do not depend on how it runs on `target`."""
        return {
            "target": target,
            "format": self.artifact.format,
            "file_bytes": self.library.stat().st_size,
            "ram_bytes": self.artifact.manifest.get("ram_bytes"),
        }


class HostSession(_Model):
    """The library in this process."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        super().__init__(artifact)
        needed = set(artifact.manifest.get("details", {}).get("features", []))
        lacking = sorted(needed - set(targets.load("host").features) - ALWAYS)
        if lacking:
            raise Missing(
                f"artifact '{artifact.folder}' is compiled for {artifact.target}; this machine lacks {', '.join(lacking)}"
            )
        ir = _tvm_compat.load()
        self.tvm, self.relax, self.threads = ir.tvm, ir.relax, threads
        # TVM's pool takes every core and spins; on few cores that costs more than the kernels
        self.tvm.get_global_func("runtime.config_threadpool")(BIG_CORES, threads)
        try:
            self.main = bound_main(self._load())
        except RuntimeError as error:
            raise PlanishError(
                f"TVM cannot load '{self.library}': {str(error).strip().splitlines()[-1][:300]}"
            ) from error

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch of any size, one sample after another."""
        return self.join([self._outputs(self.main(*self._tensors(s))) for s in self.samples(inputs)])

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Latency of single samples, then shorter instrumented runs for the per-layer table."""
        tensors = [self._tensors(s) for s in self.samples(inputs)]

        def infer() -> None:
            for sample in tensors:
                self.main(*sample)

        timing = latency(infer, runs, warmup)
        peak = peak_memory()  # before the table, which loads the library a second time
        table = self._timed_layers(tensors[0])
        return Profile(
            kind="measured",
            latency_ms=timing,
            peak_memory_bytes=peak,
            macs=sum(layer.macs or 0 for layer in table),
            layers=table,
            environment=machine(self.threads, tvm=self.tvm.__version__, artifact_target=self.artifact.target),
            **self.base("host"),
        )

    def _timed_layers(self, sample: list[Any]) -> tuple[Layer, ...]:
        """Median milliseconds of every kernel call, from the virtual machine's instrument hook."""
        calls: list[str] = []
        times: dict[int, list[float]] = defaultdict(list)
        state = {"index": 0, "start": 0.0}

        def watch(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
            if not name.startswith("vm."):
                if before:
                    state["start"] = time.perf_counter()
                else:
                    index = int(state["index"])
                    times[index].append((time.perf_counter() - state["start"]) * 1e3)
                    if index == len(calls):
                        calls.append(name)
                    state["index"] = index + 1
            return 0

        watched = self._load()
        main = bound_main(watched)
        watched.set_instrument(watch)
        for _ in range(LAYER_RUNS):
            state["index"] = 0
            main(*sample)
        return self.layers([(name, None, statistics.median(times[i])) for i, name in enumerate(calls)])

    def _load(self) -> Any:
        """A new virtual machine with the library."""
        return self.relax.VirtualMachine(self.tvm.runtime.load_module(str(self.library)), self.tvm.cpu())

    def _tensors(self, sample: list[np.ndarray]) -> list[Any]:
        return [self.tvm.runtime.tensor(a) for a in sample]

    def _outputs(self, value: Any) -> list[np.ndarray]:
        values = [value] if hasattr(value, "numpy") else list(value)
        return [v.numpy() for v in values]


class CudaSession(HostSession):
    """The library on the first NVIDIA GPU of this machine."""

    def __init__(self, artifact: Artifact, core: str) -> None:
        _Model.__init__(self, artifact)
        ir = _tvm_compat.load()
        self.tvm, self.relax, self.threads = ir.tvm, ir.relax, 1
        self.device = _gpu(self.tvm, artifact, core)
        try:
            self.main = self._load()["main"]
        except RuntimeError as error:
            raise PlanishError(
                f"TVM cannot load '{self.library}': {str(error).strip().splitlines()[-1][:300]}"
            ) from error

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Latency of single samples until the GPU has finished. Times of single kernels are not measured: they overlap with their launches."""
        tensors = [self._tensors(s) for s in self.samples(inputs)]

        def infer() -> None:
            for sample in tensors:
                self.main(*sample)
            self.device.sync()

        timing = latency(infer, runs, warmup)
        table = self.layers([(c["kernel"], None, None) for c in self.calls])
        return Profile(
            kind="measured",
            latency_ms=timing,
            peak_memory_bytes=peak_memory(),
            macs=sum(layer.macs or 0 for layer in table),
            layers=table,
            environment=machine(
                1, tvm=self.tvm.__version__, artifact_target=self.artifact.target, gpu=self.device.device_name
            ),
            **self.base(self.artifact.target),
        )

    def _load(self) -> Any:
        return self.relax.VirtualMachine(self.tvm.runtime.load_module(str(self.library)), self.device)

    def _tensors(self, sample: list[np.ndarray]) -> list[Any]:
        return [self.tvm.runtime.tensor(a, self.device) for a in sample]


def _gpu(tvm: Any, artifact: Artifact, core: str) -> Any:
    """TVM's first CUDA device. Raises Missing where there is none, or one that does not run code for `core`."""
    device = tvm.cuda(0)
    if tvm.get_global_func("device_api.cuda", allow_missing=True) is None or not device.exist:
        raise Missing(
            f"artifact '{artifact.folder}' is compiled for an NVIDIA GPU ({core}); TVM finds none on this machine (its CUDA runtime needs the "
            "driver's libcuda.so.1 and libcudart.so.13)"
        )
    found, wanted = int(device.compute_version.replace(".", "")), int(core.removeprefix("sm_"))
    if (
        found // 10 != wanted // 10 or found < wanted
    ):  # machine code runs on the same major version, from its minor version on
        raise Missing(
            f"artifact '{artifact.folder}' is compiled for {core}; this machine's GPU ({device.device_name}) is sm_{found}: export for a target "
            f"of that core"
        )
    return device


class EmulatedSession(_Model):
    """The library under qemu-aarch64. Counts instructions; its time is not a device's and is not reported."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.kit = qemu_user.kit()
        self.cpu = targets.load(artifact.target).emulator_cpu or "max"
        self.results = [(tuple(o["shape"]), np.dtype(o["dtype"])) for o in artifact.outputs]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs for a batch of any size, one sample after another, in one emulated process."""
        rows, _ = qemu_user.run(self.kit, self.library, self.cpu, self.samples(inputs), self.results)
        return self.join(rows)

    def profile(self, inputs: Arrays, runs: int, warmup: int) -> Profile:
        """Instructions of one inference, in all and by kernel; `runs` and `warmup` change nothing, the count is exact."""
        samples = self.samples(inputs)[:1]
        _, counts = qemu_user.run(self.kit, self.library, self.cpu, samples, self.results, count=True)
        environment = machine(1, emulator=f"qemu-aarch64 -cpu {self.cpu}")
        if counts is None:
            environment["instructions"] = "not counted: this QEMU does not load the counting plugin (QEMU 7 and 8 do)"
            table = self.layers([(c["kernel"], None, None) for c in self.calls])
        else:
            table = self.layers([(name, n, None) for name, n in counts.kernels])
        return Profile(
            kind="emulated",
            instructions=counts.total if counts else None,
            macs=sum(layer.macs or 0 for layer in table),
            layers=table,
            environment=environment,
            **self.base(self.artifact.target),
        )
