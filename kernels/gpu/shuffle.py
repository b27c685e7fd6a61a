"""The order in which low-bit weights are stored for tensor cores: 16 bytes a thread, taken apart by shifts and masks alone.

A weight (out, in) falls into tiles of 16 outputs and KT inputs, KT = 256 / bits: what the 32 threads of a warp read with one load of four
words each. Of every 16 x 16 square of a tile, thread 4 g + c holds the eight weights that a tensor core takes from it as its left operand
(PTX ISA, "Matrix Fragments for mma.m16n8k16", and the same for wgmma):

    row g + 8 r, column 8 h + 2 c + e        r, h, e in {0, 1}

Pair number v = 4 * square + 2 h + r lies in word v // P of the thread, P = 16 / bits: e = 0 in the low half of the word, e = 1 in the high
half, each in the bits from bits * (v % P) on. One shift, one mask and one `or` of an exponent make a pair of 16-bit floats of two codes.

With `side_by_side` (four bits) both codes of pair p of a word are neighbours instead, e = 0 in the bits from 8 p on and e = 1 above it: byte
permutations take four neighbouring codes as selectors (kernels/triton/codebook.py).

What belongs to a row and a group (scales, zero points) is a word for rows g (low half) and g + 8 (high half): (tiles, groups, 8).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

ROWS, LANES, WORDS = 16, 32, 4
"""outputs of a tile; threads that read it; words of a thread"""
STEP = 128
"""inputs are padded to whole steps, so that every width has whole tiles"""


def tile_inputs(bits: int) -> int:
    """Inputs of a tile."""
    return 256 // bits


def shuffle(codes: torch.Tensor, bits: int, side_by_side: bool = False) -> torch.Tensor:
    """Words (out / 16, in / KT, 32, 4) int32 of codes (out, in) uint8 below 2^bits, padded with zeros to whole tiles and steps; bits 8, 4, 2."""
    out, inputs = codes.shape
    padded = F.pad(codes, (0, -inputs % STEP, 0, -out % ROWS))
    tiles, per = len(padded) // ROWS, 16 // bits
    view = padded.reshape(tiles, 2, 8, -1, tile_inputs(bits) // 16, 2, 4, 2)  # tile, r, g, tile_k, square, h, c, e
    pairs = (
        view.permute(0, 3, 2, 6, 4, 5, 1, 7).reshape(tiles, -1, LANES, WORDS, per, 2).int()
    )  # ..., g c, word, position, e
    return (pairs << _shifts(bits, side_by_side)).sum((-2, -1), dtype=torch.int32)


def unshuffle(words: torch.Tensor, bits: int, side_by_side: bool = False) -> torch.Tensor:
    """Codes (out padded, in padded) uint8 of words (out / 16, in / KT, 32, 4): the inverse of `shuffle`."""
    tiles = len(words)
    pairs = ((words[..., None, None] >> _shifts(bits, side_by_side)) & ((1 << bits) - 1)).to(
        torch.uint8
    )  # (tiles, tiles_k, 32, 4, per, 2)
    view = pairs.reshape(tiles, -1, 8, 4, tile_inputs(bits) // 16, 2, 2, 2)  # tile, tile_k, g, c, square, h, r, e
    return view.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(tiles * ROWS, -1)


def _shifts(bits: int, side_by_side: bool) -> torch.Tensor:
    """Bit of each position and e in a word, (16 / bits, 2) int32."""
    position = bits * torch.arange(16 // bits, dtype=torch.int32)[:, None]
    e = torch.arange(2, dtype=torch.int32)
    return 2 * position + bits * e if side_by_side else position + 16 * e


def halves(values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """Words (out / 16, groups, 8) int32 of values (out, groups), each rounded to float16; rows that pad hold `fill`."""
    padded = F.pad(values.float(), (0, 0, 0, -len(values) % ROWS), value=fill).half()
    pairs = padded.reshape(-1, 2, 8, values.shape[1]).permute(0, 3, 2, 1)  # tile, group, g, r
    return pairs.contiguous().view(torch.int32)[..., 0]


def unhalve(words: torch.Tensor) -> torch.Tensor:
    """Values (out padded, groups) float32 of words (out / 16, groups, 8): what `halves` rounded."""
    pairs = words.contiguous()[..., None].view(torch.float16)  # tile, group, g, r
    return pairs.permute(0, 3, 2, 1).reshape(-1, words.shape[1]).float()
