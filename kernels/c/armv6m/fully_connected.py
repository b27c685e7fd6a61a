"""fully_connected on Armv6-M: two outputs in one product on one row; several rows are the pixels of a 1 x 1 convolution."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import numpy as np

from ... import weights as codes
from ...op import Array, Call, Node
from .. import overlap
from ..version import Version
from . import conv2d, pairs, requantize

TAPS = {8: (2, 4, 8), 4: (16,), 2: (32,)}
"""inputs of a chunk, by the bits of a weight"""
COST = {2: 11, 4: 19, 8: 35, 16: 82, 32: 154}
"""instructions of a chunk"""
EXTRA_COST, EXTRA_CHECK = 10, 5
EXTRA_BYTE_COST = 3
"""instructions that a byte of flash for extra chunks must save in an inference"""
END = 0xFFFFFFFF
MOST_INPUTS, MOST_PAIRS = 128, 32
"""of a block, as in the C code: what is kept on the stack"""


@dataclass(frozen=True)
class Lanes:
    """Weights of pairs of outputs in one word."""

    bits: int
    taps: int
    chunks: int
    """of an output"""
    block_chunks: int
    """that are kept at a time"""
    block_pairs: int
    """of outputs that are worked on at a time"""
    weight: Array
    """uint32 (all,) in the order of blocks: of pairs, of chunks; pair, chunk, taps * bits / 16 words"""
    extra: Array | None
    """uint32 for every block and pair: (bytes to the chunk's words, weights)..., 2^32 - 1; None where there are none"""
    cost: float
    """instructions for one row, about, and what the flash of extra chunks is worth"""

    @property
    def parts(self) -> bool:
        """Whether there are several blocks of inputs."""
        return self.block_chunks < self.chunks


class FullyConnected(Version):
    """Weights without zero points."""

    op: ClassVar[str] = "fully_connected"
    features: ClassVar[tuple[str, ...]] = ("armv6m",)

    def call(self, node: Node) -> Call | None:
        """See Version."""
        if node.constants["weight_zero_point"].any() or min(node.inputs[0].bits, node.output.bits) != 8:
            return None
        rows = prod(node.inputs[0].shape[:-1])
        if rows > 1:
            return _as_convolution(node, rows)
        sums = requantize.of(node)
        if sums is None:
            return None
        outputs, depth = sums.weight.shape
        odd = outputs % 2
        width = codes.bits(sums.weight)
        lanes = min((lanes_of(sums.weight, width, taps) for taps in TAPS[width]), key=lambda x: x.cost)
        return Call(
            kernel="armv6m_fully_connected",
            sources=(requantize.SOURCE,),
            template="armv6m/fully_connected.c",
            headers=("armv6m/fully_connected.h",),
            defines={
                "WEIGHT_BITS": width,
                "TAPS": lanes.taps,
                "EXTRA": int(lanes.extra is not None),
                "SKIPS": int(width == 8 and lanes.chunks % (16 // lanes.taps) > 0),
                "PARTS": int(lanes.parts),
                **sums.scale.defines,
            },
            fields={
                "in_features": depth,
                "out_features": outputs,
                "block_chunks": lanes.block_chunks,
                "block_pairs": lanes.block_pairs,
                "scale": sums.scale.initializer,
            },
            arrays={
                "weight": lanes.weight,
                "channel": np.pad(sums.channel, ((0, odd), (0, 0)), mode="edge"),
                **({} if lanes.extra is None else {"extra": lanes.extra}),
            },
            comments={
                "weight": f"pairs of out {outputs}, chunk {lanes.chunks}, taps {lanes.taps} of in {depth}; {width} bits",
                "channel": f"out {outputs}: bias with x_zero_point folded in, word of the rescale",
                "extra": "for every pair (bytes to the chunk's words, weights)..., end",
            },
            # with one block of inputs all are read first, but for the last of an odd number of outputs
            overlap=None if lanes.parts or odd else overlap.least([outputs], [depth]),
        )


def _as_convolution(node: Node, rows: int) -> Call | None:
    """The call of a 1 x 1 convolution on an image of `rows` pixels."""
    depth, outputs = node.inputs[0].shape[-1], node.output.shape[-1]
    weight = node.constants["weight"].reshape(outputs, depth, 1, 1)
    window = {"kernel": (1, 1), "stride": (1, 1), "dilation": (1, 1), "pads": (0, 0, 0, 0)}
    image = replace(
        node,
        op="conv2d",
        inputs=(replace(node.inputs[0], shape=(1, depth, rows, 1)),),
        output=replace(node.output, shape=(1, outputs, rows, 1)),
        attributes={**node.attributes, **window, "groups": 1},
        constants={**node.constants, "weight": weight},
    )
    return conv2d.Conv2d().call(image)


def lanes_of(weight: Array, bits: int, taps: int) -> Lanes:
    """Weights int8 (outputs, k) as words of two outputs, of two inputs or more."""
    odd = len(weight) % 2
    filled = np.pad(weight.astype(np.int16), ((0, odd), (0, -weight.shape[1] % taps)))
    chunks = filled.reshape(len(filled) // 2, 2, -1, taps).transpose(0, 2, 1, 3).copy()  # (pairs, chunks, 2, taps)
    rows, count = chunks.shape[:2]
    block_chunks = min(count, MOST_INPUTS // taps)
    block_pairs = MOST_PAIRS if block_chunks < count else rows
    heavy = np.logical_not(pairs.fits(chunks).all(axis=2))  # (pairs, chunks)
    weights: list[Array] = []
    extra: list[int] = []
    entries = 0
    blocks = [(p, min(p + block_pairs, rows - odd)) for p in range(0, rows - odd, block_pairs)]
    blocks += [(rows - 1, rows)] if odd else []  # half a pair is a block of its own
    for (p0, p1), c0 in itertools.product(blocks, range(0, count, block_chunks)):
        block = chunks[p0:p1, c0 : c0 + block_chunks]
        for p in range(len(block)):
            for c in np.flatnonzero(heavy[p0 + p, c0 : c0 + block_chunks]):
                split = [pairs.parts(block[p, c, i]) for i in range(2)]
                block[p, c] = [x[0] for x in split]
                for i in range(1, max(len(x) for x in split)):
                    part = np.stack([x[i] if i < len(x) else np.zeros(taps, np.int16) for x in split])
                    extra += [int(c) * (taps + 1) * 4, *_words(part, bits).tolist()]
                    entries += 1
            extra.append(END)
        weights.append(_words(block, bits).reshape(-1))
    cost = float(rows * count * COST[taps])
    if entries:
        cost += entries * (COST[taps] + EXTRA_COST) + len(extra) * 4 * EXTRA_BYTE_COST
        cost += EXTRA_CHECK * (len(extra) - entries * (1 + taps * bits // 16))
    stored = np.array(extra, np.uint32) if entries else None
    return Lanes(bits, taps, count, block_chunks, block_pairs, np.concatenate(weights), stored, cost)


def _words(chunks: Array, bits: int) -> Array:
    """uint32 (..., taps * bits / 16) of weights (..., 2, taps): the first output's in the lower half of a word."""
    codes = chunks.astype(np.int64) + (1 << bits - 1)
    halves = codes.reshape(*codes.shape[:-1], -1, 16 // bits) << np.arange(
        0, 16, bits
    )  # (..., 2, words, taps of a word)
    sums = halves.sum(axis=-1)
    return (sums[..., 0, :] | sums[..., 1, :] << 16).astype(np.uint32)
