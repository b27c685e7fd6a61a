"""Weights, biases and factors in one stream, in the order in which the MVE kernels read them (layout: windows.h, fully_connected.c)."""

from __future__ import annotations

import numpy as np

from ...op import Array

STEP = 16
"""products of one instruction"""
BLOCK = 4
"""outputs whose sums are requantized together"""


def padded(weight: Array, bias: Array, rescale: Array) -> tuple[Array, Array, Array]:
    """int8 (blocks, 4, steps, 16), int32 (blocks, 4) and float32 (blocks, 4), zero where there is no output or input.

    `weight` int8 (out, k), `bias` int32 (out,), `rescale` float32 (out,).
    """
    outputs, depth = weight.shape
    blocks, steps = -(-outputs // BLOCK), -(-depth // STEP)
    codes = np.zeros((blocks * BLOCK, steps * STEP), np.int8)
    codes[:outputs, :depth] = weight
    more = (0, blocks * BLOCK - outputs)
    return (
        codes.reshape(blocks, BLOCK, steps, STEP),
        np.pad(bias.astype(np.int32), more).reshape(blocks, BLOCK),
        np.pad(rescale.astype(np.float32), more).reshape(blocks, BLOCK),
    )


def windows(weight: Array, bias: Array, rescale: Array) -> Array:
    """uint32 (words,): the stream of windows.h for `weight` int8 (out, k)."""
    codes, biases, factors = padded(weight, bias, rescale)
    parts: list[Array] = []
    for pair in (slice(0, BLOCK, 2), slice(1, BLOCK, 2)):
        # (blocks, words): two biases, then for every step the 16 weights of each of the two outputs
        parts += [biases[:, pair].view(np.uint32), words(codes[:, pair].transpose(0, 2, 1, 3))]
    return np.concatenate([*parts, factors.view(np.uint32)], axis=1).reshape(-1)


def words(values: Array) -> Array:
    """uint32 (blocks, words) for int8 (blocks, ...), the first in the lowest bits."""
    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint32)
