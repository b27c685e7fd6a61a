"""Codes of four bits to the 16-bit floats of a table, in registers, by byte permutations.

A byte permutation (`prmt`, PTX ISA) picks four bytes at once out of eight, by the low three bits of four nibbles: the stored codes are the
selectors. Where the top bit of a code is its sign (E2M1, FP4), eight magnitudes are two such tables, of low and of high
bytes; NF4's sixteen values are four, and the top bit chooses. A selector's own top bit asks for eight copies of the chosen byte's top
bit, which makes masks of codes' top bits. Interleaving low and high bytes makes pairs of floats.

Machine instructions a weight on the integer units, which do 64 a clock and multiprocessor, while 29 weights arrive from an H100's memory:
1.8 with signs, 2.6 for NF4. A look-up in shared memory would be one load a weight, at most 32 a clock, and an index beside it.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def loaded(table_ptr, TYPE: tl.constexpr):
    """The words of a table in TYPE out of (2 types, 2 bytes, 4 quarters) int32, low bytes and high bytes; None where there is none."""
    at = table_ptr + (0 if tl.float16 == TYPE else 8)
    low = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
    high = (tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7))
    return low, high


@triton.jit
def permute_bytes(a, b, selectors, GPU: tl.constexpr):
    """Byte i of the result is byte (nibble i of the selectors, below 8) of b a, a being the lower four; nibble + 8: its top bit, eight times."""
    if GPU:
        return libdevice.byte_perm(a, b, selectors)
    else:
        first = _byte(a, b, selectors) | (_byte(a, b, selectors >> 4) << 8)
        return first | (_byte(a, b, selectors >> 8) << 16) | (_byte(a, b, selectors >> 12) << 24)


@triton.jit
def _byte(a, b, selector):
    """One byte of it, for the interpreter."""
    byte = (tl.where((selector & 4) == 0, a, b) >> (8 * (selector & 3))) & 0xFF
    return tl.where((selector & 8) == 0, byte, (byte >> 7) * 0xFF)


@triton.jit
def _chosen(first, second, selectors, GPU: tl.constexpr):
    """Four bytes out of two words, the same for all."""
    a = tl.broadcast_to(first, selectors.shape)
    return permute_bytes(a, tl.broadcast_to(second, selectors.shape), selectors, GPU)


@triton.jit
def _four(q, top, table, SIGNED: tl.constexpr, GPU: tl.constexpr):
    """Two words of two floats each for the four codes in the low half of each word of q; `top` has ones in bytes whose code has its top bit."""
    if SIGNED:
        selectors = q & 0x7777
        low = _chosen(table[0][0], table[0][1], selectors, GPU)
        high = _chosen(table[1][0], table[1][1], selectors, GPU) | (top & -0x7F7F7F80)  # 0x80808080
    else:
        other = q ^ 0x8888  # what a permutation gives for codes of the other half is masked out
        low = (_chosen(table[0][0], table[0][1], q, GPU) & ~top) | (_chosen(table[0][2], table[0][3], other, GPU) & top)
        high = (_chosen(table[1][0], table[1][1], q, GPU) & ~top) | (
            _chosen(table[1][2], table[1][3], other, GPU) & top
        )
    first = permute_bytes(low, high, tl.full(q.shape, 0x5140, tl.int32), GPU)
    return first, permute_bytes(low, high, tl.full(q.shape, 0x7362, tl.int32), GPU)


@triton.jit
def pairs(q, table, SIGNED: tl.constexpr, GPU: tl.constexpr):
    """Words (..., 2 r, 2 h) of two floats each of words q (...) of eight codes, side by side. SIGNED: the top bit of a code is a sign."""
    up = q << 4
    p0, p1 = _four(q, permute_bytes(q, up, tl.full(q.shape, 0x9D8C, tl.int32), GPU), table, SIGNED, GPU)
    p2, p3 = _four(q >> 16, permute_bytes(q, up, tl.full(q.shape, 0xBFAE, tl.int32), GPU), table, SIGNED, GPU)
    return tl.join(tl.join(p0, p1), tl.join(p2, p3))
