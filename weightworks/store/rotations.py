"""Orthogonal transformations of rows that take few operations: random signs, then Hadamard matrices.

A vector of n = 2^k m entries is multiplied by diag(signs) (H x P) / sqrt(n): H of side 2^k is Sylvester's Hadamard matrix, P of
side m Paley's (1933) where there is one, so that every entry of the product is as large as any other; else P is orthogonal and
random (QR of normal numbers, with its signs fixed). All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

LARGEST_PALEY = 256  # sides of Paley matrices that are looked for


@dataclass(frozen=True, slots=True)
class Rotation:
    """The orthogonal Q float64 [size, size] of ``seed``, or of as many copies of it along a diagonal as a row has room for."""

    size: int
    seed: int

    def right(self, x: torch.Tensor) -> torch.Tensor:
        """x Q, x [..., copies * size]; float64."""
        blocks = x.double().reshape(-1, self.size) * signs(self.size, self.seed).to(x.device)
        return _hadamard(blocks, self.seed).view(x.shape)

    def left(self, x: torch.Tensor) -> torch.Tensor:
        """Q' x, x [copies * size, ...] with at most two axes; float64."""
        return self.right(x) if x.ndim == 1 else self.right(x.T.contiguous()).T

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """x Q', which undoes :meth:`right`; float64."""
        blocks = _hadamard(x.double().reshape(-1, self.size), self.seed, back=True)
        return (blocks * signs(self.size, self.seed).to(x.device)).view(x.shape)


def _hadamard(x: torch.Tensor, seed: int, *, back: bool = False) -> torch.Tensor:
    """Rows of ``x`` [n, size] times (H x P) / sqrt(size), or its transpose: butterflies, then one product with P."""
    power, side = split(x.shape[1])
    factor = core(side, seed).to(x.device)
    x = x.view(len(x), power, side) @ (factor.T if back else factor)
    half = 1
    while half < power:  # butterflies between entries a distance of ``half`` apart
        pairs = x.reshape(len(x), -1, 2, half, side)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    return x.reshape(len(x), power * side) / power**0.5


def split(size: int) -> tuple[int, int]:
    """``size`` as a power of two times the side of P."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    side = odd
    while odd > 1 and side <= min(size, LARGEST_PALEY):
        if side % 4 == 0 and _prime(side - 1):
            return size // side, side
        if size % (2 * side):
            break
        side *= 2
    return size // odd, odd


@lru_cache(maxsize=8)
def signs(size: int, seed: int) -> torch.Tensor:
    """Random signs float64 [size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (size,), generator=generator).double() * 2 - 1


@lru_cache(maxsize=8)
def core(side: int, seed: int) -> torch.Tensor:
    """P float64 [side, side], orthogonal."""
    if side == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if side % 4 == 0 and _prime(side - 1):
        return paley(side) / side**0.5
    generator = torch.Generator().manual_seed(seed + 1)
    q, r = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def paley(side: int) -> torch.Tensor:
    """Paley's first Hadamard matrix float64 [side, side], side - 1 being a prime that is 3 mod 4."""
    prime = side - 1
    squares = {number * number % prime for number in range(1, prime)}
    residue = torch.tensor([0.0, *(1.0 if n in squares else -1.0 for n in range(1, prime))], dtype=torch.float64)
    index = torch.arange(prime)
    matrix = torch.ones(side, side, dtype=torch.float64)
    matrix[1:, 1:] = residue[(index[:, None] - index) % prime]
    matrix[1:, 0] = -1
    matrix.diagonal()[1:] += 1
    return matrix


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
