"""`planish export --budget`: the network is fitted to flash, RAM and latency, and what cannot be fitted is refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import planish
import pytest
import torch
from planish import budget
from planish.common.errors import PlanishError
from planish.compress.data import Data
from planish.compress.model import trace
from planish.compress.passes import Context
from planish.compress.quantize.static import Static
from planish.export import firmware
from planish.export.artifact import load
from planish.export.lowering import to_onnx
from planish.targets import target as targets

NEEDS = pytest.mark.skipif(not firmware.available(), reason="ziglang is not installed (extra 'mcu')")


def dense(x: np.ndarray) -> onnx.ModelProto:
    """Two linear layers, 512 -> 48 -> 10, quantized."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(512, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10)).eval()
    model = trace(module, {"x": torch.from_numpy(x[:2])}, "dense")
    target = targets.load("stm32f446")
    return to_onnx(
        Static().apply(model, Context(model, Data({"x": x}, None, "x"), target, torch.Generator().manual_seed(0)))
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flash=256K", budget.Budget(flash=262144)),
        ("ram=64KiB,flash=1M", budget.Budget(flash=1 << 20, ram=65536)),
        ("latency=20ms, ram=1000", budget.Budget(ram=1000, latency_ms=20.0)),
        ("latency=1.5s", budget.Budget(latency_ms=1500.0)),
    ],
)
def test_parse(text: str, expected: budget.Budget) -> None:
    assert budget.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["flash", "flash=", "flash=12Q", "rom=1K", "latency=20", "flash=1K,flash=2K", "ram=0", ""]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(PlanishError, match="--budget"):
        budget.parse(text)


def test_only_for_microcontrollers(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("residual")
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(PlanishError, match="microcontroller"):
        planish.export(
            str(tmp_path / "net.onnx"), target="host", format="c", output=tmp_path / "out", budget="flash=1M"
        )
    with pytest.raises(PlanishError, match="format c"):
        planish.export(str(tmp_path / "net.onnx"), target="host", output=tmp_path / "out", budget="flash=1M")
    assert not (tmp_path / "out").exists()


@NEEDS
def test_flash_is_kept_by_narrower_weights(tmp_path: Path) -> None:
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    onnx.save(dense(x := np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)), tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=x)
    given = {"target": "stm32f446", "data": str(tmp_path / "x.npz")}
    whole = planish.export(str(tmp_path / "net.onnx"), output=tmp_path / "whole", **given)
    asked = whole["flash_bytes"] - 6000
    fitted = planish.export(str(tmp_path / "net.onnx"), output=tmp_path / "fitted", budget=f"flash={asked}", **given)
    assert fitted["flash_bytes"] <= asked
    traded = fitted["budget"]
    assert traded["narrowed"]
    assert set(traded["narrowed"].values()) <= {2, 4}
    assert traded["after"]["flash_bytes"] == fitted["flash_bytes"]
    assert traded["before"]["flash_bytes"] == whole["flash_bytes"]
    assert 0 < traded["output_error"] < 1
    assert load(tmp_path / "fitted").manifest["budget"] == traded
    checked = planish.verify(tmp_path / "fitted")
    assert checked["ok"]
    assert checked["exact"]


@NEEDS
def test_ram_is_kept_by_narrower_maps(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    model, _ = tiny("residual")
    onnx.save(model, tmp_path / "net.onnx")
    whole = planish.export(str(tmp_path / "net.onnx"), target="stm32f446", output=tmp_path / "whole")
    asked = whole["ram_bytes"] - whole["arena_bytes"] // 5
    fitted = planish.export(
        str(tmp_path / "net.onnx"), target="stm32f446", output=tmp_path / "fitted", budget=f"ram={asked}"
    )
    assert fitted["ram_bytes"] <= asked
    assert "8, 4, 2 bits" in fitted["budget"]["maps"]
    assert fitted["budget"]["samples"] == "random"
    assert planish.verify(tmp_path / "fitted")["exact"]


@NEEDS
def test_what_fits_already_is_not_touched(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    model, _ = tiny("residual")
    onnx.save(model, tmp_path / "net.onnx")
    report = planish.export(
        str(tmp_path / "net.onnx"), target="stm32f446", output=tmp_path / "out", budget="flash=256K,ram=64K,latency=1s"
    )
    assert report["budget"]["narrowed"] == {}
    assert report["budget"]["output_error"] == 0


@NEEDS
@pytest.mark.parametrize("text", ["flash=600", "ram=2100", "latency=1us"])
def test_impossible_budgets_name_the_closest_plan(tiny: Any, tmp_path: Path, text: str) -> None:
    pytest.importorskip("unicorn", reason="unicorn is not installed (extra 'mcu')")
    model, _ = tiny("residual")
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(PlanishError, match=r"closest plan needs flash \d+ bytes, RAM \d+ bytes.*over: ") as caught:
        planish.export(str(tmp_path / "net.onnx"), target="stm32f446", output=tmp_path / "out", budget=text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_cost_counts_what_is_over() -> None:
    cost = budget.Cost(1000, 500, 3.0, {}, {})
    assert cost.over(budget.Budget(flash=1000, ram=500, latency_ms=3.0)) == []
    assert cost.over(budget.Budget(flash=900, latency_ms=2.0)) == [
        "flash 1000 bytes, 100 over 900",
        "latency 3 ms, 1 over 2",
    ]
