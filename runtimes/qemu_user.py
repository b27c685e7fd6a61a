"""TVM libraries for Arm Linux on another machine: QEMU's user-mode emulation, with exact instruction counts.

What it takes, and where it comes from:
- `qemu-aarch64`: system package qemu-user;
- the TVM runtime for aarch64: the aarch64 wheels of apache-tvm and apache-tvm-ffi, fetched by pip once (96 MB, two files are kept);
- glibc and libstdc++ for aarch64: the system package libstdc++6-arm64-cross where installed, else its Debian archives, fetched by
  `apt-get download` (no root, 2 MB) and unpacked beside the wheels' files;
- the runner (qemu/runner.c) and the counting plugin (qemu/count.c), compiled by the `ziglang` wheel.
All of it is kept in a folder of the user's cache, named by the versions. Emulated time says nothing about a device and is not reported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common import files
from ..common.errors import Missing, missing_extra
from ..common.progress import say

SOURCES = Path(__file__).parent / "qemu"
WHEELS = ("apache-tvm", "apache-tvm-ffi")
LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
DEBIAN = ("libc6-arm64-cross", "libstdc++6-arm64-cross", "libgcc-s1-arm64-cross")
SYSTEM_ROOT = Path("/usr/aarch64-linux-gnu")
"""where Debian's and Ubuntu's cross packages put the libraries"""
TIMEOUT = 600
"""seconds that any helper process may take"""


@dataclass(frozen=True)
class Kit:
    """Everything that emulation needs, ready to use."""

    qemu: Path
    root: Path
    """folder with lib/ld-linux-aarch64.so.1, libc and libstdc++"""
    libraries: Path
    """folder with libtvm_runtime.so and libtvm_ffi.so for aarch64"""
    runner: Path
    plugin: Path | None
    """the counting plugin; None when this QEMU does not take it"""


@dataclass(frozen=True)
class Counts:
    """Exact instructions of one inference."""

    total: int
    kernels: tuple[tuple[str, int], ...]
    """(kernel, instructions) in the order of the calls"""


def kit() -> Kit:
    """The emulator and its parts, fetched and built where they are not there yet. Raises Missing naming what to install."""
    found = shutil.which("qemu-aarch64")
    if found is None:
        raise Missing("running an aarch64 artifact here needs qemu-aarch64: apt-get install qemu-user")
    qemu = Path(found)
    versions = [importlib.metadata.version(w) for w in WHEELS]
    folder = _cache() / ("aarch64-tvm-" + "-".join(versions))
    if not (folder / "manifest.json").exists():
        with files.new_folder(folder, force=True) as work:
            _fetch_runtime(work, versions)
            (work / "manifest.json").write_text(
                files.to_json(dict(zip(WHEELS, versions, strict=True))), encoding="utf-8"
            )
    root = SYSTEM_ROOT if _is_root(SYSTEM_ROOT) else _fetched_root()
    runner = built("runner", "aarch64-linux-gnu", ["-O1", *_headers()], [str(folder / "libtvm_ffi.so"), "-ldl"])
    plugin = built("count", native(), ["-O2", "-shared", "-fPIC"], [])
    return Kit(qemu, root, folder, runner, plugin if _takes_plugin(qemu, plugin) else None)


def run(
    parts: Kit,
    library: Path,
    cpu: str,
    samples: Sequence[Sequence[np.ndarray]],
    outputs: Sequence[tuple[tuple[int, ...], np.dtype]],
    count: bool = False,
) -> tuple[list[list[np.ndarray]], Counts | None]:
    """Outputs of every sample, and the instruction counts of the first one if asked for and the plugin is there.

    `samples` hold the input tensors in the model's order, with the shapes it was compiled for; `outputs` are the shapes and
    dtypes of one sample's outputs. Raises Missing when the emulator or the model stops with an error.
    """
    specs = [f"{a.dtype.name}:{','.join(map(str, a.shape))}" for a in samples[0]]
    counting = count and parts.plugin is not None
    with tempfile.TemporaryDirectory() as scratch:
        source, result, log = (Path(scratch) / n for n in ("in.bin", "out.bin", "log.txt"))
        with source.open("wb") as file:
            for sample in samples:
                for array in sample:
                    file.write(np.ascontiguousarray(array).tobytes())
        command = [str(parts.qemu), "-cpu", cpu, "-L", str(parts.root)]
        command += ["-E", f"LD_LIBRARY_PATH={parts.libraries}", "-E", "TVM_NUM_THREADS=1"]
        if counting:
            command += ["-plugin", str(parts.plugin), "-d", "plugin", "-D", str(log)]
        command += [str(parts.runner), str(parts.libraries / LIBRARIES[0]), str(library), str(int(counting))]
        command += [str(len(samples)), str(source), str(result), *specs]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise Missing(f"the emulated run of '{library}' on '{cpu}' failed: {lines[-1][:300]}")
        values = _split(result.read_bytes(), len(samples), outputs)
        return values, _counts(log.read_text(encoding="utf-8"), done.stdout) if counting else None


def _counts(log: str, kernels: str) -> Counts:
    marks = [(int(words[1]), int(words[2])) for line in log.splitlines() if (words := line.split())[0] == "MARK"]
    at = {m: [n for i, n in marks if i == m] for m in range(4)}
    names = kernels.split()
    spans = [
        after - before - 1 for before, after in zip(at[0], at[1], strict=True)
    ]  # the mark itself is one instruction
    return Counts(at[3][0] - at[2][0] - 1, tuple(zip(names, spans, strict=True)))


def _split(data: bytes, samples: int, outputs: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[list[np.ndarray]]:
    """The runner's output file as arrays."""
    values: list[list[np.ndarray]] = []
    offset = 0
    for _ in range(samples):
        row = []
        for shape, dtype in outputs:
            size = math.prod(shape)
            row.append(np.frombuffer(data, dtype, size, offset).reshape(shape))
            offset += size * dtype.itemsize
        values.append(row)
    return values


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planish"


def _fetch_runtime(work: Path, versions: Sequence[str]) -> None:
    """Take the two runtime libraries out of the aarch64 wheels of the installed versions."""
    pins = [f"{w}=={v}" for w, v in zip(WHEELS, versions, strict=True)]
    say(f"fetching the aarch64 TVM runtime (96 MB, once): {' '.join(pins)}")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--platform={p}" for p in PLATFORMS] + [f"--python-version={python}", "-d", scratch, *pins]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
                done.stderr.strip()[-200:]
            ]
            raise Missing(f"the aarch64 TVM runtime could not be fetched with pip ({' '.join(pins)}): {lines[0]}")
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if Path(member).name in LIBRARIES:
                        (work / Path(member).name).write_bytes(archive.read(member))
    lacking = [name for name in LIBRARIES if not (work / name).exists()]
    if lacking:
        raise Missing(f"the aarch64 wheels {' '.join(pins)} hold no {', '.join(lacking)}")


def _is_root(path: Path) -> bool:
    return (path / "lib" / "libstdc++.so.6").exists() and (path / "lib" / "ld-linux-aarch64.so.1").exists()


def _fetched_root() -> Path:
    """The C and C++ libraries for aarch64 from Debian's archives, in the cache."""
    folder = _cache() / "aarch64-glibc"
    root = folder / SYSTEM_ROOT.relative_to("/")
    if _is_root(root):
        return root
    hint = "apt-get install libstdc++6-arm64-cross (Debian, Ubuntu)"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Missing(
            f"running an aarch64 artifact here needs glibc and libstdc++ for aarch64 in {SYSTEM_ROOT}: {hint}"
        )
    say(f"fetching glibc and libstdc++ for aarch64 (2 MB, once): {' '.join(DEBIAN)}")
    with files.new_folder(folder, force=True) as work:
        done = subprocess.run(
            ["apt-get", "download", "-qq", *DEBIAN],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        archives = sorted(work.glob("*.deb"))
        if done.returncode or len(archives) < len(DEBIAN):
            raise Missing(f"glibc and libstdc++ for aarch64 could not be fetched ({' '.join(DEBIAN)}): {hint}")
        for archive in archives:
            subprocess.run(
                ["dpkg-deb", "-x", str(archive), str(work)], check=True, capture_output=True, timeout=TIMEOUT
            )
            archive.unlink()
        (work / "manifest.json").write_text(files.to_json({"packages": list(DEBIAN)}), encoding="utf-8")
    return root


def _headers() -> list[str]:
    from tvm_ffi import libinfo

    return [f"-I{path}" for path in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]


def native() -> str:
    """The compiler's name of this machine."""
    return f"{os.uname().machine}-linux-gnu"


def built(name: str, triple: str, flags: Sequence[str], libraries: Sequence[str], extra: str = "tvm") -> Path:
    """qemu/<name>.c compiled by zig, once for each content and compiler command. `extra` of planish brings zig."""
    try:
        import ziglang  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise missing_extra("ziglang", extra, f"building the emulator's {name}.c") from error
    source = SOURCES / f"{name}.c"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, *flags, str(source), *libraries]
    key = hashlib.sha256(source.read_bytes() + repr(command).encode()).hexdigest()[:16]
    built = _cache() / "tools" / f"{name}-{key}"
    if not built.exists():
        with files.new_file(built) as path:
            done = subprocess.run(
                [*command, "-o", str(path)], capture_output=True, text=True, check=False, timeout=TIMEOUT
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                raise Missing(f"zig could not compile '{source.name}' for {triple}: {lines[0][:300]}")
            path.chmod(0o755)
    return built


def _takes_plugin(qemu: Path, plugin: Path) -> bool:
    """Whether this QEMU loads the plugin: plugins may be configured out, and QEMU 9 changed their interface."""
    done = subprocess.run(
        [str(qemu), "-plugin", str(plugin), "-version"], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    return done.returncode == 0
