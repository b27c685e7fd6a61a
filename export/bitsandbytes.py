"""Format `bitsandbytes`: a Hugging Face folder whose linears are NF4, FP4 or int8 codes as bitsandbytes stores them.

    config.json         the original model's, with a quantization_config
    model.safetensors   codes as compress/bitsandbytes_file.py lists them; every other parameter as the program stores it
    ...                 generation_config.json, tokenizer_config.json, ... of the original folder, as they were

`AutoModelForCausalLM.from_pretrained` reads it where bitsandbytes and accelerate are installed. Only a program that is the original
architecture with other weights can be written so: what was written is read again and must give the program's own answers.

bitsandbytes cannot hold
- formats other than nf4, fp4 and 8 bits a row, nor 4-bit beside 8-bit layers: refused, naming the layer;
- outlier columns that are frozen or stored in 16 bits, the form of the LLM.int8() paper: bitsandbytes finds columns at every call and
  restores them from int8. Written, with a warning that says how far the outputs move.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.fx import Node

from ..common import files
from ..common.errors import PlanishError, listed
from ..compress import bitsandbytes_file as stored
from ..compress import hugging_face, layers, program_file
from ..compress.model import Model, from_program, predict
from ..kernels import codebooks
from ..targets.target import Target
from .format import Format, Source, Written
from .onnx import describe

CONFIG = "config.json"
CODEBOOK, OUTLIER, DYNAMIC = "planish.linear_codebook", "planish.linear_int8_outlier", "planish.linear_dynamic"
ACCEPTED = "nf4 and fp4 (recipes nf4, fp4) and 8 bits per row (recipes llm-int8, w8-dynamic)"
APART = {"4bit": 1e-3, "int8": 2e-2}
"""difference of the folder to the program, as a share of the largest output, that is rounding: an int8 code of an activation may flip"""
BOUND = {"4bit": 1e-4, "int8": 5e-2}
"""the same between planish and bitsandbytes in float32, which rounds activations to float16 before it takes them to int8"""
DTYPES = ("float32", "float16", "bfloat16")


class Bitsandbytes(Format):
    """A folder for transformers with bitsandbytes."""

    def reads(self, target: Target) -> bool:
        """Never: weights and their codes come from the program."""
        return False

    def write(self, source: Source, target: Target, folder: Path) -> Written:
        """Write config.json, model.safetensors and what travels with them.

        Raises PlanishError for a source that does not come from a Hugging Face folder, for a layer that bitsandbytes has no form of,
        and for a program that is more than the original architecture with other weights.
        """
        if source.program is None or source.origin is None or CONFIG not in source.origin:
            raise PlanishError(
                f"format 'bitsandbytes' writes a Hugging Face folder; '{source.name}' was not made from one, or by a planish that kept no config.json"
            )
        names = tuple(o.name for o in source.onnx.graph.output)
        program, mapped = program_file.open_mapped(source.program)
        model = replace(from_program(program, None, source.name), names=names, mapped=(mapped,))
        content = _content(source.origin[CONFIG], source.name)
        _, module = hugging_face.skeleton(content, Path(source.name))
        coded = _coded(model, module)
        dtype = _dtype(content)
        tensors: dict[str, torch.Tensor] = {}
        for layer, node in coded.items():
            tensors |= _parts(model, layer, node, dtype)
        tensors |= _others(model, module, coded)
        content |= _untied(module, {*tensors, *(f"{layer}.weight" for layer in coded)})
        content["quantization_config"], kind = _quantization(model, module, coded, dtype)
        for name, text in source.origin.items():
            (folder / name).write_text(files.to_json(content) if name == CONFIG else text, encoding="utf-8")
        safetensors.torch.save_file(tensors, folder / hugging_face.SINGLE, metadata={"format": "pt"})
        model.release()
        answers, warnings = _checked(model, folder, source.golden_inputs, kind)
        largest = max(float(np.abs(v).max(initial=0.0)) for v in answers.values())
        return Written(
            [describe(i) for i in source.onnx.graph.input],
            [describe(o) for o in source.onnx.graph.output if o.name in answers],
            details={"quantized_layers": sorted(coded), "packing": kind},
            warnings=(*_ragged(model, coded), *warnings),
            max_error=BOUND[kind] * largest,
            answers=answers,
        )


# ---- the configuration


def _content(text: str, name: str) -> dict[str, Any]:
    """The original config.json without what speaks of another form of the weights or of code beside them."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanishError(f"the config.json kept with '{name}' is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise PlanishError(f"the config.json kept with '{name}' holds a JSON {type(content).__name__}")
    return {k: v for k, v in content.items() if k not in ("quantization_config", "auto_map")}


def _dtype(content: Mapping[str, Any]) -> str:
    """The type in which transformers computes the model."""
    named = content.get("dtype", content.get("torch_dtype"))
    return named if named in DTYPES else "float32"


def _untied(module: torch.nn.Module, written: set[str]) -> dict[str, Any]:
    """What config.json must say besides when a head that shared the embedding's table has weights of its own now."""
    apart = any(len(written.intersection(names)) > 1 for names in _tied(module))
    return {"tie_word_embeddings": False} if apart else {}


def _tied(module: torch.nn.Module) -> list[list[str]]:
    """The names of each parameter."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def _quantization(
    model: Model, module: torch.nn.Module, coded: Mapping[str, Node], dtype: str
) -> tuple[dict[str, Any], str]:
    """The quantization_config, and the kind of packing. Raises PlanishError for layers that no single one describes."""
    four = [layer for layer, node in coded.items() if layers.op(node) == CODEBOOK]
    eight = [layer for layer in coded if layer not in four]
    if four and eight:
        raise PlanishError(
            f"'{model.source}' has layers of 4 bits ({listed(four, 1)}) and of 8 bits ({listed(eight, 1)}); a bitsandbytes folder holds one of them"
        )
    thresholds = sorted({_threshold(node) for node in coded.values()})
    if eight and len(thresholds) > 1:
        raise PlanishError(
            f"'{model.source}' has layers with the outlier thresholds {listed([f'{t:g}' for t in thresholds])}; a bitsandbytes folder has one"
        )
    first = coded[four[0]] if four else None
    nested = any(layers.argument(coded[n], "offset") is not None for n in four)
    said = {
        "quant_method": stored.METHOD,
        "load_in_4bit": bool(four),
        "load_in_8bit": bool(eight),
        "bnb_4bit_quant_type": layers.argument(first, "format") if first is not None else "fp4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": thresholds[0] if eight else stored.THRESHOLD,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": sorted(set(stored.linears(module)) - set(coded)),
    }
    return said, "4bit" if four else "int8"


# ---- the layers


def _coded(model: Model, module: torch.nn.Module) -> dict[str, Node]:
    """The nodes that are linears in a form of bitsandbytes, by layer. Raises PlanishError for a planish op in another form."""
    known, tied = stored.linears(module), _tied(module)
    found: dict[str, Node] = {}
    for node in model.graph.graph.nodes:
        op = layers.op(node)
        if not op.startswith("planish."):
            continue
        layer = _linear(layers.layer(node), known, tied)
        fault = _fault(model, node)
        if fault is None and layer not in known:
            fault = "is no linear of its architecture"
        if fault is not None:
            raise PlanishError(f"layer '{layer}' {fault}; format 'bitsandbytes' takes {ACCEPTED}")
        found[layer] = node
    if not found:
        raise PlanishError(f"'{model.source}' has no layer in low bits; format 'bitsandbytes' takes {ACCEPTED}")
    return found


def _linear(layer: str, known: Mapping[str, object], tied: Sequence[Sequence[str]]) -> str:
    """The name of a linear; codes of a head that was tied are named after the embedding whose table it read."""
    shared = [n.removesuffix(".weight") for names in tied for n in names if f"{layer}.weight" in names]
    return layer if layer in known else next((n for n in shared if n in known), layer)


def _fault(model: Model, node: Node) -> str | None:
    """Why bitsandbytes has no form of a planish op, None when it has one."""
    op = layers.op(node)
    if op == CODEBOOK:
        form = layers.argument(node, "format")
        return None if form in stored.TYPES else f"is stored as {form}"
    if op == DYNAMIC:
        bits, activations, group = (layers.argument(node, n) for n in ("bits", "activation_bits", "activation_group"))
        rows = layers.read(model.graph, layers.argument(node, "codes")).shape[1] == 1
        if (bits, activations, group) == (8, 8, 0) and rows:
            return None
        return f"has weights of {bits} bits {'per row' if rows else 'in groups'}, activations of {activations} bits {'per token' if group == 0 else 'otherwise than per token'}"
    return None if op == OUTLIER else f"has the op {op.removeprefix('planish.')}"


def _threshold(node: Node) -> float:
    return float(layers.argument(node, "threshold")) if layers.op(node) == OUTLIER else 0.0


def _parts(model: Model, layer: str, node: Node, dtype: str) -> dict[str, torch.Tensor]:
    """A layer's tensors by their names in the file."""
    op = layers.op(node)
    wanted = ("codes", "scale", "second_scale", "offset") if op == CODEBOOK else ("codes", "scale")
    given = {n: layers.argument(node, n) for n in wanted}
    t = {n: layers.read(model.graph, a) for n, a in given.items() if a is not None}
    if op == CODEBOOK:
        form, group = layers.argument(node, "format"), layers.argument(node, "group")
        made = stored.four_bits(codebooks.Coded(**t), form, group, dtype)
    else:
        codes = t["codes"] if op == OUTLIER else stored.signed(t["codes"])
        made = stored.int8(codes, t["scale"].flatten())
    return {f"{layer}.{name}": value for name, value in made.items()}


def _others(model: Model, module: torch.nn.Module, coded: Mapping[str, Node]) -> dict[str, torch.Tensor]:
    """The parameters that are no codes, as the program stores them.

    Raises PlanishError when the program has other parameters than the architecture: then it computes something else.
    """
    weights = {f"{layer}.weight" for layer in coded}
    wanted = {n: t for n, t in module.state_dict(keep_vars=True).items() if n not in weights}
    graph = model.graph
    read = {str(n.target): layers.read(graph, n) for n in graph.graph.nodes if n.op == "get_attr"}
    extra = [n for n, _ in graph.named_parameters() if n not in wanted]
    present = {id(t) for n, t in wanted.items() if n in read}
    absent = [n for n, t in wanted.items() if isinstance(t, torch.nn.Parameter) and n not in read and id(t) not in present]  # fmt: skip
    neutral = {n: _neutral(n, wanted[n]) for n in absent if wanted[n].ndim == 1}
    lacking = [n for n in absent if n not in neutral]
    other = [n for n, t in wanted.items() if n in read and read[n].shape != t.shape]
    faults = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (("more", extra), ("less", lacking), ("of another shape", other))
        if names
    ]
    if faults:
        raise PlanishError(
            f"'{model.source}' has other parameters than its architecture in transformers, which a bitsandbytes folder is read with: {'; '.join(faults)}"
        )
    buffers = {n: t.detach() for n, t in wanted.items() if n not in read and not isinstance(t, torch.nn.Parameter)}
    return buffers | neutral | {n: read[n].contiguous() for n in wanted if n in read}


def _neutral(name: str, like: torch.Tensor) -> torch.Tensor:
    """A gain of 1 or a shift of 0 for a norm whose own was folded into the next layers; `_checked` finds where that is not so."""
    return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0)


# ---- what the folder gives


def _checked(
    model: Model, folder: Path, inputs: Mapping[str, np.ndarray], kind: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The folder's answers, and what is to be said of them. Raises PlanishError when they are not the program's."""
    own = predict(model, inputs)
    again = predict(hugging_face.load(folder), inputs)
    found, wanted = _as_bitsandbytes(model)
    expected = predict(found, inputs) if wanted else own
    apart = _apart(again, expected)
    if not apart <= APART[kind]:
        raise PlanishError(
            f"'{model.source}' is more than its architecture with other weights: the bitsandbytes folder answers {apart:.2%} of the largest "
            "output away from it; passes that rewrite the graph or round activations besides cannot be written so"
        )
    if not wanted:
        return again, []
    exact = ", and restores from int8 what is stored in 16 bits" if "outlier_weight" in wanted else ""
    return again, [
        f"bitsandbytes finds outlier columns at every call{exact}: on the golden samples its outputs are {_apart(again, own):.2%} "
        "of the largest output away from the compressed program"
    ]


def _as_bitsandbytes(model: Model) -> tuple[Model, set[str]]:
    """The program with outlier columns found at every call and restored from int8; what it had otherwise."""
    made, had = model.editable(), set[str]()
    for node in made.graph.graph.nodes:
        if layers.op(node) != OUTLIER:
            continue
        had |= {n for n in ("columns", "outlier_weight") if layers.argument(node, n) is not None}
        had |= set() if layers.argument(node, "dynamic") else {"frozen"}
        for name, value in (("columns", None), ("outlier_weight", None), ("dynamic", True)):
            layers.set_argument(node, name, value)
    made.graph.recompile()
    return made, had


def _apart(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> float:
    """The largest difference of `got` to `want`, as a share of the largest value of that output."""
    shares = [np.abs(v - want[n]).max(initial=0.0) / max(float(np.abs(want[n]).max(initial=0.0)), 1e-30) for n, v in got.items()]  # fmt: skip
    return float(max(shares))


def _ragged(model: Model, coded: Mapping[str, Node]) -> list[str]:
    """A warning for layers that bitsandbytes' own kernels for a CPU do not decode."""
    found = []
    for layer, node in coded.items():
        if layers.op(node) == CODEBOOK:
            inputs = 2 * layers.read(model.graph, layers.argument(node, "codes")).shape[1]
            if inputs % layers.argument(node, "group"):
                found.append(f"{layer} ({inputs} inputs, blocks of {layers.argument(node, 'group')})")
    if not found:
        return []
    return [
        f"blocks of {len(found)} layers run over the end of a row, which bitsandbytes 0.50 may decode wrongly on a CPU: {listed(found)}"
    ]
