"""bitsandbytes checkpoints: linears of a Hugging Face folder that are stored as NF4, FP4 or LLM.int8() codes, read without float weights.

What `save_pretrained` writes for a quantized linear `L` (out, in), as bitsandbytes 0.42 to 0.50 store it:

    4 bits   L.weight                               codes, two a byte, the first in the high half, flattened row by row; uint8 (out * in / 2, 1),
                                                    or the same bytes under another element type (`bnb_4bit_quant_storage`)
             L.weight.absmax                        (blocks,) scale of each block; nested: one byte each
             L.weight.quant_map                     (16,) value of each code
             L.weight.nested_absmax                 nested: (blocks / 256, rounded up) float32
             L.weight.nested_quant_map              nested: (256,) value of each byte of absmax
             L.weight.quant_state.bitsandbytes__T   T = nf4 or fp4; JSON as uint8: quant_type, blocksize, shape, dtype; nested: nested_blocksize,
                                                    nested_offset, nested_dtype
    8 bits   L.weight                               (out, in) int8 in -127 .. 127
             L.SCB                                  (out,) float32, largest magnitude of each row of the float weight: weight = code * SCB / 127
             L.weight_format                        () uint8, 0: rows as they are; absent in old files

A 4-bit linear becomes `planish::linear_codebook` with the same bytes. An 8-bit one becomes `planish::linear_int8_outlier`, which finds its
outlier columns at every call as bitsandbytes does, or `planish::linear_dynamic` where the threshold of the folder is 0. bitsandbytes rounds
activations to float16 before it quantizes them; planish does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..common.errors import PlanishError, listed
from ..kernels import codebooks, linear_codebook, linear_dynamic, linear_int8_outlier
from .model import Entry

assert linear_codebook.LinearCodebook  # these imports define the ops
assert linear_dynamic.LinearDynamic

METHOD = "bitsandbytes"
THRESHOLD = 6.0
"""llm_int8_threshold where config.json names none"""
STATE = "weight.quant_state.bitsandbytes__"
TYPES: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
PARTS = {
    "4bit": (
        "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *(STATE + t for t in TYPES),
    ),
    "int8": ("SCB", "weight_format"),
}  # fmt: skip
"""what stands beside `weight`, by the kind of packing"""
ROWS = 0
"""the weight_format that is read: rows as they are"""
STEP = 1e-6
"""difference of a stored table of values to ours that is rounding"""


@dataclass(frozen=True)
class Packing:
    """What a folder's quantization_config says of all its linears."""

    kind: Literal["4bit", "int8"]
    threshold: float
    """int8: from which magnitude an activation is an outlier; 0: none is"""


def packing(config: Mapping[str, Any], where: Path) -> Packing | None:
    """The packing that a config.json names, None for a folder that is not quantized.

    Raises PlanishError for another method than bitsandbytes, and for fields of it that are malformed or have no stored form.
    """
    said = config.get("quantization_config")
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(said, dict) or method != METHOD:
        kind = f"as '{method:.40}'" if isinstance(method, str) else "by a method that is not named"
        raise PlanishError(
            f"'{where}' is quantized already, {kind} (quantization_config in its config.json); bitsandbytes is read"
        )
    four, eight = (said.get(n) is True for n in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        raise PlanishError(f"'{where}': quantization_config names neither or both of load_in_4bit and load_in_8bit")
    if eight and said.get("llm_int8_has_fp16_weight"):
        raise PlanishError(
            f"'{where}': llm_int8_has_fp16_weight keeps its weights in float16; take quantization_config out of config.json to read them"
        )
    threshold = said.get("llm_int8_threshold", THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise PlanishError(f"'{where}': llm_int8_threshold is {threshold!r:.40}; a number from 0 is accepted")
    return Packing("4bit" if four else "int8", float(threshold))


def place(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], how: Packing, rename: Callable[[str], str], folder: Path
) -> tuple[dict[str, torch.Tensor], tuple[Entry, ...]]:
    """Replace the quantized linears of `module`, in place; returns the tensors by the names of what stands there now, and receipt lines.

    `rename` gives a file's tensor its name in the module. Raises PlanishError for parts that are missing, malformed or of another shape,
    naming the layer, and for a folder without any quantized linear.
    """
    left = dict(tensors)
    owners = sorted({n.removesuffix(f".{part}") for n in tensors for part in PARTS[how.kind] if n.endswith(f".{part}")})
    if not owners:
        raise PlanishError(
            f"'{folder}' is said to be quantized by bitsandbytes, and none of its tensors is (…{', …'.join(PARTS[how.kind][:2])} are expected)"
        )
    entries = []
    for owner in owners:
        layer = rename(f"{owner}.weight").removesuffix(".weight")
        found = {part: left.pop(f"{owner}.{part}", None) for part in ("weight", *PARTS[how.kind])}
        try:
            made = _layer(module, layer, {p: t for p, t in found.items() if t is not None}, how)
        except PlanishError as error:
            raise PlanishError(f"'{folder}': layer '{owner}': {error}") from None
        bias = module.get_submodule(layer)._parameters.get("bias")
        made.register_parameter("bias", bias)
        module.set_submodule(layer, made)
        left |= {f"{layer}.{n}": t for n, t in made.named_buffers()}
        stored = sum(t.nbytes for _, t in made.named_buffers())
        size = 4 * made.outputs * made.inputs
        entries.append(Entry(f"{layer}.weight", "quantized", f"{made.what}, as stored by bitsandbytes", size, stored))
    return left, tuple(entries)


class _Stored(nn.Module):
    """A linear whose weight is codes: buffers `weight_<argument of the op>`, and the bias of the linear it replaces."""

    def __init__(self, outputs: int, inputs: int, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.outputs, self.inputs, self.what = outputs, inputs, what
        for name, value in tensors.items():
            self.register_buffer(f"weight_{name}", value)


class _Codebook(_Stored):
    """`planish::linear_codebook`."""

    def __init__(self, outputs: int, inputs: int, found: codebooks.Coded, name: codebooks.Name, group: int) -> None:
        tensors = {n: t for n, t in vars(found).items() if t is not None}
        nested = ", scales in 8 bits" if found.offset is not None else ""
        super().__init__(outputs, inputs, f"{name}, blocks of {group}{nested}", tensors)
        self.name, self.group = name, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        second, offset = (self._buffers.get(f"weight_{n}") for n in ("second_scale", "offset"))
        return torch.ops.planish.linear_codebook(
            x, self.weight_codes, self.weight_scale, second, offset, self.bias, self.name, self.group
        )


class _Outliers(_Stored):
    """`planish::linear_int8_outlier` with columns that are found at every call."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, threshold: float) -> None:
        what = f"LLM.int8(): int8 per row, outlier columns (|x| >= {threshold:g}) found at every call"
        super().__init__(codes.shape[0], codes.shape[1], what, {"codes": codes, "scale": scale})
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.planish.linear_int8_outlier(
            x, self.weight_codes, self.weight_scale, None, None, self.bias, self.threshold, True, -1
        )[0]


class _Plain(_Stored):
    """`planish::linear_dynamic`: int8 weights per row, int8 activations per token."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        shifted = (codes.view(torch.uint8) ^ 0x80)[:, None, :]  # (out, 1, in): code + 128
        what = "int8 per row, int8 activations per token"
        super().__init__(codes.shape[0], codes.shape[1], what, {"codes": shifted, "scale": scale[:, None]})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.planish.linear_dynamic(
            x, self.weight_codes, self.weight_scale, self.bias, 8, self.inputs, 8, linear_dynamic.PER_TOKEN
        )


def _layer(module: nn.Module, layer: str, found: Mapping[str, torch.Tensor], how: Packing) -> _Stored:
    """What takes the place of the linear `layer`. Raises PlanishError as `place` does, without the layer's name."""
    outputs, inputs = _shape(module, layer)
    if "weight" not in found:
        raise PlanishError("the files lack its 'weight'")
    return _four_bits(found, outputs, inputs) if how.kind == "4bit" else _int8(found, outputs, inputs, how.threshold)


def _shape(module: nn.Module, layer: str) -> tuple[int, int]:
    """(out, in) of the linear in the model; transformers' Conv1D, which stores its weight as (in, out), is one."""
    try:
        owner = module.get_submodule(layer)
    except AttributeError:
        raise PlanishError("its config.json describes no such layer") from None
    if layer not in linears(module):
        raise PlanishError(f"it is a {type(owner).__name__} in the model; linears are quantized by bitsandbytes")
    weight = owner.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(owner, nn.Linear) else (columns, rows)


def _part(found: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A part by name. Raises PlanishError when it is missing, and for another shape or type."""
    value = found.get(name)
    if value is None:
        raise PlanishError(f"the files lack its '{name}'")
    if tuple(value.shape) != shape or value.dtype != dtype:
        kinds = [str(d).removeprefix("torch.") for d in (value.dtype, dtype)]
        raise PlanishError(f"'{name}' is {kinds[0]} {tuple(value.shape)}; {kinds[1]} {shape} is expected")
    return value


def _finite(value: torch.Tensor, name: str) -> torch.Tensor:
    bad = int((~value.isfinite()).sum())
    if bad:
        raise PlanishError(f"'{name}' has {bad} NaN or Inf values")
    return value


# ---- 4 bits


def _four_bits(found: Mapping[str, torch.Tensor], outputs: int, inputs: int) -> _Codebook:
    form, state = _state(found)
    said = state.get("shape")
    if said != [outputs, inputs]:
        raise PlanishError(
            f"its quant_state names the shape {said!r:.60}; [{outputs}, {inputs}] is what config.json describes"
        )
    group = state.get("blocksize")
    if isinstance(group, bool) or group not in codebooks.BLOCKS:
        raise PlanishError(f"its blocksize is {group!r:.40}; {', '.join(map(str, codebooks.BLOCKS))} are accepted")
    if inputs % 2:
        raise PlanishError(f"it has {inputs} inputs; an even number is accepted, two weights a byte")
    codes = found["weight"]
    if codes.nbytes * 2 != outputs * inputs:
        raise PlanishError(
            f"its weight has {codes.nbytes} bytes; {outputs * inputs // 2} hold {outputs} x {inputs} codes"
        )
    codes = codes.reshape(-1).view(torch.uint8).reshape(outputs, -1)  # (out, in / 2)
    blocks = -(-outputs * inputs // group)
    _same_table(found, "weight.quant_map", codebooks.table(form))
    if "nested_offset" not in state and "weight.nested_absmax" not in found:
        return _Codebook(outputs, inputs, codebooks.Coded(codes, _scales(found, blocks)), form, group)
    if state.get("nested_blocksize") != codebooks.NESTED:
        raise PlanishError(f"its nested_blocksize is {state.get('nested_blocksize')!r:.40}; {codebooks.NESTED} is read")
    offset = state.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise PlanishError(f"its nested_offset is {offset!r:.40}; a number is expected")
    _same_table(found, "weight.nested_quant_map", codebooks.dynamic_map())
    scale = _part(found, "weight.absmax", (blocks,), torch.uint8)
    second = _part(found, "weight.nested_absmax", (-(-blocks // codebooks.NESTED),), torch.float32)
    made = codebooks.Coded(codes, scale, _finite(second, "weight.nested_absmax"), torch.tensor(float(offset)))
    return _Codebook(outputs, inputs, made, form, group)


def _state(found: Mapping[str, torch.Tensor]) -> tuple[Literal["nf4", "fp4"], dict[str, Any]]:
    """The type of the codes and what the JSON of the layer's quant_state says."""
    names: list[Literal["nf4", "fp4"]] = [t for t in TYPES if STATE + t in found]
    if len(names) != 1:
        problem = "lack its" if not names else "hold more than one"
        raise PlanishError(f"the files {problem} quant_state (…{STATE}nf4 or fp4)")
    stored = found[STATE + names[0]]
    if stored.dtype != torch.uint8 or stored.ndim != 1:
        raise PlanishError("its quant_state is no row of bytes")
    try:
        state = json.loads(bytes(stored.tolist()))
    except (ValueError, RecursionError) as error:
        raise PlanishError(f"its quant_state is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(state, dict):
        raise PlanishError(f"its quant_state is a JSON {type(state).__name__}; an object is expected")
    if state.get("quant_type") != names[0]:
        raise PlanishError(f"its quant_type is {state.get('quant_type')!r:.40} under the name '{names[0]}'")
    return names[0], state


def _scales(found: Mapping[str, torch.Tensor], blocks: int) -> torch.Tensor:
    """(blocks,) float32; some tools store them in 16 bits."""
    value = found.get("weight.absmax")
    if value is not None and value.dtype in (torch.float16, torch.bfloat16):
        found = {**found, "weight.absmax": value.float()}
    return _finite(_part(found, "weight.absmax", (blocks,), torch.float32), "weight.absmax")


def _same_table(found: Mapping[str, torch.Tensor], name: str, ours: torch.Tensor) -> None:
    """Raise PlanishError for codes that stand for other values than bitsandbytes' own."""
    stored = _part(found, name, tuple(ours.shape), torch.float32)
    if not torch.allclose(stored, ours, rtol=0, atol=STEP):
        raise PlanishError(f"'{name}' holds other values than those of bitsandbytes' {len(ours)} codes")


# ---- 8 bits


def _int8(found: Mapping[str, torch.Tensor], outputs: int, inputs: int, threshold: float) -> _Stored:
    form = found.get("weight_format")
    if form is not None and (form.numel() != 1 or int(form) != ROWS):
        raise PlanishError(
            f"its weight_format is {listed([str(v) for v in form.flatten().tolist()])}; 0 (rows as they are) is read: "
            "save the model again with bitsandbytes 0.45 or newer"
        )
    codes = _part(found, "weight", (outputs, inputs), torch.int8)
    largest = _finite(_part(found, "SCB", (outputs,), torch.float32), "SCB")
    scale = largest / linear_int8_outlier.TOP  # (out,)
    return _Outliers(codes, scale, threshold) if threshold else _Plain(codes, scale)


# ---- writing


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model in transformers that bitsandbytes can hold, by name."""
    from transformers.pytorch_utils import Conv1D

    return {n: m for n, m in module.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}


def four_bits(coded: codebooks.Coded, form: codebooks.Name, group: int, dtype: str) -> dict[str, torch.Tensor]:
    """What the file holds of a 4-bit linear, by the part's name; `dtype` is what bitsandbytes decodes to."""
    state: dict[str, Any] = {
        "quant_type": form,
        "blocksize": group,
        "dtype": dtype,
        "shape": [len(coded.codes), 2 * coded.codes.shape[1]],
    }
    found = {
        "weight": coded.codes.reshape(-1, 1).contiguous(),
        "weight.absmax": coded.scale.contiguous(),
        "weight.quant_map": codebooks.table(form) + 0.0,  # bitsandbytes has no -0
    }
    if coded.offset is not None:
        assert coded.second_scale is not None
        state |= {
            "nested_blocksize": codebooks.NESTED,
            "nested_dtype": "float32",
            "nested_offset": float(coded.offset),
        }
        found["weight.nested_absmax"] = coded.second_scale.contiguous()
        found["weight.nested_quant_map"] = codebooks.dynamic_map().clone()
    found[STATE + form] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found


def int8(codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the file holds of an 8-bit linear of codes (out, in) int8 and scale (out,), by the part's name."""
    return {
        "weight": codes.contiguous(),
        "SCB": largest(scale),
        "weight_format": torch.tensor(ROWS, dtype=torch.uint8),
    }


def signed(codes: torch.Tensor) -> torch.Tensor:
    """Codes (out, in) int8 of those of `planish::linear_dynamic` (out, 1, in) uint8, which are 128 more."""
    return (codes[:, 0, :] ^ 0x80).view(torch.int8)


def largest(scale: torch.Tensor) -> torch.Tensor:
    """SCB (rows,) float32 of scales (rows,) float32: a number whose 127th part is the scale, the roundest where several are.

    The inverse of how SCB is read, bit for bit, for every scale that came from one.
    """
    top = linear_int8_outlier.TOP
    first = scale * top
    below, above = (torch.nextafter(first, torch.full_like(first, v)) for v in (-math.inf, math.inf))
    best, zeros = first.clone(), torch.full_like(first, -1.0)
    for candidate in (first, below, above):
        fits = (candidate / top) == scale
        trailing = _trailing_zeros(candidate)
        better = fits & (trailing > zeros)
        best, zeros = torch.where(better, candidate, best), torch.where(better, trailing, zeros)
    return best


def _trailing_zeros(x: torch.Tensor) -> torch.Tensor:
    """How many of the last bits of each float32 are zero, as float32."""
    bits = x.contiguous().view(torch.int32)
    return torch.log2((bits & -bits).abs().clamp_min(1).float())
