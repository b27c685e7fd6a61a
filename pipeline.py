"""The verbs: compress, export, profile, run, evaluate, generate, inspect, verify. The command line and the Python API are these functions."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import torch

from . import __version__, language
from . import budget as budgets
from .common import files, memory, plugins
from .common.errors import Missing, PlanishError, listed
from .common.progress import say
from .compress import compressed as compressed_model
from .compress import cost as model_cost
from .compress import diagnostics, evaluation, layers, onnx_file, program_file, text, tflite_import
from .compress import forecast as forecasts
from .compress import journal as journals
from .compress import load as loading
from .compress import recipe as recipes
from .compress.blocks import MASK
from .compress.data import Data, check
from .compress.evaluation import cosine, top1
from .compress.load_data import load_data
from .compress.model import Input, Model, Text, predict
from .compress.passes import Context
from .export import accuracy as accuracy_levels
from .export import artifact as artifacts
from .export import cost, metadata, packages
from .export.artifact import Artifact
from .export.format import Format, Source, Written
from .export.interface import interface
from .export.lowering import lowered, to_onnx
from .runtimes import measure, ort, serial_line
from .runtimes.session import Greedy, Profile, Runtime, Session
from .targets import target as targets
from .targets.target import Target

GOLDEN = 8
"""samples kept with a model, with its answers"""
SCORED = 16384
"""tokens of the test data that the report of `compress` takes for perplexity, at most"""
GOLDEN_LENGTH = 64
"""tokens of such a sample, where the model takes any number"""
LARGEST = 2**31 - 2**20
"""bytes of tensors that an ONNX file can hold: protobuf ends at 2 GiB"""
FAR = 0.1
"""difference of an artifact to its compressed program, as a share of the largest output, that is worth a warning"""
HELD_OUT = 0.1
"""share of the data that a training recipe never sees, when no test data is given"""


@dataclass(frozen=True)
class Prepared:
    """A model with the samples that belong to it."""

    model: Model
    data: Data | None
    """for calibration and training"""
    test: Data | None
    """for accuracy; never trained on"""


def compress(
    model: str,
    *,
    target: str = "host",
    data: str | None = None,
    test_data: str | None = None,
    weights: Path | None = None,
    recipe: str | None = None,
    output: Path | str | None = None,
    inputs: Mapping[str, Input] | None = None,
    length: int | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run a recipe on a checkpoint and write the compressed model to the folder `output`. Text is read in windows of `length` tokens.

    With `dry_run` nothing is computed or written: the keys are those of `forecast.Forecast` with the model, target and recipe.
    An interrupted run leaves `<output>.partial`, from which the same call goes on.

    Returns the keys of `planish compress --json`. Raises PlanishError, having written nothing, for input that does not fit.
    """
    started = time.perf_counter()
    output = None if output is None else Path(output)
    if output is not None:
        files.check_output(output, force)
        _keep_source(model, output)
    device = targets.load(target)
    plan = recipes.load(recipe or device.recipe)
    foreign = [name for name, step in plan.passes if device.format not in step.formats]
    if foreign:
        raise PlanishError(
            f"recipe '{plan.name}': {listed(foreign)} leaves ops that format '{device.format}' of target '{target}' cannot run; "
            f"its default recipe is '{device.recipe}'"
        )
    needy = [name for name, step in plan.passes if step.needs_data]
    if needy and data is None:
        raise PlanishError(f"recipe '{plan.name}' needs data for {listed(needy)}; give --data")
    prepared = _prepare(model, weights, inputs, data, test_data, length, any(step.trains for _, step in plan.passes))
    original = prepared.model
    if dry_run:
        found = forecasts.forecast(original, plan.passes, prepared.data, measure.peak_memory())
        return {"model": model, "target": target, "recipe": plan.name, **dataclasses.asdict(found)}
    if original.mapped:  # its weights stay in their files: what a block takes must not stay either
        memory.return_freed()
    program_file.check(original.program(), model)  # a model that cannot be stored is refused now, not after the work
    test = prepared.test if prepared.test is not None and prepared.test.labels is not None else None
    accuracy: dict[str, Any] | None = None
    if (
        test is not None and test.labels is not None
    ):  # first, so that outputs that are no scores are refused before the work
        accuracy = {"original": top1(predict(original, test.inputs), test.labels), "n": test.n}
    samples = prepared.test or prepared.data
    if samples is not None and not accuracy and evaluation.is_causal(original):
        evaluation.perplexity(evaluation.language(original), _windows(samples)[:1])  # refused now, as above
    generator = torch.Generator().manual_seed(seed)

    def given() -> dict[str, Any]:
        data_in = None if prepared.data is None else journals.digest(prepared.data.inputs, prepared.data.labels)
        return {"planish": __version__, "model": journals.model_digest(original), "data": data_in, "recipe": recipes.dump(plan), "target": target, "seed": seed, "torch": torch.__version__, "threads": torch.get_num_threads()}  # fmt: skip

    with journals.opened(output, given, force, original) as journal:
        result = original
        for index, (name, step) in enumerate(plan.passes):
            say(f"{name}")
            own = journal.section(f"{index + 1:02d}")
            result = step.apply(result, Context(original, prepared.data, device, generator, _milliseconds, own))
            journal.spill(result.graph)
            result = dataclasses.replace(result, mapped=tuple(journal.maps))
        if accuracy is not None and test is not None and test.labels is not None:
            accuracy["compressed"] = top1(predict(result, test.inputs), test.labels)
        quality = None if samples is None or accuracy else _quality(original, result, samples)
        if quality is not None:
            quality["on"] = "calibration data" if samples is prepared.data else "test data"
        built = compressed_model.build(
            result,
            original,
            recipes.dump(plan),
            target,
            _samples(original, samples),
            accuracy,
            __version__,
            quality,
        )
        if output is not None:
            built.save(output, force)
    manifest = built.manifest
    return {
        "model": model,
        "target": target,
        "recipe": plan.name,
        **manifest["compressed"],
        "original": manifest["original"],
        **({"accuracy": accuracy} if accuracy else {}),
        **({"quality": quality} if quality else {}),
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": measure.peak_memory(),
    }


def export(
    model: str,
    *,
    target: str = "host",
    format: str | None = None,
    output: Path | str,
    data: str | None = None,
    weights: Path | None = None,
    inputs: Mapping[str, Input] | None = None,
    budget: str | None = None,
    package: Sequence[str] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Write the artifact of a compressed model, an ONNX file (float or QDQ), an int8 .tflite file or any other MODEL for a device.

    `budget`, e.g. 'flash=256K,ram=64K,latency=20ms', is for microcontrollers: weights are narrowed and first stages cut into patches
    until the network keeps it. `package` adds the sources of format c as an 'arduino' library or a 'zephyr' module. Returns the keys of `planish export --json`. Raises PlanishError, having written nothing.
    """
    output = Path(output)
    files.check_output(output, force)
    _keep_source(model, output)
    device = targets.load(target)
    kind = format or device.format
    writer = plugins.create(f"{__package__}.export", Format, kind, "format")
    limits = None if budget is None else budgets.parse(budget)
    if limits is not None and kind != "c":
        raise PlanishError(f"--budget is for format c, in which the network itself is fitted; '{kind}' was asked for")
    packages.check(package, kind)
    samples = load_data(data) if data else None
    with tempfile.TemporaryDirectory() as scratch:
        source, origin = _source(model, weights, inputs, samples, Path(scratch), writer.reads(device))
        if limits is not None:
            source, origin["budget"] = budgets.fit(source, device, limits)
            if data is None and "recipe" not in origin:
                origin["budget"]["samples"] = "random"
            device = budgets.limited(device, limits)
        with files.new_folder(output, force) as folder:
            written = writer.write(source, device, folder)
            packages.write(package, folder, device, __version__)
            manifest = _finish(folder, source, origin, device, kind, written)
            proof = _on_device(folder, manifest, device) if device.kind == "mcu" and kind == "c" else {}
    return {
        "artifact": str(output),
        "format": kind,
        "target": target,
        "files": sorted(manifest["files"]),
        "bytes": sum(f["bytes"] for f in manifest["files"].values()),
        **_known({"flash_bytes": written.flash_bytes, "ram_bytes": written.ram_bytes}),
        **_known({"budget": manifest.get("budget")}),
        **{k: v for k, v in proof.items() if k != "warnings"},
        "warnings": [*manifest["warnings"], *proof.get("warnings", [])],
    }


def verify(artifact: Path, *, runtime: str | None = None, threads: int = 1) -> dict[str, Any]:
    """Check every file's hash and replay the golden inputs on the runtime; here and below also an address, serial://PORT.

    Returns {ok, exact, max_error, bound, runtime, hashes}; `max_error` is the largest absolute difference of an output to the
    answers that the artifact carries, `bound` the difference that its format allows.
    """
    item, hashes = _whole(artifact)
    bound = float(item.manifest["max_error"])
    name = runtime or _default_runtime(item)
    golden = item.golden()
    feeds = {k.removeprefix("input."): v for k, v in golden.items() if k.startswith("input.")}
    with _open(item, name, threads) as session:
        answers = session.run(feeds)
    worst = max(
        _difference(answers[k.removeprefix("expected.")], v) for k, v in golden.items() if k.startswith("expected.")
    )
    return {
        "ok": worst <= bound,
        "exact": worst == 0,
        "max_error": worst if np.isfinite(worst) else None,
        "bound": bound,
        "runtime": name,
        "hashes": hashes,
    }


def profile(
    artifact: Path, *, runtime: str | None = None, runs: int = 100, warmup: int = 10, threads: int = 1
) -> dict[str, Any]:
    """Measure an artifact (or an .onnx or .tflite file, exported for the host first), after `verify`: a wrong answer is not timed."""
    if artifact.suffix in (".onnx", ".tflite"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "artifact"
            export(str(artifact), output=folder)
            return profile(folder, runtime=runtime, runs=runs, warmup=warmup, threads=threads)
    checked = verify(artifact, runtime=runtime, threads=threads)
    if not checked["ok"]:
        raise PlanishError(
            f"artifact '{artifact}' answers wrongly on '{checked['runtime']}': error {checked['max_error']:.6g}, "
            f"at most {checked['bound']:.6g} is allowed; not timed"
        )
    item = artifacts.load(artifact)
    golden = item.golden()
    feeds = {k.removeprefix("input."): v[:1] for k, v in golden.items() if k.startswith("input.")}
    with _open(item, checked["runtime"], threads) as session:
        found = session.profile(feeds, runs, warmup)
    return _report(found, item)


def run(artifact: Path, inputs: str, *, runtime: str | None = None, threads: int = 1) -> dict[str, np.ndarray]:
    """Outputs by name for the samples in `inputs` (a data file or `file.py:loader`)."""
    item, _ = _whole(artifact)
    feeds = _fitting(item, load_data(inputs))
    with _open(item, runtime or _default_runtime(item), threads) as session:
        return session.run(feeds.inputs)


def evaluate(
    model: str,
    *,
    data: str | None = None,
    weights: Path | None = None,
    inputs: Mapping[str, Input] | None = None,
    length: int | None = None,
    runtime: str | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """How good a model, a compressed model or an artifact is: {metric, value, n, runtime}.

    Perplexity of a causal language model on a text file or rows of tokens (windows of `length`), accuracy of another model on
    labelled data. Without data: the cosine between its outputs and the original model's, on the golden samples that it
    carries; for a causal model also `kl` and `agreement` of the next token. A C artifact is evaluated as compiled for this
    machine, which gives the device's own integers; name --runtime emulator to run the firmware instead.
    """
    with _opened(model, data, weights, inputs, length, runtime, threads) as found:
        if found.data is not None:
            score = _score(found, found.data)
            if score is None:
                raise PlanishError(
                    f"data '{data}' has no 'labels', which accuracy needs; leave --data out for closeness to the original"
                )
        else:
            score = _to_original(found)
            if score is None:
                raise PlanishError(f"'{model}' carries no answers of an original model to compare with; give --data")
        return {**score, "runtime": found.runtime}


def generate(
    model: str,
    *,
    prompt: str,
    tokens: int = 64,
    weights: Path | None = None,
    inputs: Mapping[str, Input] | None = None,
    runtime: str | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """The most likely text behind a prompt, through the key/value cache: {text, tokens, prompt_tokens, tokens_per_second, runtime}."""
    with _opened(model, None, weights, inputs, None, runtime, threads) as found:
        if found.language is None:
            raise PlanishError(f"'{model}' is no causal language model; it takes {listed(found.inputs, 6)}")
        if found.text is None:
            raise PlanishError(f"'{model}' carries no tokenizer.json, which turns a prompt into tokens")
        made = language.generate(found.language, found.text, prompt, tokens, found.greedy)
    return {
        "text": made.text,
        "tokens": made.tokens,
        "prompt_tokens": made.prompt_tokens,
        "tokens_per_second": made.per_second,
        "runtime": found.runtime,
    }


def inspect(
    model: str,
    *,
    data: str | None = None,
    weights: Path | None = None,
    inputs: Mapping[str, Input] | None = None,
    length: int | None = None,
    samples: int = 16,
) -> dict[str, Any]:
    """How good a model or compressed folder is; size, work, weights and, with data, outliers and sensitivity of every layer.

    Returns {model, params, macs, bytes, quality, samples, layers: [...], attention: [...]}; what is not known is left out. `quality` is
    what `evaluate` says: perplexity or accuracy on the data, else the closeness of a compressed model to its original.
    """
    manifest = Path(model) / "manifest.json"
    if manifest.is_file() and files.read_json(manifest).get("format") != "compressed":
        raise PlanishError(
            f"'{model}' is an artifact; inspect reads models and compressed folders, profile shows layers"
        )
    with _opened(model, data, weights, inputs, length, None, 1) as opened:
        traced, given = opened.traced, opened.data
        assert traced is not None  # only an artifact has none
        scored = given.take(slice(_few(given))) if given and opened.language else given
        quality = _to_original(opened) if scored is None else _score(opened, scored)
    given = given.sample(samples, torch.Generator().manual_seed(0)) if given else None
    found = diagnostics.inspect(traced, list(given.batches(traced, 4)) if given else ())
    return {
        "model": model,
        **compressed_model.summary(traced),
        **({"quality": quality} if quality else {}),
        "samples": given.n if given else 0,
        "layers": [_figures(row) for row in found.layers],
        "attention": [_figures(row) for row in found.attention],
    }


@dataclass(frozen=True)
class _Opened:
    """A model or artifact that is ready to answer."""

    run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    inputs: list[str]
    runtime: str
    data: Data | None
    golden: Mapping[str, np.ndarray]
    language: evaluation.Language | None
    """set for a causal language model"""
    text: Text | None
    traced: Model | None = None
    """unless it is an artifact"""
    greedy: Callable[[int], Greedy | None] = lambda capacity: None
    """a faster way to continue a text of so many tokens"""


@contextlib.contextmanager
def _opened(
    spec: str,
    data: str | None,
    weights: Path | None,
    inputs: Mapping[str, Input] | None,
    length: int | None,
    runtime: str | None,
    threads: int,
) -> Iterator[_Opened]:
    """The model with its data checked; an artifact on a runtime, everything else in PyTorch."""
    folder = Path(spec)
    if (folder / "manifest.json").is_file() and files.read_json(folder / "manifest.json").get("format") != "compressed":
        item, _ = _whole(folder)
        name = runtime or ("c" if item.format == "c" else _default_runtime(item))
        given = None
        if data is not None:
            given = language.read(data, item, length) if text.is_text(data) else _fitting(item, load_data(data))
        with _open(item, name, threads) as session:
            causal = language.of_session(item, session) if language.is_causal(item) else None
            names = [i["name"] for i in item.inputs]
            held = language.stored(item)
            yield _Opened(session.run, names, name, given, item.golden(), causal, held, greedy=session.greedy)
        return
    if runtime not in (None, "pt2"):
        raise PlanishError(f"'{spec}' is no artifact; it runs on 'pt2' only, not on '{runtime}'")
    golden = dict(compressed_model.load(folder).golden) if (folder / "manifest.json").is_file() else {}
    traced, given = _model_and_data(spec, weights, inputs, data, length)
    causal = evaluation.language(traced) if evaluation.is_causal(traced) else None
    names = [i.name for i in traced.inputs]
    yield _Opened(lambda x: predict(traced, x), names, "pt2", given, golden, causal, traced.text, traced)


def _model_and_data(
    spec: str,
    weights: Path | None,
    inputs: Mapping[str, Input] | None,
    data: str | None,
    length: int | None,
) -> tuple[Model, Data | None]:
    """A model and samples that fit it. Text becomes windows of `length` tokens by the model's own tokenizer."""
    is_text = data is not None and text.is_text(data)
    samples = load_data(data) if data is not None and not is_text else None
    model = loading.load(spec, weights, inputs, samples)
    if data is not None and is_text:
        samples = text.load(data, model, length)
    return model, check(samples, model.inputs) if samples else None


def _score(found: _Opened, data: Data) -> dict[str, Any] | None:
    """Accuracy where labels exist, perplexity of a causal model, None elsewhere."""
    if data.labels is not None:
        return {"metric": "accuracy", "value": top1(found.run(data.inputs), data.labels), "n": data.n}
    if found.language is not None:
        score = evaluation.perplexity(found.language, data.inputs["input_ids"])
        window = data.inputs["input_ids"].shape[1]
        return {"metric": "perplexity", "value": score.value, "n": score.n, "window": window}
    return None


def _to_original(found: _Opened) -> dict[str, Any] | None:
    """Closeness to the original model on the golden samples, None when there are no answers of one."""
    originals = {k.removeprefix("original."): v for k, v in found.golden.items() if k.startswith("original.")}
    if not originals:
        return None
    given = {k.removeprefix("input."): v for k, v in found.golden.items() if k.startswith("input.")}
    answers = found.run(given)
    report = {"metric": "cosine", "value": cosine(answers, originals), "n": len(next(iter(given.values())))}
    if found.language is None:
        return report
    first = found.language.outputs[0]
    scores = evaluation.of_scores(originals[first], answers[first])
    return {**report, "kl": scores.kl, "agreement": scores.agreement}


def _figures(row: Any) -> dict[str, Any]:
    """A row of the diagnosis as plain values, without what is not known."""
    found = _known(dataclasses.asdict(row))
    return {k: {str(b): e for b, e in v.items()} if k == "sensitivity" else _known(v) if isinstance(v, dict) else v for k, v in found.items()}  # fmt: skip


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference; infinite for another shape, and for NaN where a number was expected."""
    if got.shape != want.shape:
        return float("inf")
    a, b = got.astype(np.float64), want.astype(np.float64)
    apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))


def _keep_source(model: str, output: Path) -> None:
    """Raise PlanishError when writing the output would replace the model that it is made from."""
    source = Path(model).resolve()
    if source.exists() and (source == output.resolve() or output.resolve() in source.parents):
        raise PlanishError(f"output '{output}' is, or holds, the model '{model}'; choose another path")


def _prepare(
    spec: str,
    weights: Path | None,
    inputs: Mapping[str, Input] | None,
    data: str | None,
    test_data: str | None,
    length: int | None,
    trains: bool,
) -> Prepared:
    """Load model and data, check that they fit, and keep test samples apart when the recipe trains."""
    named = (data, test_data)
    samples, test = (load_data(d) if d and not text.is_text(d) else None for d in named)
    model = loading.load(spec, weights, inputs, samples or test)
    samples, test = (
        text.load(d, model, length) if d and text.is_text(d) else x for d, x in zip(named, (samples, test), strict=True)
    )
    samples = check(samples, model.inputs) if samples else None
    test = check(test, model.inputs) if test else samples
    if trains and test_data is None and samples is not None:
        split = max(1, round(samples.n * (1 - HELD_OUT)))
        samples, test = samples.take(slice(None, split)), samples.take(slice(split, None))
        say(f"no test data given: the last {test.n} samples are held out of training for the accuracy")
    return Prepared(model, samples, test if test is not None and test.n else None)


def _quality(original: Model, result: Model, samples: Data) -> dict[str, Any]:
    """What the report says beside accuracy: perplexity of a causal model and how close its next tokens are; the cosine of another."""
    if not evaluation.is_causal(original):
        batch = (
            evaluation.BATCH if any(i.dims for i in original.inputs) else 256
        )  # texts, of any length, take much memory
        value = cosine(*(predict(m, samples.inputs, batch) for m in (result, original)))
        return {"metric": "cosine", "original": 1.0, "compressed": value, "n": samples.n}
    both = evaluation.language(original), evaluation.language(result)
    before, after, close = evaluation.compare(*both, _windows(samples))
    figures = {"original": before.value, "compressed": after.value, "kl": close.kl, "agreement": close.agreement}
    return {"metric": "perplexity", **figures, "n": before.n, "window": samples.inputs["input_ids"].shape[1]}


def _windows(samples: Data) -> np.ndarray:
    """The first rows of tokens, as many as a report scores."""
    return samples.inputs["input_ids"][: _few(samples)]


def _few(samples: Data) -> int:
    """How many rows of tokens a report scores."""
    return max(1, SCORED // samples.inputs["input_ids"].shape[1])


def _milliseconds(model: Model, inputs: Mapping[str, np.ndarray]) -> float:
    """Median time of a model in ONNX Runtime on one thread of this machine, written as export writes it."""
    proto = lowered(to_onnx(model, lower=False))
    accuracy_levels.choose(proto, inputs)
    session = ort.create(proto.SerializeToString(), 1)
    return measure.latency(lambda: session.run(None, dict(inputs)), 50, 10).p50


def _samples(model: Model, data: Data | None) -> dict[str, np.ndarray]:
    """The first samples of the data; without data, seeded noise of the input shapes: tokens of the vocabulary, masks of ones, other integers 0."""
    count = GOLDEN if model.batched else model.inputs[0].shape[0]
    if data is not None and (model.batched or data.n >= count):
        return {i.name: _short(i, data.inputs[i.name][:count]) for i in model.inputs if i.name in data.inputs}
    generator = np.random.default_rng(0)
    given = [i for i in model.inputs if not i.state]
    shapes = {i.name: ((count, *i.shape[1:]) if model.batched else i.shape, i.dtype) for i in given}
    rows = _vocabulary(model)

    def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        if dtype.is_floating_point:
            return generator.standard_normal(shape, np.float32)
        if name == MASK:
            return np.ones(shape, np.int64)
        return generator.integers(0, rows.get(name, 1), shape)

    kinds = {n: torch.empty(0, dtype=d).numpy().dtype for n, (_, d) in shapes.items()}
    return {n: drawn(n, shape, dtype).astype(kinds[n]) for n, (shape, dtype) in shapes.items()}


def _vocabulary(model: Model) -> dict[str, int]:
    """Rows of the table that an integer input looks up, by input name."""
    lookups = [n for n in model.graph.graph.nodes if layers.op(n) == "aten.embedding" and layers.is_constant(n.args[0])]
    return {
        str(n.args[1].target): len(layers.read(model.graph, n.args[0]))
        for n in lookups
        if n.args[1].op == "placeholder"
    }


def _short(item: Input, values: np.ndarray) -> np.ndarray:
    """Golden samples (n, ...) of an input, cut to a few tokens along its dynamic dimensions."""
    return values[tuple(slice(None, GOLDEN_LENGTH if item.dim(k) else None) for k in range(values.ndim))]


def _source(
    spec: str,
    weights: Path | None,
    inputs: Mapping[str, Input] | None,
    data: Data | None,
    scratch: Path,
    graph: bool = True,
) -> tuple[Source, dict[str, Any]]:
    """What to export, and what the manifest says of its origin. Without `graph` a program stays one (export/interface.py)."""
    path = Path(spec)
    name = "".join(c if c.isalnum() else "_" for c in (path.stem if path.suffix else path.name) or "model").strip("_")
    name = name if name and name[0].isalpha() else f"model_{name}"
    if path.suffix in (".onnx", ".tflite"):
        proto = onnx_file.read(path) if path.suffix == ".onnx" else tflite_import.load(path)
        samples = check(data, _onnx_inputs(proto)).inputs if data else _noise(proto, spec)
        return Source(proto, {k: v[:GOLDEN] for k, v in samples.items()}, name), {"model": spec}
    if (path / "manifest.json").is_file():
        if data is not None or weights is not None or inputs:
            raise PlanishError(
                f"'{spec}' carries its own weights and samples; --data, --weights and --input do not apply"
            )
        item = compressed_model.load(path)
        golden = {k.removeprefix("input."): v for k, v in item.golden.items() if k.startswith("input.")}
        kept = ("model", "recipe", "original", "compressed", "accuracy", "quality", "receipt")
        origin: dict[str, Any] = {k: item.manifest.get(k) for k in kept}
        origin["text"] = item.model.text
        origin["golden"] = {k: v for k, v in item.golden.items() if not k.startswith("input.")}
        return _graphs(item.model, golden, name, path / compressed_model.PROGRAM, graph), origin
    model = loading.load(spec, weights, inputs, data)
    samples = check(data, model.inputs) if data else None
    program = scratch / "model.pt2"
    program_file.save(model.program(), program)
    return _graphs(model, _samples(model, samples), name, program, graph), {"model": spec, "text": model.text}


def _graphs(model: Model, golden: Mapping[str, np.ndarray], name: str, program: Path, wanted: bool) -> Source:
    """The model as ONNX, with its fused ops lowered and, where it has any, as they are; its interface alone where that is not `wanted`."""
    if not wanted:
        return Source(interface(model), golden, name, program, origin=model.origin, macs=model_cost.macs(model))
    graph = to_onnx(model, lower=False)
    made = lowered(graph)
    size = sum(len(i.raw_data) for i in made.graph.initializer)
    if size > LARGEST:
        raise PlanishError(
            f"'{model.source}' takes {size:,} bytes as ONNX; a file of which holds at most 2 GiB; compress it to fewer bits first"
        )
    return Source(made, golden, name, program, graph if made is not graph else None, origin=model.origin)


def _noise(model: onnx.ModelProto, spec: str) -> dict[str, np.ndarray]:
    """Seeded golden samples for an ONNX file that came without data."""
    generator = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for item in _onnx_inputs(model):
        if any(d <= 0 for d in item.shape[1:]):
            raise PlanishError(
                f"'{spec}': input '{item.name}' has shape {_dims(item.shape)}; only the batch may be dynamic: fix the other dimensions"
            )
        full = (item.shape[0] if item.shape and item.shape[0] > 0 else GOLDEN, *item.shape[1:])
        noise = generator.standard_normal(full)
        values = noise if item.dtype.is_floating_point else np.rint(noise * 32 + 64).clip(0, 127)
        found[item.name] = values.astype(torch.empty(0, dtype=item.dtype).numpy().dtype)
    return found


def _dims(shape: Sequence[int]) -> str:
    """'(n, 3, ?, ?)': a dynamic dimension is a question mark."""
    return "(" + ", ".join(["n", *("?" if d <= 0 else str(d) for d in shape[1:])]) + ")"


def _onnx_inputs(model: onnx.ModelProto) -> list[Input]:
    """The file's inputs; a dynamic dimension is 0."""
    weights = {i.name for i in model.graph.initializer}
    return [
        Input(
            v.name,
            tuple(d.dim_value for d in v.type.tensor_type.shape.dim),
            torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type))).dtype,
        )
        for v in model.graph.input
        if v.name not in weights
    ]


def _finish(
    folder: Path, source: Source, origin: dict[str, Any], device: Target, kind: str, written: Written
) -> dict[str, Any]:
    """Add golden.safetensors and manifest.json to a folder that a format has filled."""
    stored = origin.pop("golden", {})
    runtime = None
    if source.macs is None:
        runtime = ort.run(ort.create(source.onnx.SerializeToString(), 1), source.golden_inputs)
    answers = runtime if written.answers is None else dict(written.answers)
    assert answers is not None
    golden = {f"input.{k}": v for k, v in source.golden_inputs.items()}
    golden |= {f"expected.{k}": v for k, v in answers.items()}
    golden |= {k: v for k, v in stored.items() if k.startswith("original.")}
    compressed = {k.removeprefix("expected."): v for k, v in stored.items() if k.startswith("expected.")}
    differences = {} if runtime is None else {"onnxruntime": _worst(answers, runtime)}
    warnings = list(written.warnings)
    if compressed:
        differences["compressed_program"] = _worst(answers, compressed)
        if differences["compressed_program"] > FAR:
            warnings.append(
                f"on the golden samples the artifact is {differences['compressed_program']:.1%} of the largest output away "
                "from the compressed program in PyTorch"
            )
    arrays = {k: np.ascontiguousarray(v) for k, v in sorted(golden.items())}
    (folder / "golden.safetensors").write_bytes(safetensors.numpy.save(arrays))
    how = origin.pop("text", None)
    said = None if how is None else language.store(how, folder)
    listing = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": kind,
        "format_version": artifacts.FORMAT_VERSION,
        "planish": __version__,
        "name": source.name,
        "target": device.name,
        "inputs": written.inputs,
        "outputs": written.outputs,
        "macs": cost.macs(source.onnx) if source.macs is None else dict(source.macs),
        "max_error": written.max_error,
        "warnings": warnings,
        "golden_differences": differences,
        "details": dict(written.details),
        **_known({"flash_bytes": written.flash_bytes, "ram_bytes": written.ram_bytes}),
        **_known({"text": said, "states": metadata.get(source.onnx, metadata.STATES) or None}),
        **origin,
        "files": {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in listing},
    }
    (folder / "manifest.json").write_text(files.to_json(manifest), encoding="utf-8")
    return manifest


def _on_device(folder: Path, manifest: dict[str, Any], device: Target) -> dict[str, Any]:
    """What one run of the firmware in the emulator says: arena, stack, instructions and estimates; warnings where none is here.

    Raises PlanishError when its answers are not the golden ones: such an artifact is not kept.
    """
    item = Artifact(folder, manifest)
    memory_plan = manifest["details"]["memory"]
    known: dict[str, Any] = {"arena_bytes": memory_plan["arena"]}
    golden = item.golden()
    feeds = {k.removeprefix("input."): v[:1] for k, v in golden.items() if k.startswith("input.")}
    try:
        with _open(item, device.runtime, 1) as session:
            answers = session.run(feeds)
            found = session.profile(feeds, 1, 0)
    except Missing as error:
        return {**known, "warnings": [f"not run on '{device.name}': {error}"]}
    wrong = [k for k, v in answers.items() if not np.array_equal(v, golden[f"expected.{k}"][:1])]
    if wrong:
        raise PlanishError(
            f"the firmware for '{device.name}' gives wrong values for {listed(wrong)}; this is a defect of planish"
        )
    return known | _known(
        {
            "stack_bytes": found.stack_bytes,
            "instructions": found.instructions,
            "cycles_estimate": found.cycles_estimate,
            "latency_estimate_ms": found.latency_estimate_ms,
            "energy_estimate_uj": found.energy_estimate_uj,
        }
    )


def _worst(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> float:
    """Largest difference over the outputs that both have, each as a share of its largest value."""
    shared = {k: v for k, v in want.items() if k in got}  # a format may leave a counter out
    return max(_difference(got[k], v) / max(float(np.abs(v).max(initial=0.0)), 1e-30) for k, v in shared.items())


def _open(item: Artifact, name: str, threads: int) -> Session:
    """The artifact in the runtime called `name`, or on the device that an address like serial:///dev/ttyACM0 names."""
    if "://" in name:
        if not name.startswith(serial_line.SCHEME):
            raise PlanishError(f"'{name}' is no device that is reached from here; serial://PORT is accepted")
        runtime: Runtime = serial_line.SerialLine(name)
        name = "serial_line"
    else:
        runtime = plugins.create(f"{__package__}.runtimes", Runtime, name, "runtime")
    if item.format not in runtime.formats:
        raise PlanishError(
            f"runtime '{name}' runs {listed(runtime.formats)}; artifact '{item.folder}' has format '{item.format}'"
        )
    return runtime.open(item, threads)


def _whole(folder: Path) -> tuple[Artifact, dict[str, bool]]:
    """The artifact and its files, every hash checked."""
    item = artifacts.load(folder)
    hashes = item.check()
    broken = [n for n, same in hashes.items() if not same]
    if broken:
        raise PlanishError(f"artifact '{folder}': {listed(broken)} changed since it was written (SHA-256 differs)")
    return item, hashes


def _default_runtime(item: Artifact) -> str:
    """The target's own runtime; for an artifact in another format than the target's usual one, the format's own, else the first that runs it."""
    able = [n for n, kind in plugins.find(f"{__package__}.runtimes", Runtime).items() if item.format in kind.formats]
    usual = targets.load(item.target).runtime
    if not able:
        raise PlanishError(f"artifact '{item.folder}' has format '{item.format}', which no runtime here runs")
    return next(n for n in (usual, item.format, able[0]) if n in able)


def _fitting(item: Artifact, data: Data) -> Data:
    """The data in the order and dtypes of the artifact's inputs, checked as for a model."""
    return check(data, language.inputs(item))


def _report(found: Profile, item: Artifact) -> dict[str, Any]:
    """The keys of `planish profile --json`: what is not known for this artifact is left out."""
    report = _known(dataclasses.asdict(found))
    report["layers"] = [_known(dataclasses.asdict(layer)) for layer in found.layers]
    report["environment"] = dict(found.environment)
    report.setdefault("macs", sum(item.manifest["macs"].values()))
    return report


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}
