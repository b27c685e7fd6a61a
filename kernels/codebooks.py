"""Four-bit codes into a table of 16 values, with one scale a block of weights: NF4, FP4, MXFP4 and NVFP4.

    weight = table[code] * scale of its block

Blocks are runs of `group` elements of the weight (out, in), flattened row by row.

format  table                                 group  scale of a block                    bytes: first element in the
nf4     quantiles of N(0, 1) (QLoRA, app. E)  64 *   largest magnitude, float32          high half
fp4     bitsandbytes' own float4              64 *   largest magnitude, float32          high half
mxfp4   E2M1                                  32     E8M0: 2^(byte - 127)                low half
nvfp4   E2M1                                  16     E4M3 byte * one float32 a tensor    low half

* or what bitsandbytes takes: 32 to 4096, a power of two. The last block may be shorter, and blocks may run over the end of a row.

nf4, fp4  Codes, bytes and values are those of bitsandbytes 0.50. `nest` stores the scales in one byte each (QLoRA, section 3, double
          quantization): scale = dynamic map[byte] * second scale of its 256 blocks + offset.
mxfp4     OCP Microscaling Formats v1.0, section 6.3: exponent = floor(log2(largest magnitude)) - 2, limited to -127..127; elements
          round to nearest, ties to even, and saturate at 6. An all-zero block gets the scale 1.
nvfp4     second scale = largest magnitude of the tensor / (6 * 448); block scale = E4M3(largest magnitude of the block / 6 /
          second scale), at least 2^-9; elements as in mxfp4.
E2M1      sign bit, then the index of 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ..common.errors import PlanishError
from .packing import CHUNK, parts

Name = Literal["nf4", "fp4", "mxfp4", "nvfp4"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (0.0, 1 / 16, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""in twelfths, in the order of the codes"""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""groups of nf4 and fp4"""
NESTED = 256
"""blocks that share a second scale"""
BIAS, LOWEST = 127, 2.0**-9
"""of the exponent of E8M0; least positive value of E4M3"""


@dataclass(frozen=True)
class Coded:
    """A weight (out, in) as stored."""

    codes: torch.Tensor
    """(out, in / 2) uint8, two codes a byte"""
    scale: torch.Tensor
    """(blocks,) float32; nested: (blocks,) uint8; mxfp4 and nvfp4: (out, in / group) uint8"""
    second_scale: torch.Tensor | None = None
    """nested: (blocks / 256, rounded up) float32; nvfp4: () float32"""
    offset: torch.Tensor | None = None
    """nested: () float32"""


@functools.cache
def table(name: str) -> torch.Tensor:
    """(16,) float32: the value of each code."""
    if name == "nf4":
        return torch.tensor(NF4)
    if name == "fp4":
        return torch.tensor([*FP4, *(-v for v in FP4)]) / 12
    return torch.tensor([*E2M1, *(-v for v in E2M1)])


@functools.cache
def dynamic_map() -> torch.Tensor:
    """(256,) float32, ascending: the 8-bit dynamic tree of Dettmers (2015), decades 1e-7 to 1 with 1 to 64 steps a decade."""
    positive: list[float] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive += (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-v for v in positive), 0.0, 1.0]))


@functools.cache
def scale_table(name: str) -> torch.Tensor:
    """(256,) float32: what a stored byte of a block's scale stands for. The NaN of E8M0 (255) and of E4M3 (127) is never stored."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    if name == "mxfp4":
        return bytes_.view(torch.float8_e8m0fnu).float()
    return bytes_.view(torch.float8_e4m3fn).float() if name == "nvfp4" else dynamic_map()


def encode(weight: torch.Tensor, name: Name, group: int, nested: bool = False, layer: str = "") -> Coded:
    """Quantize a weight (out, in). Raises PlanishError for an odd `in`, and for a group that the format does not take."""
    check(name, weight.shape[1], group, layer)
    if name == "mxfp4":
        return _mxfp4(weight)
    if name == "nvfp4":
        return _nvfp4(weight)
    coded = _bitsandbytes(weight, name, group)
    return nest(coded) if nested else coded


def check(name: str, inputs: int, group: int, layer: str = "") -> None:
    """Raise PlanishError for a layer of `inputs` columns that the format does not take."""
    if name in ("nf4", "fp4"):
        if group not in BLOCKS:
            raise PlanishError(f"{name}: group {group}; {', '.join(map(str, BLOCKS))} are accepted")
        if inputs % 2:
            raise PlanishError(
                f"layer '{layer}': {name} packs two weights a byte; it has {inputs} inputs, even is accepted"
            )
    elif inputs % group:
        raise PlanishError(
            f"layer '{layer}': {name} scales {group} inputs together; it has {inputs} inputs, a multiple of {group} is accepted"
        )


def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    second_scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    name: str,
    group: int,
) -> torch.Tensor:
    """The weight (out, in) float32; arguments as in `Coded`."""
    blocks = block_scales(scale, second_scale, offset, name).reshape(-1)
    return _values(codes.reshape(-1), blocks, name, group).reshape(len(codes), -1)


def lost(weight: torch.Tensor, coded: Coded, name: Name, group: int) -> float:
    """The sum of squares of what a weight (out, in) differs by from its codes; takes no memory of its size."""
    blocks = block_scales(coded.scale, coded.second_scale, coded.offset, name).reshape(-1)
    codes, flat, total = coded.codes.reshape(-1), weight.reshape(-1), 0.0
    for part in _runs(len(flat), group):
        values = _values(codes[part.start // 2 : part.stop // 2], blocks[part.start // group :], name, group)
        total += float(values.sub_(flat[part]).square_().sum())
    return total


def _runs(count: int, group: int) -> Iterator[slice]:
    """Runs of whole blocks among `count` values, the last one as short as it is."""
    step = CHUNK // group * group
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _values(codes: torch.Tensor, blocks: torch.Tensor, name: str, group: int) -> torch.Tensor:
    """(2 n,) float32 of bytes (n,) and the scales of their blocks; the last block may be short."""
    values = table(name).to(codes.device).index_select(0, unpack(codes, high_first(name)).int())
    whole = len(values) // group
    values[: whole * group].view(whole, group).mul_(blocks[:whole, None])
    if whole * group < len(values):
        values[whole * group :].mul_(blocks[whole])
    return values


def block_scales(
    scale: torch.Tensor, second_scale: torch.Tensor | None, offset: torch.Tensor | None, name: str
) -> torch.Tensor:
    """The float32 scale of each block, in the shape of `scale`."""
    if scale.dtype == torch.float32:
        return scale
    first = scale_table(name).to(scale.device)[scale.long()]
    if second_scale is None:
        return first
    if offset is None:
        return first * second_scale
    return first * second_scale.repeat_interleave(NESTED)[: len(first)] + offset


def high_first(name: str) -> bool:
    """Whether the first of two elements stands in the high half of the byte."""
    return name in ("nf4", "fp4")


def pack(codes: torch.Tensor, high: bool) -> torch.Tensor:
    """(..., n) codes below 16 -> (..., n / 2) bytes; `high`: the first element in the high half."""
    pairs = codes.to(torch.uint8).contiguous().view(torch.int16)  # little-endian: the first in the low half
    return (pairs << 4 | pairs >> 8 if high else pairs | pairs >> 4).to(torch.uint8)


def unpack(packed: torch.Tensor, high: bool) -> torch.Tensor:
    """The inverse of `pack`: (..., n / 2) -> (..., n)."""
    wide = packed.to(torch.int16).contiguous()
    return (wide >> 4 | wide << 8 if high else wide | wide << 4).bitwise_and_(0x0F0F).view(torch.uint8)


def nest(coded: Coded) -> Coded:
    """Store float32 scales (blocks,) in one byte each, as bitsandbytes' compress_statistics does."""
    offset = coded.scale.mean()
    centred = coded.scale - offset
    codes, second, steps = [], [], dynamic_map()
    for part in centred.split(NESTED):
        largest = part.abs().max()
        scaled = (part * (1 / largest.clamp_min(1e-38))).clamp(-1, 1)
        codes.append(torch.bucketize(scaled, (steps[:-1] + steps[1:]) / 2))
        second.append(largest)
    return Coded(coded.codes, torch.cat(codes).to(torch.uint8), torch.stack(second), offset)


def _bitsandbytes(weight: torch.Tensor, name: Name, group: int) -> Coded:
    """Scaled by the reciprocal of the block's largest magnitude; the last, shorter block by division, as bitsandbytes does."""
    flat = weight.reshape(-1)
    whole = flat.numel() // group * group
    scale = torch.empty(-(-flat.numel() // group))  # (blocks,)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8)
    for part in _runs(whole, group):
        blocks = flat[part].reshape(-1, group)
        largest = blocks.abs().amax(1)
        scaled = (blocks * largest.clamp_min(1e-38).reciprocal_()[:, None]).clamp_(-1, 1)
        codes[part.start // 2 : part.stop // 2] = pack(_nearest(scaled.reshape(-1), name), True)
        scale[part.start // group : part.stop // group] = largest
    if whole < flat.numel():
        scale[-1] = flat[whole:].abs().max().clamp_min(1e-38)
        codes[whole // 2 :] = pack(_nearest((flat[whole:] / scale[-1]).clamp(-1, 1), name), True)
    return Coded(codes.reshape(len(weight), -1), scale)


def _nearest(x: torch.Tensor, name: str) -> torch.Tensor:
    """The code of the nearest value of a table for each element of x; a tie goes to the smaller value.

    It counts the middles between values that lie below x, in steps from one code to the next: comparisons and sums go through
    memory in order, where a search would branch.
    """
    order = torch.argsort(table(name), stable=True)  # fp4 is not in order, and has two zeros
    ascending = table(name)[order]
    codes, above = torch.full_like(x, int(order[0])), torch.empty_like(x)
    for middle, step in zip(((ascending[:-1] + ascending[1:]) / 2).tolist(), order.diff().tolist(), strict=True):
        codes.add_(torch.gt(x, middle, out=above), alpha=step)
    return codes.to(torch.int16).to(torch.uint8)  # two conversions take a third of the time of one


def _mxfp4(weight: torch.Tensor) -> Coded:
    out, inputs = weight.shape
    scale = torch.empty(out, inputs // 32, dtype=torch.uint8)
    codes = torch.empty(out, inputs // 2, dtype=torch.uint8)
    for part in parts(weight):
        rows = weight[part]
        blocks = rows.reshape(len(rows), -1, 32)
        largest = blocks.abs().amax(-1)  # (rows, in / 32)
        _, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
        exponent = torch.where(largest > 0, exponent - 1 - 2, 0).clamp(-BIAS, BIAS)
        scaled = torch.ldexp(blocks, -exponent[..., None])
        codes[part], scale[part] = pack(e2m1(scaled).reshape(rows.shape), False), (exponent + BIAS).to(torch.uint8)
    return Coded(codes, scale)


def _nvfp4(weight: torch.Tensor) -> Coded:
    out, inputs = weight.shape
    low, high = torch.aminmax(weight)
    second = torch.maximum(-low, high) / (6 * 448)
    second = torch.where(second > 0, second, 1.0)
    scale = torch.empty(out, inputs // 16, dtype=torch.float8_e4m3fn)
    codes = torch.empty(out, inputs // 2, dtype=torch.uint8)
    for part in parts(weight):
        rows = weight[part]
        blocks = rows.reshape(len(rows), -1, 16)
        scale[part] = (blocks.abs().amax(-1) / 6 / second).clamp(LOWEST, 448).to(torch.float8_e4m3fn)
        scaled = blocks / (scale[part].float() * second)[..., None]
        codes[part] = pack(e2m1(scaled).reshape(rows.shape), False)
    return Coded(codes, scale.view(torch.uint8), second)


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (uint8, below 16) of x: round to nearest, ties to even, saturate at 6."""
    magnitude, above = x.abs(), torch.empty_like(x)
    code = torch.lt(x, 0, out=above) * 8
    for index in range(7):
        middle = (E2M1[index] + E2M1[index + 1]) / 2
        code += (torch.ge if index % 2 else torch.gt)(magnitude, middle, out=above)  # the even code gets the tie
    return code.to(torch.uint8)
