"""Algebra of low-rank updates ``B A``: canonical forms, norms and truncation, without ever forming the product."""

from __future__ import annotations

import hashlib
import math

import torch

from weightworks.stage.adapting import Factors

SETTLED = 1e-7  # relative change of the captured energy at which subspace iteration ends
SWEEPS = 24  # and the most sweeps it may take
SPARE = 10  # directions of a sketch beyond the rank (Halko, Martinsson and Tropp 2011, section 4.2)
EXACT = 512  # up to this many rows or columns a whole decomposition takes no time


def decomposed(factors: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [rows, k], sigma [k], V [k, columns] of ``b @ a``, k = min(rank, rows, columns), by way of two thin QR factors."""
    left, upper = torch.linalg.qr(factors.b)  # [rows, k], [k, rank]
    right, lower = torch.linalg.qr(factors.a.T)  # [columns, k], [k, rank]
    u, sigma, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, sigma, v @ right.T


def split(u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor) -> Factors:
    """B = U sqrt(sigma), A = sqrt(sigma) V: both halves of each direction have one norm, so neither loses in rounding."""
    root = sigma.sqrt()
    return Factors(u * root, root[:, None] * v)


def balanced(factors: Factors) -> Factors:
    """The same directions b_j a_j, each with ``|b_j| = |a_j|``; a direction of which one half is zero becomes zero."""
    b, a = torch.linalg.vector_norm(factors.b, dim=0), torch.linalg.vector_norm(factors.a, dim=1)
    alive = (a > 0) & (b > 0)
    root = torch.where(alive, a / b.where(alive, torch.ones_like(b)), torch.zeros_like(a)).sqrt()
    inverse = torch.where(alive, 1 / root.where(alive, torch.ones_like(root)), torch.zeros_like(a))
    return Factors(factors.b * root, factors.a * inverse[:, None])


def rank_for(sigma: torch.Tensor, total: float, energy: float) -> int:
    """The smallest rank whose share of the squared singular values' sum ``total`` is at least ``energy``; at least 1."""
    held = sigma.square().cumsum(0)
    return min(int((held < energy * total).sum()) + 1, len(sigma))


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and the module's name alone."""
    key = hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))


def leading(
    delta: torch.Tensor, rank: int | None, energy: float | None, draws: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triplets U, sigma, V of ``delta`` [rows, columns] in float32: ``rank`` of them, or as many as hold
    the share ``energy`` of its squared norm, and no more than ``rank`` then.

    Small matrices are decomposed whole in float64. Of others a random sketch is iterated until the energy it captures
    stands still; where a share is asked for, the sketch grows until it holds it.
    """
    total = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    size = min(delta.shape)
    most = min(rank or size, size)
    sketch = most if energy is None else min(most, 64)
    while size > EXACT and 4 * (sketch + SPARE) < size:
        u, sigma, v = _sketched(delta, sketch + SPARE, draws)
        if energy is None or sketch == most:
            break
        if float(sigma[:sketch].square().sum()) >= energy * total:
            break
        sketch = min(2 * sketch, most)
    else:
        u, sigma, v = torch.linalg.svd(delta.double() if size <= EXACT else delta, full_matrices=False)
    count = most if energy is None else min(most, rank_for(sigma.double(), total, energy))
    return u[:, :count].float(), sigma[:count].float(), v[:count].float()


def _sketched(
    delta: torch.Tensor, width: int, draws: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triplets of ``delta`` within the ``width`` directions that subspace iteration from a random start ends in."""
    start = torch.randn(delta.shape[1], width, generator=draws)
    basis = torch.linalg.qr(delta @ start).Q  # [rows, width]
    before = math.inf
    for _ in range(SWEEPS):
        across = torch.linalg.qr(delta.T @ basis).Q  # [columns, width]
        product = delta @ across
        captured = float(torch.linalg.vector_norm(product, dtype=torch.float64)) ** 2
        basis = torch.linalg.qr(product).Q
        if abs(captured - before) <= SETTLED * captured:
            break
        before = captured
    u, sigma, v = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ u, sigma, v
