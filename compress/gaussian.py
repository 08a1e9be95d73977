"""Grids with the least squared error for normal numbers: scalar ones by Lloyd's and Max's conditions, vectors by k-means.

Lloyd, "Least squares quantization in PCM" (1982); Max, "Quantizing for minimum distortion" (1960); for use on weights that a
Hadamard transformation has made look normal: Malinovskii et al., "HIGGS" (arXiv:2411.17525).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

ROUNDS = 2000  # of the scalar iteration, in float64: enough for 16 levels to settle to 1e-6
SAMPLES, PASSES = 1 << 15, 40  # pairs of normal numbers that vectors are fitted to, and passes over them
SEED = 0  # of these, and of where the vectors begin: a grid is a constant


@lru_cache(maxsize=16)
def scalar(count: int) -> torch.Tensor:
    """The ``count`` levels float32 [count, 1] under which E[(x - level)^2] is least, x normal."""
    root = math.sqrt(2)
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = (
        torch.erfinv(2 * middle - 1) * root * math.sqrt(3)
    )  # the density of good levels is the cube root of the normal's
    for _ in range(ROUNDS):
        edges = torch.cat(
            [torch.tensor([-torch.inf]), (found[1:] + found[:-1]) / 2, torch.tensor([torch.inf])]
        ).double()
        height = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)  # 0 at infinity
        share = torch.special.ndtr(edges).diff()
        found = -height.diff() / share
    return found.float()[:, None]


@lru_cache(maxsize=16)
def vectors(count: int, length: int) -> torch.Tensor:
    """``count`` vectors float32 [count, length] close to the best for normal ones; of one entry the best."""
    if length == 1:
        return scalar(count)
    generator = torch.Generator().manual_seed(SEED)
    samples = torch.randn(SAMPLES, length, generator=generator)
    found = samples[:count].clone()
    for _ in range(PASSES):
        index = closest(samples, found)
        sums = torch.zeros_like(found).index_add_(0, index, samples)
        hits = torch.bincount(index, minlength=count)[:, None]
        found = torch.where(hits > 0, sums / hits.clamp(min=1), found)
    return found


def closest(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The number int64 [n] of the row of ``grid`` [count, length] nearest to each row of ``x`` [n, length]."""
    reach = grid.square().sum(1)
    if grid.shape[1] == 1:  # levels rise
        return torch.bucketize(x[:, 0].contiguous(), (grid[1:, 0] + grid[:-1, 0]) / 2)
    step = max(1, (1 << 24) // len(grid))
    return torch.cat([torch.addmm(reach, part, grid.T, alpha=-2).argmin(1) for part in x.split(step)])
