"""Codes of fewer than eight bits, packed into bytes.

A row of a weight (out, in) falls into groups of `group` columns, and each group starts at a byte. Inside a group the codes follow
each other as one little-endian stream of bits: code k holds the bits k * bits to k * bits + bits - 1, counted from the lowest bit
of the first byte. For 2, 4 and 8 bits a code never crosses a byte, the first one has the low bits, and this is the layout of
ONNX Runtime's MatMulNBits. For 3 bits eight codes take three bytes. Unused bits at the end of a group are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common.errors import PlanishError, listed

CHUNK = 1 << 17
"""weights that are looked at together, so that intermediate values stay in a core's cache"""
BITS = (2, 3, 4, 8)
"""widths that `pack` knows"""


def parts(weight: torch.Tensor) -> Iterator[slice]:
    """Runs of rows of a weight (out, in) that hold CHUNK values."""
    step = max(1, CHUNK // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))


def group_bytes(group: int, bits: int) -> int:
    """Bytes of one packed group."""
    return (group * bits + 7) // 8


def check_group(layer: str, channels: int, group: int) -> None:
    """Raise PlanishError, naming the layer, when `group` does not divide the row of `channels` weights."""
    if group < 1 or channels % group:
        fitting = [g for g in range(16, channels + 1) if channels % g == 0] or [channels]
        raise PlanishError(
            f"layer '{layer}': group {group} does not divide its {channels} input channels; these do: {listed(fitting, 8)}"
        )


def pack(codes: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Packed codes (out, in // group, ceil(group * bits / 8)) uint8 of `codes` (out, in) uint8 in 0 .. 2^bits - 1.

    Raises PlanishError for another width, another dtype, a group that does not divide, and codes beyond the range.
    """
    _check(bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise PlanishError(f"codes to pack are {codes.dtype} {tuple(codes.shape)}; uint8 (out, in) is accepted")
    out, channels = codes.shape
    if group < 1 or channels % group:
        raise PlanishError(f"group {group} does not divide {channels} codes a row")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise PlanishError(f"code {int(codes.max())} does not fit {bits} bits")
    split = codes.reshape(out, channels // group, group)
    if bits == 8:
        return split.contiguous()
    if group % 8:
        split = torch.nn.functional.pad(split, (0, -group % 8))
    words = split.contiguous().view(torch.int64)  # (out, groups, eights), a code in each byte
    for count in (1, 2, 4):
        words = words | words >> count * (8 - bits)
        if 2 * count * bits == 8:  # so many codes fill a byte: the lowest of a word that has a byte for each of them
            packed = words.view({2: torch.int16, 4: torch.int32}[2 * count]).to(torch.uint8)  # (out, groups, bytes)
            break
        words.bitwise_and_(_mask(bits, 2 * count))
    else:
        packed = words[..., None].view(torch.uint8)[..., :bits].flatten(-2)  # eight codes fill `bits` bytes
    return packed[..., : group_bytes(group, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Codes (out, groups * group) uint8 of `packed` (out, groups, ceil(group * bits / 8)): the inverse of `pack`."""
    _check(bits)
    if packed.dtype != torch.uint8 or packed.ndim != 3 or packed.shape[-1] != group_bytes(group, bits):
        raise PlanishError(
            f"packed codes are {packed.dtype} {tuple(packed.shape)}; uint8 (out, groups, {group_bytes(group, bits)}) is accepted"
        )
    if bits == 8:
        return packed.flatten(1)
    eights = -(-group // 8)
    if packed.shape[-1] != eights * bits:
        packed = torch.nn.functional.pad(packed, (0, eights * bits - packed.shape[-1]))
    split = torch.nn.functional.pad(packed.unflatten(-1, (eights, bits)), (0, 8 - bits))  # (out, groups, eights, 8)
    words = split.view(torch.int64)[..., 0]
    for count in (4, 2, 1):
        words = (words | words << count * (8 - bits)).bitwise_and_(_mask(bits, count))
    return words.view(torch.uint8)[..., :group].flatten(1)


def _mask(bits: int, count: int) -> int:
    """The bits of a 64-bit word, read little-endian, in which `count` codes follow each other from every `count`-th byte on."""
    return sum(((1 << bits * count) - 1) << 8 * start for start in range(0, 8, count))


def _check(bits: int) -> None:
    if bits not in BITS:
        raise PlanishError(f"codes of {bits} bits are not known; accepted: {', '.join(map(str, BITS))}")
