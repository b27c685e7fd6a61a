"""Rotation by a Hadamard matrix while the model runs: `planish::hadamard`, and the matrices themselves, which are built.

The last dimension of x (..., n) falls into blocks of `block` elements; each block is multiplied by the same orthogonal matrix:

    y[..., k block : (k + 1) block] = (signs x)[..., k block : (k + 1) block] H,       H H^T = I

`signs` (n,) are +1 and -1, all +1 when absent. With `transposed` the product is with H^T and the signs come last, which undoes
the other form. H of order 2^k m is the Kronecker product of Sylvester's matrix of order 2^k and a base of order m, divided by
the square root of the order. Bases: Paley (1933), both constructions, over the primes; where no prime
serves (52, 92, 100, 116, 156, 172), the array of Goethals and Seidel (1967) of four circulants whose rows are constant on the orbits of a group
of multipliers. Every multiple of 4 up to 184 is an order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from .fused import Builder, Call, Fused, register

CIRCULANTS = {
    13: ((3,), (8, 12, 6, 6)),
    23: ((22,), (1549, 1875, 1329, 912)),
    25: ((24,), (3420, 251, 1641, 1073)),
    29: ((28,), (7106, 6114, 8531, 4748)),
    39: ((14, 16), (240, 484, 188, 334)),
    43: ((6, 42), (112, 60, 42, 25)),
}
"""order of the circulants: (multipliers, for each of the four rows which orbits are -1, as bits in order of their least element)"""
WIDEST = 64
"""largest factor of Sylvester's matrix that the ONNX form multiplies at once"""


def hadamard_matrix(n: int) -> torch.Tensor:
    """The orthogonal matrix H (n, n) float64 with entries +-1/sqrt(n). Raises ValueError where `largest_block(n)` is not n."""
    base = _base_order(n)
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    return torch.kron(_sylvester(n // base), _base(base)) / math.sqrt(n)


def largest_block(n: int) -> int:
    """The largest divisor of n for which there is a matrix: n itself for every size with a known base."""
    return max(d for d in range(1, n + 1) if n % d == 0 and _base_order(d) is not None)


@functools.cache
def _base_order(n: int) -> int | None:
    """The smallest m with a matrix of its own such that n = 2^k m, None when there is none."""
    odd = n // (n & -n)
    candidates = (odd << k for k in range((n // odd).bit_length()))
    return next((m for m in candidates if _construction(m)), None)


def _construction(m: int) -> str:
    """Which construction gives a matrix of order m that Sylvester's does not; '' for none."""
    if m == 1:
        return "one"
    if m % 4 == 0 and _prime(m - 1):
        return "paley"
    if m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _prime(m // 2 - 1):
        return "paley, second"
    return "circulants" if m % 4 == 0 and m // 4 in CIRCULANTS else ""


def _prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


@functools.cache
def _base(m: int) -> torch.Tensor:
    """(m, m) float64 of +1 and -1 with orthogonal rows."""
    kind = _construction(m)
    if kind == "one":
        return torch.ones(1, 1, dtype=torch.float64)
    if kind == "circulants":
        return _goethals_seidel(m // 4)
    if kind == "paley":
        core = _jacobsthal(m - 1)
        border = torch.zeros(m, m, dtype=torch.float64)
        border[0, 1:], border[1:, 0], border[1:, 1:] = 1, -1, core
        return border + torch.eye(m, dtype=torch.float64)
    core = torch.zeros(m // 2, m // 2, dtype=torch.float64)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, _jacobsthal(m // 2 - 1)
    unit = torch.eye(m // 2, dtype=torch.float64)
    return torch.kron(core, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(unit, torch.tensor([[1.0, -1], [-1, -1]]))


def _jacobsthal(q: int) -> torch.Tensor:
    """(q, q): the quadratic character of column - row modulo the prime q."""
    character = -torch.ones(q, dtype=torch.float64)
    character[[i * i % q for i in range(q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[None, :] - index[:, None]) % q]


def _goethals_seidel(m: int) -> torch.Tensor:
    """(4 m, 4 m) from four circulants of order m whose products with their transposes add up to 4 m I."""
    multipliers, rows = CIRCULANTS[m]
    orbits = _orbits(m, multipliers)
    index = torch.arange(m)
    found = []
    for bits in rows:
        row = torch.ones(m, dtype=torch.float64)
        for place, orbit in enumerate(orbits):
            if bits >> place & 1:
                row[orbit] = -1
        found.append(row[(index[None, :] - index[:, None]) % m])
    a, b, c, d = found
    back = torch.eye(m, dtype=torch.float64).flip(0)
    return torch.cat(
        [
            torch.cat([a, b @ back, c @ back, d @ back], 1),
            torch.cat([-b @ back, a, d.T @ back, -c.T @ back], 1),
            torch.cat([-c @ back, -d.T @ back, a, b.T @ back], 1),
            torch.cat([-d @ back, c.T @ back, -b.T @ back, a], 1),
        ]
    )


def _orbits(m: int, multipliers: Sequence[int]) -> list[list[int]]:
    """The non-zero residues modulo m, those together that the multipliers carry into each other."""
    left, found = set(range(1, m)), []
    while left:
        orbit, waiting = set[int](), [min(left)]
        while waiting:
            item = waiting.pop()
            if item not in orbit:
                orbit.add(item)
                waiting += [item * g % m for g in multipliers]
        found.append(sorted(orbit))
        left -= orbit
    return found


def _sylvester(n: int) -> torch.Tensor:
    """(n, n) float64 of +1 and -1 for a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix


@functools.cache
def _scaled(base: int, block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(base, base) of the base's matrix, the whole scale in it; kept on the device, for a copy to it cannot be part of a CUDA graph."""
    return (_base(base) / math.sqrt(block)).to(device, dtype)


def hadamard(x: torch.Tensor, signs: torch.Tensor | None, block: int, transposed: bool) -> torch.Tensor:
    """The product, of the shape and type of x (..., n): the definition, by sums and differences for the power of two."""
    base = _base_order(block)
    if base is None or x.shape[-1] % block:
        raise ValueError(f"no Hadamard matrix of order {block} for {x.shape[-1]} channels")
    value = x if signs is None or transposed else x * signs.to(x.dtype)
    matrix = _scaled(base, block, x.dtype, x.device)
    value = value.reshape(-1, block // base, base) @ (matrix.T if transposed else matrix)
    half = 1
    while half < block // base:
        pairs = value.reshape(-1, 2, half, base)
        value = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
        half *= 2
    value = value.reshape(x.shape)
    return value * signs.to(x.dtype) if signs is not None and transposed else value


register(
    "hadamard(Tensor x, Tensor? signs, int block, bool transposed) -> Tensor",
    hadamard,
    lambda x, signs, block, transposed: torch.empty_like(x),
)


class Hadamard(Fused):
    """ONNX: one small matrix product for each Kronecker factor. The factors are constants of at most `WIDEST` or the base's order."""

    def low_bit(self, call: Call) -> bool:
        """Never: it turns floats into floats."""
        return False

    def lower(self, call: Call, graph: Builder) -> Sequence[str]:
        """Equal to the reference within float32 rounding."""
        x, signs = call.tensors["x"], call.tensors.get("signs")
        block, transposed = int(call.attributes["block"]), bool(call.attributes["transposed"])
        shape = graph.one("Shape", [x], f"{call.name}.shape")
        value = graph.one("Mul", [x, signs], f"{call.name}.signed") if signs and not transposed else x
        for factor, rest in _factors(block):
            matrix = _factor_matrix(factor, block)  # (factor, factor) float64, its share of the scale in it
            matrix = matrix.T if transposed else matrix
            split = [-1, factor, rest] if rest > 1 else [-1, factor]
            value = graph.one("Reshape", [value, graph.constant(f"{call.name}.split", np.array(split, np.int64))], f"{call.name}.parts")  # fmt: skip
            left = matrix.T if rest > 1 else matrix
            weight = graph.constant(f"{call.name}.factor_{factor}", left.float().contiguous().numpy())
            value = graph.one("MatMul", [weight, value] if rest > 1 else [value, weight], f"{call.name}.rotated")
        value = graph.one("Reshape", [value, shape], f"{call.name}.whole")
        return [graph.one("Mul", [value, signs], f"{call.name}.signed") if signs and transposed else value]


def _factors(block: int) -> list[tuple[int, int]]:
    """(order, product of the orders behind it) of the Kronecker factors of H, first to last; an order of 1 is left out."""
    base = _base_order(block)
    assert base is not None
    orders, power = [base] if base > 1 else [], block // base
    while power > 1:
        orders.insert(0, min(power, WIDEST))
        power //= orders[0]
    return [(n, math.prod(orders[i + 1 :])) for i, n in enumerate(orders)]


def _factor_matrix(order: int, block: int) -> torch.Tensor:
    """One factor (order, order), orthogonal."""
    base = _base_order(block)
    return (_base(order) if order == base else _sylvester(order)) / math.sqrt(order)
