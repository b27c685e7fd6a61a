"""Codes of fewer than eight bits, packed into bytes.

A row of a weight (out, in) falls into groups of `group` columns, and each group starts at a byte. Inside a group the codes follow
each other as one little-endian stream of bits: code k holds the bits k * bits to k * bits + bits - 1, counted from the lowest bit
of the first byte. For 2, 4 and 8 bits a code never crosses a byte, the first one has the low bits, and this is the layout of
ONNX Runtime's MatMulNBits. For 3 bits eight codes take three bytes. Unused bits at the end of a group are zero.
"""

from __future__ import annotations

import torch

from ..common.errors import PlanishError, listed

BITS = (2, 3, 4, 8)
"""widths that `pack` knows"""


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
    if bits == 8:
        return codes.reshape(out, channels // group, group).contiguous()
    split = codes.reshape(out, channels // group, group)
    split = torch.nn.functional.pad(split, (0, -group % 8)).unflatten(-1, (-1, 8))  # (out, groups, eights, 8)
    packed = split.new_zeros((*split.shape[:-1], bits))  # eight codes fill `bits` bytes
    for code, byte, shift in _overlaps(bits):
        packed[..., byte] |= _shifted(split[..., code], shift)
    return packed.flatten(-2)[..., : group_bytes(group, bits)].contiguous()


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
    split = torch.nn.functional.pad(packed, (0, eights * bits - packed.shape[-1])).unflatten(-1, (eights, bits))
    codes = split.new_zeros((*split.shape[:-1], 8))  # (out, groups, eights, 8)
    for code, byte, shift in _overlaps(bits):
        codes[..., code] |= _shifted(split[..., byte], -shift) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :group].flatten(1)


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(code, byte, how far left the code is shifted in it) for every byte that holds a part of one of eight codes."""
    return [
        (code, byte, code * bits - 8 * byte)
        for code in range(8)
        for byte in range(bits)
        if code * bits < 8 * byte + 8 and (code + 1) * bits > 8 * byte
    ]


def _shifted(x: torch.Tensor, left: int) -> torch.Tensor:
    """uint8 shifted left, or right for a negative count; bits beyond the byte are lost."""
    return x << left if left >= 0 else x >> -left


def _check(bits: int) -> None:
    if bits not in BITS:
        raise PlanishError(f"codes of {bits} bits are not known; accepted: {', '.join(map(str, BITS))}")
