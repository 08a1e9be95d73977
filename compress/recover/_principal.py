"""Sparse fine-tuning of a layer: its principal weights alone are trained.

Liu et al., "LIFT the Veil for the Truth" (arXiv:2506.00772): those of the largest magnitude after the matrix is reduced to a
low rank. Here they are chosen once, at the start, among the weights that are not pruned.
"""

from __future__ import annotations

import torch
from torch import nn

SPARE, ROUNDS = (
    8,
    2,
)  # further directions, and power iterations, of the randomised range (Halko et al., arXiv:0909.4061)


class Principal(nn.Module):
    """An adapter of one weight float [out, in]: what is added to its ``count`` principal ones, each a value of its own.

    ``rank`` is that of the matrix whose magnitudes choose; ties go to the first. At its start it leaves the weight as it is.
    """

    def __init__(
        self, weight: torch.Tensor, mask: torch.Tensor, generator: torch.Generator, *, rank: int, count: int
    ) -> None:
        super().__init__()
        scores = reduced(weight.float(), rank, generator).abs().masked_fill_(~mask, -1).flatten()
        first = torch.sort(scores, descending=True, stable=True).indices[: min(count, int(mask.sum()))]
        self.register_buffer("places", first.sort().values, persistent=False)
        self.added = nn.Parameter(torch.zeros(len(first)))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        places: torch.Tensor = self.get_buffer("places")
        return weight.float().flatten().index_add(0, places, self.added).view_as(weight)


def reduced(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """The best approximation of ``matrix`` float32 [m, n] of rank ``rank``, up to what a randomised range misses of it."""
    width = min(rank + SPARE, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q  # [m, width]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, sigma, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ (u[:, :rank] * sigma[:rank]) @ vt[:rank]
