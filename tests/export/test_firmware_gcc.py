"""`make firmware` with arm-none-eabi-gcc: another compiler, the same codes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planish.export.artifact import Artifact
from planish.export.c import C
from planish.export.format import Source
from planish.runtimes import emulator
from planish.targets import target as targets

NETWORKS = ("residual", "branches", "flatten", "padded")


@pytest.mark.parametrize(
    "target", ["stm32f446", "rp2040", "rp2350", pytest.param("corstone-300", marks=pytest.mark.qemu)]
)
@pytest.mark.parametrize("optimize", ["-O3", "-Os"])
def test_same_codes(tiny: Any, tmp_path: Path, target: str, optimize: str) -> None:
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("arm-none-eabi-gcc is not installed")
    if target == "corstone-300" and shutil.which("qemu-system-arm") is None:
        pytest.skip("qemu-system-arm is not installed")
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    pytest.importorskip("ziglang", reason="ziglang is not installed (extra 'mcu')")
    for name in NETWORKS:
        model, x = tiny(name)
        folder = tmp_path / name
        folder.mkdir()
        written = C().write(Source(model, {"x": x[:4]}, "tiny"), targets.load(target), folder)
        made = subprocess.run(
            ["make", "firmware", f"CFLAGS={optimize}"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stderr[:2000]
        (folder / "tiny.elf").replace(folder / "firmware.elf")
        assert written.answers is not None
        with emulator.Emulator().open(Artifact(folder, {"format": "c", "target": target}), 1) as session:
            got = session.run({"x": x[:4]})
        for key, want in written.answers.items():
            np.testing.assert_array_equal(got[key], want, err_msg=f"{name} for {target} with gcc {optimize}")
