"""The command line. Each verb calls the function of the same name in pipeline.py and prints what it returns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .common.errors import PlanishError

if TYPE_CHECKING:
    from .compress.model import Input

app = typer.Typer(
    name="planish",
    help="Prune, quantize and export a trained model to a device, and profile it there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help="Device; `planish targets` lists them.")]
Arrays = Annotated[str | None, typer.Option("--data", "-d", help="Samples: .npz, .safetensors, a folder of them, or file.py:loader.")]  # fmt: skip
Data = Annotated[str | None, typer.Option("--data", "-d", help="Samples: .npz, .safetensors, a folder of them, file.py:loader, or .txt for a language model.")]  # fmt: skip
Length = Annotated[int | None, typer.Option("--length", min=2, help="Tokens of a window of a text file.")]
Weights = Annotated[Path | None, typer.Option("--weights", "-w", help="Weights for a factory: .safetensors, .pt, .pth or .th.")]  # fmt: skip
Inputs = Annotated[list[str] | None, typer.Option("--input", "-i", help="Input of a factory's model: name=1,3,32,32 (needed without --data).")]  # fmt: skip
RuntimeName = Annotated[str | None, typer.Option("--runtime", help="Runtime to use instead of the target's own.")]
On = Annotated[str | None, typer.Option("--on", help="A device instead of this machine: serial://PORT, a board with the artifact's serial firmware (`make serial`).")]  # fmt: skip
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="file.py:factory, package.module:factory, .pt2, .onnx, an int8 .tflite, a Hugging Face folder or a compressed folder.")]  # fmt: skip
INTERRUPTED = "interrupted; no output was written"

ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder written by `planish export`.")]


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"planish {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prune, quantize and export a trained model to a device, and profile it there."""


@app.command()
def compress(
    model: ModelName,
    output: Output,
    target: TargetName = "host",
    data: Data = None,
    test_data: Annotated[str | None, typer.Option("--test-data", help="Labelled samples for the accuracy.")] = None,
    weights: Weights = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="YAML file or bundled recipe.")] = None,
    input: Inputs = None,
    length: Length = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    force: Force = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say peak memory, bytes and layers that do not fit; compute and write nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe on a checkpoint: checkpoint -> compressed model."""
    from . import pipeline

    report = pipeline.compress(
        model,
        target=target,
        data=data,
        test_data=test_data,
        weights=weights,
        recipe=recipe,
        output=output,
        inputs=_inputs(input),
        length=length,
        seed=seed,
        force=force,
        dry_run=dry_run,
    )
    if dry_run:
        return _forecast(report, as_json)
    if as_json:
        return _json(report)
    table = _table("", "original", "compressed", title=f"{model} by {report['recipe']} for {target}")
    before = report["original"]
    for key, show in (("params", _count), ("macs", _count), ("bytes", _count)):
        table.add_row(key, show(before[key]), f"{show(report[key])}  ({_ratio(before[key], report[key])})")
    if "accuracy" in report:
        a = report["accuracy"]
        table.add_row(f"accuracy (n={a['n']})", f"{a['original']:.2%}", f"{a['compressed']:.2%}")
    if "quality" in report:
        q = report["quality"]
        closer = f"  (KL {q['kl']:.4f}, {q['agreement']:.1%} same next token)" if "kl" in q else ""
        window = f", windows of {q['window']}" if "window" in q else ""
        table.add_row(
            f"{q['metric']} (n={q['n']}{window}, on the {q['on']})",
            f"{q['original']:.4f}",
            f"{q['compressed']:.4f}{closer}",
        )
    _print(table)
    _print(f"written to {output} in {report['seconds']:.1f} s")


@app.command()
def export(
    model: ModelName,
    output: Output,
    target: TargetName = "host",
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="onnx, onnx_standard, tvm, c, pt2 or bitsandbytes.")
    ] = None,
    data: Arrays = None,
    weights: Weights = None,
    input: Inputs = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Microcontrollers: what the device may spend, e.g. flash=256K,ram=64K,latency=20ms."),
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option(
            help="Format c: add an Arduino library ('arduino') or a Zephyr module ('zephyr'); Make and CMake are always there."
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the device artifact of a compressed model, an ONNX file or an int8 .tflite file."""
    from . import pipeline

    report = pipeline.export(
        model,
        target=target,
        format=format,
        output=output,
        data=data,
        weights=weights,
        inputs=_inputs(input),
        budget=budget,
        package=package or (),
        force=force,
    )
    if as_json:
        return _json(report)
    _print(f"{report['format']} artifact for {target} in {output}: {report['bytes']:,} bytes")
    for name in report["files"]:
        _print(f"  {name}")
    for key, what in (
        ("flash_bytes", "flash"),
        ("ram_bytes", "RAM"),
        ("arena_bytes", "  of which the arena"),
        ("stack_bytes", "  stack used (emulator)"),
    ):
        if key in report:
            _print(f"{what} {report[key]:,} bytes")
    if "instructions" in report:
        _print(f"{report['instructions']:,} instructions an inference (emulator, exact)")
    for line in _device(report):
        _print(line)
    for warning in report["warnings"]:
        _print(f"warning: {warning}")


@app.command()
def profile(
    artifact: ArtifactPath,
    runtime: RuntimeName = None,
    on: On = None,
    runs: Annotated[int, typer.Option(min=1, help="Inferences that are timed.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Inferences before, not counted.")] = 10,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Measure latency, memory and layers of an artifact, after checking its answers."""
    from . import pipeline

    report = pipeline.profile(artifact, runtime=_place(runtime, on), runs=runs, warmup=warmup, threads=threads)
    if as_json:
        return _json(report)
    facts = _table("", report["kind"], title=f"{artifact} for {report['target']}")
    if "latency_ms" in report:
        t = report["latency_ms"]
        facts.add_row(
            "latency", f"p50 {t['p50']:.3f} ms, p90 {t['p90']:.3f} ms, p99 {t['p99']:.3f} ms ({t['runs']} runs)"
        )
    for key, value in report.items():
        if isinstance(value, int):
            facts.add_row(key.replace("_", " "), _count(value))
    for line in _device(report):
        facts.add_row("estimate" if "estimate" in line else "", line)
    for key, value in report["environment"].items():
        facts.add_row(key, str(value))
    _print(facts)
    if report["layers"]:
        first = report["layers"][0]
        measured = next((k for k in ("instructions", "measured_cycles") if k in first), "ms")
        moved = [k for k in ("loads", "stores") if k in report["layers"][0]]
        layers = _table("layer", "op", "MACs", measured, *moved, title="layers")
        for row in report["layers"]:
            value = row.get(measured)
            shown = "" if value is None else f"{value:.4f}" if isinstance(value, float) else _count(value)
            layers.add_row(row["name"], row["op"], _count(row.get("macs")), shown, *(_count(row[k]) for k in moved))
        _print(layers)


@app.command()
def run(
    artifact: ArtifactPath,
    input: Annotated[
        str, typer.Option("--input", "-i", help="Samples: .npz, .safetensors, a folder of them, or file.py:loader.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Outputs by name, .npz.")],
    runtime: RuntimeName = None,
    on: On = None,
    threads: Threads = 1,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run an artifact on samples and write its outputs."""
    import numpy as np

    from . import pipeline
    from .common import files

    if output.suffix != ".npz":
        raise PlanishError(f"output '{output}' is written as .npz; give it that suffix")
    files.check_output(output, force)
    answers = pipeline.run(artifact, input, runtime=_place(runtime, on), threads=threads)
    with files.new_file(output, force) as path:
        np.savez(path, **answers)  # pyright: ignore[reportArgumentType] - stubs take the names for options
    shapes = {name: list(value.shape) for name, value in answers.items()}
    if as_json:
        return _json({"output": str(output), "outputs": shapes})
    for name, shape in shapes.items():
        _print(f"{name} {shape} -> {output}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|COMPRESSED|ARTIFACT")],
    data: Data = None,
    weights: Weights = None,
    input: Inputs = None,
    length: Length = None,
    runtime: RuntimeName = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Perplexity on text, accuracy on labelled data, or closeness to the original model."""
    from . import pipeline

    report = pipeline.evaluate(
        model, data=data, weights=weights, inputs=_inputs(input), length=length, runtime=runtime, threads=threads
    )
    if as_json:
        return _json(report)
    _print(f"{_quality(report)} ({report['runtime']})")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL|COMPRESSED|ARTIFACT")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to write, at most.")] = 64,
    weights: Weights = None,
    input: Inputs = None,
    runtime: RuntimeName = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """The most likely continuation of a prompt, token by token through the key/value cache."""
    from . import pipeline

    report = pipeline.generate(
        model,
        prompt=prompt,
        tokens=tokens,
        weights=weights,
        inputs=_inputs(input),
        runtime=runtime,
        threads=threads,
    )
    if as_json:
        return _json(report)
    _print(prompt + report["text"])
    speed = report["tokens_per_second"]
    _print(f"{report['tokens']} tokens" + (f", {speed:.1f} tokens/s" if speed else "") + f" ({report['runtime']})")


@app.command()
def inspect(
    model: ModelName,
    data: Data = None,
    weights: Weights = None,
    input: Inputs = None,
    length: Length = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the data to look at.")] = 16,
    as_json: Json = False,
) -> None:
    """Size and work of every layer; with data also the outliers that it reads and how few bits it bears."""
    from . import pipeline

    report = pipeline.inspect(model, data=data, weights=weights, inputs=_inputs(input), length=length, samples=samples)
    if as_json:
        return _json(report)
    rows, bits = report["layers"], ("8", "4", "3", "2")
    stored = any("error" in r for r in rows)
    columns = ["layer", "op", "shape", "bits", "bytes", "MACs", "max |w|", "kurtosis", *(["error"] if stored else [])]
    title = f"{model}: {report['params']:,} weights, {report['macs']:,} MACs, {report['bytes']:,} bytes"
    if "quality" in report:
        _print(_quality(report["quality"]))
    sizes = _table(*columns, title=title)
    for r in rows:
        cells = [r["name"], r["op"], "x".join(map(str, r.get("shape", ()))), str(r.get("bits", "")), _count(r["bytes"])]
        cells += [_count(r["macs"]), _number(r.get("weight_peak")), _number(r.get("weight_kurtosis"))]
        sizes.add_row(*cells, *([_number(r.get("error"))] if stored else []))
    _print(sizes)
    if report["samples"]:
        title = (
            f"what layers read ({report['samples']} samples), and the relative error of their output with fewer bits"
        )
        columns = ["layer", "max |x|", "kurtosis", "|x|>=6", "max/median", *(f"{b} bit" for b in bits)]
        read = _table(*columns, title=title)
        for r in (r for r in rows if "input" in r):
            errors = r.get("sensitivity", {})
            read.add_row(r["name"], *_outliers(r["input"]), *(_number(errors.get(b)) for b in bits))
        _print(read)
    if report["attention"]:
        outputs = _table("attention", "max |x|", "kurtosis", "|x|>=6", "max/median", title="outputs of attention")
        for r in report["attention"]:
            outputs.add_row(r["name"], *_outliers(r["output"]))
        _print(outputs)


@app.command()
def verify(
    artifact: ArtifactPath,
    runtime: RuntimeName = None,
    on: On = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Check an artifact's hashes and replay its golden inputs; exit 1 when the answers are wrong."""
    from . import pipeline

    report = pipeline.verify(artifact, runtime=_place(runtime, on), threads=threads)
    if as_json:
        _json(report)
    else:
        verdict = (
            "exact" if report["exact"] else f"largest error {report['max_error']:.6g}, {report['bound']:.6g} allowed"
        )
        _print(
            f"{'ok' if report['ok'] else 'WRONG'} on {report['runtime']}: {verdict}; {len(report['hashes'])} hashes agree"
        )
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def targets(name: Annotated[str | None, typer.Argument()] = None, as_json: Json = False) -> None:
    """List the devices, or show one."""
    from .targets import target as devices

    if name is not None:
        return _json(devices.load(name).model_dump(exclude_none=True))
    found = [devices.load(n) for n in devices.names()]
    if as_json:
        return _json({t.name: t.model_dump(exclude_none=True) for t in found})
    table = _table("target", "core", "features", "flash", "RAM", "format", "device")
    for t in found:
        sizes = [f"{m.length // 1024} KiB" if m else "" for m in (t.flash, t.ram)]
        table.add_row(t.name, t.core, " ".join(t.features), *sizes, t.format, t.title)
    _print(table)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument()] = None, as_json: Json = False) -> None:
    """List the bundled recipes, or show one with every field."""
    from .compress import recipe as bundled

    if name is not None:
        return _json(bundled.dump(bundled.load(name)))
    found = [bundled.load(n) for n in bundled.names()]
    if as_json:
        return _json({r.name: bundled.dump(r) for r in found})
    table = _table("recipe", "passes", "what it does")
    for r in found:
        table.add_row(r.name, ", ".join(n for n, _ in r.passes), r.description)
    _print(table)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to keep the results in.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress a trained network, export it for three kinds of device, run each, and compare with the original."""
    from .demo import demo as demonstration

    report = demonstration.run(output, force)
    if as_json:
        return _json(report)
    _print(demonstration.table(report))


def main() -> None:
    """Entry point: one line on standard error and a non-zero exit for every error that a user can act on."""
    try:
        code = app(standalone_mode=False)  # typer turns an Exit into its code, and Ctrl-C into 130
    except PlanishError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail(INTERRUPTED, 130)
    except OSError as error:  # a full disk, a folder that may not be read: the system's word and the place
        where = f": '{error.filename}'" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 1)
    except Exception as error:
        if not _is_usage(error):
            raise
        _fail(_usage(error), 2)
    else:
        if code == 130:
            _fail(INTERRUPTED, 130)
        sys.exit(code)


def _is_usage(error: Exception) -> bool:
    """Whether typer raised the error for a wrong command line (its exception classes come from its own copy of click)."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _usage(error: Any) -> str:
    hint = getattr(getattr(error, "ctx", None), "command_path", "planish")
    return f"{error.format_message()} (see '{hint} --help')"


def _fail(message: str, code: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def _place(runtime: str | None, on: str | None) -> str | None:
    """Where to run: a runtime by name, or a device by its address."""
    if runtime is not None and on is not None:
        raise PlanishError("--runtime and --on both say where to run; give one")
    return on or runtime


def _inputs(texts: list[str] | None) -> dict[str, Input] | None:
    if not texts:
        return None
    from .compress.load import parse_input

    return {i.name: i for i in map(parse_input, texts)}


def _quality(report: dict[str, Any]) -> str:
    """How good a model is, in one line."""
    shown = f"{report['value']:.2%}" if report["metric"] == "accuracy" else f"{report['value']:.6f}"
    if "kl" in report:
        shown += f", KL {report['kl']:.6f}, {report['agreement']:.2%} same next token"
    what = f"tokens in windows of {report['window']}" if report["metric"] == "perplexity" else "samples"
    return f"{report['metric']} {shown} on {report['n']} {what}"


def _band(ends: tuple[float, float]) -> str:
    """'18.5 to 28.3'; one number where both ends read the same."""
    low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in ends)
    return low if low == high else f"{low} to {high}"


def _device(report: dict[str, Any]) -> list[str]:
    """Lines about one inference on a microcontroller, and what a budget traded."""
    lines: list[str] = []
    if "latency_estimate_ms" in report:
        lines.append(f"{_band(report['latency_estimate_ms'])} ms (estimate of the core's cycle model)")
    if "energy_estimate_uj" in report:
        low, high = report["energy_estimate_uj"]
        lines.append(f"{_band((low / 1e3, high / 1e3))} mJ (estimate from the datasheet's current)")
    if "budget" in report:
        traded = report["budget"]
        narrowed = ", ".join(f"{k} {v} bits" for k, v in traded["narrowed"].items())
        lines.append(f"for the budget: {narrowed or 'weights stay as they are'}")
        if traded["maps"]:
            lines.append(f"feature maps: {traded['maps']}")
        if traded["patches"]:
            lines.append(f"first layers in patches: {traded['patches']['summary']}")
        before, after = traded["before"], traded["after"]
        lines.append(
            f"flash {before['flash_bytes']:,} -> {after['flash_bytes']:,}, RAM {before['ram_bytes']:,} -> {after['ram_bytes']:,} bytes; "
            + (
                f"outputs moved by {traded['output_error']:.2%} (RMS)"
                if traded["output_error"] or not traded["narrowed"]
                else "outputs did not move on these samples, which says little"
            )
        )
        if traded.get("samples") == "random":
            lines.append("warning: losses were measured on random samples; --data gives real ones")
    return lines


def _forecast(report: dict[str, Any], as_json: bool) -> None:
    """What a dry run found; ends with exit code 1 when a layer does not fit."""
    if as_json:
        _json(report)
    else:
        known, before = report["bytes"] is not None, report["original_bytes"]
        after = f"{report['bytes']:,} ({_ratio(before, report['bytes'])})" if known else "not known before it has run"
        _print(
            f"{report['model']} by {report['recipe']} for {report['target']}: {report['layers']} layers are replaced"
        )
        _print(f"bytes        {before:,} -> {after}")
        peak = f"about {report['peak_memory_bytes']:,} bytes" if known else "not known before it has run"
        _print(f"peak memory  {peak}")
        if report["unknown"]:
            _print(f"not foreseen: {', '.join(report['unknown'])}")
        for line in report["problems"]:
            _print(f"problem: {line}")
    if report["problems"]:
        raise PlanishError(f"dry run: {len(report['problems'])} layers do not fit the recipe")


def _json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _print(value: Any) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    if isinstance(value, Table):
        console.print(value)
    else:
        console.print(value, markup=False, soft_wrap=True)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def _outliers(x: dict[str, Any]) -> tuple[str, ...]:
    return _number(x["peak"]), _number(x["kurtosis"]), str(x["columns"]), _number(x.get("ratio"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.2f}x less" if after else ""
