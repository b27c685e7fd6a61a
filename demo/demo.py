"""`planish demo`: one network through the whole pipeline, for three kinds of device, beside the float original."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .. import __version__, pipeline
from ..common import files
from ..common.errors import Missing
from ..common.progress import say

HERE = Path(__file__).parent
NETWORK = f"{HERE / 'fashion_resnet.py'}:network"
TRAIN = f"{HERE / 'fashion_resnet.py'}:train"
TEST = f"{HERE / 'fashion_resnet.py'}:test"
WEIGHTS = HERE / "fashion_resnet.safetensors"
TARGETS = ("host", "raspberry-pi-4", "stm32f746")


def run(output: Path | None, force: bool) -> dict[str, Any]:
    """Compress, export, run and measure. Returns {rows, output}; the folders stay when `output` names a place."""
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            return {"rows": _rows(Path(scratch))}
    with files.new_folder(output, force) as folder:
        rows = _rows(folder)
        (folder / "manifest.json").write_text(
            files.to_json({"planish": __version__, "format": "demo", "rows": rows}), encoding="utf-8"
        )
    return {"rows": rows, "output": str(output)}


def _rows(folder: Path) -> list[dict[str, Any]]:
    say("the original, in float, on this machine")
    pipeline.export(NETWORK, weights=WEIGHTS, data=TEST, output=folder / "original")
    rows = [{"name": "original", **_measure(folder / "original", "host")}]
    say("compressing: prune channels, recover, quantize to int8")
    pipeline.compress(
        NETWORK,
        weights=WEIGHTS,
        data=TRAIN,
        test_data=TEST,
        recipe=str(HERE / "recipe.yaml"),
        output=folder / "compressed",
    )
    for target in TARGETS:
        say(f"exporting for {target} and running it")
        try:
            pipeline.export(str(folder / "compressed"), target=target, output=folder / target)
            rows.append({"name": "compressed", **_measure(folder / target, target)})
        except Missing as reason:
            rows.append({"name": "compressed", "target": target, "skipped": str(reason)})
    return rows


def _measure(artifact: Path, target: str) -> dict[str, Any]:
    """Everything about one artifact that this machine can find out; what it lacks the tools for is named in `skipped`."""
    item = pipeline.artifacts.load(artifact)
    row: dict[str, Any] = {
        "target": target,
        "format": item.format,
        "bytes": _deployed_bytes(item),
        "macs": sum(item.manifest["macs"].values()),
    }
    row |= {k: item.manifest[k] for k in ("ram_bytes", "flash_bytes") if k in item.manifest}
    try:
        measured = pipeline.profile(artifact, runs=50 if item.format == "onnx" else 5, warmup=5)
        row["kind"] = measured["kind"]
        if "latency_ms" in measured:
            row["latency_ms"] = measured["latency_ms"]["p50"]
        row |= {k: measured[k] for k in ("instructions", "ram_bytes", "flash_bytes", "stack_bytes") if k in measured}
        scored = pipeline.evaluate(str(artifact), data=TEST)
        row |= {"accuracy": scored["value"], "n": scored["n"], "evaluated_on": scored["runtime"]}
    except Missing as reason:
        row["skipped"] = str(reason)
    return row


def _deployed_bytes(item: pipeline.artifacts.Artifact) -> int:
    """Bytes that go to the device: the model file or shared library; for a microcontroller, its flash image."""
    if "flash_bytes" in item.manifest:
        return item.manifest["flash_bytes"]
    models = [f["bytes"] for n, f in item.manifest["files"].items() if n.startswith("model.")]
    return sum(models)


def table(report: dict[str, Any]) -> Table:
    """The rows for a terminal of 80 columns, each compared with the original; what could not run stands below, with its reason.

    The bytes of a microcontroller's row are its flash image: code, weights and start-up.
    """
    original = report["rows"][0]
    result = Table(title="Fashion-MNIST residual network", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("target", "bytes", "accuracy", "MACs", "latency or\ninstructions", "RAM"):
        result.add_column(column, justify="left" if column == "target" else "right", no_wrap=True)
    notes = []
    for row in report["rows"]:
        speed = "not run"
        if "latency_ms" in row:
            speed = f"{row['latency_ms']:.3f} ms{_against(original, row, 'latency_ms')}\n{row['kind']}"
        elif "instructions" in row:
            speed = f"{row['instructions']:,}\n{row['kind']}"
        result.add_row(
            f"{row['target']}\n{row['name']}" + (f", {row['format']}" if "format" in row else ""),
            _bytes(original, row),
            f"{row['accuracy']:.2%}\nn={row['n']}" if "accuracy" in row else "not run",
            f"{row['macs']:,}{_against(original, row, 'macs')}" if "macs" in row else "",
            speed,
            f"{row['ram_bytes']:,}" if row.get("ram_bytes") else "",
        )
        if "skipped" in row:
            notes.append(f"{row['target']}: {row['skipped']}")
    result.caption = "\n".join(notes) or None
    result.caption_justify = "left"
    return result


def _bytes(original: dict[str, Any], row: dict[str, Any]) -> str:
    if "bytes" not in row:
        return ""
    where = "\nflash" if row.get("flash_bytes") else ""
    return f"{row['bytes']:,}{_against(original, row, 'bytes')}{where}"


def _against(original: dict[str, Any], row: dict[str, Any], key: str) -> str:
    """A second line, how many times less than the original; nothing for the original itself."""
    if row is original or not original.get(key) or not row.get(key):
        return ""
    return f"\n{original[key] / row[key]:.1f}x less"
