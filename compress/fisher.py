"""The empirical Fisher matrix of a weight, F = lam I + (1/m) sum g g', and what surgeons ask of it; never whole.

Two forms. Blocks: F is taken as block-diagonal, blocks of B consecutive weights, and its inverse is kept up to date with
every gradient (oBERT, arXiv:2203.07259, section 3.2). Matrix-free: the gradients are kept, and the whole of F is used
through an m x m matrix (M-FAC, arXiv:2107.03356; its recursion is the same inverse, here by Woodbury's identity).
"""

from __future__ import annotations

from typing import Protocol

import torch


class Fisher(Protocol):
    """F of d weights, told one gradient after the other."""

    def add(self, gradient: torch.Tensor) -> None:
        """Take in g [out, in], one of the announced number."""

    def inverse_diagonal(self) -> torch.Tensor:
        """diag of inv(F), [d]."""

    def updated(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The weights [d] that minimise dw' F dw with those outside ``mask`` [d] zero: all removed jointly."""


class Blocks:
    """inv(F) by blocks of ``size`` weights, [d / size, size, size]; ``count`` gradients will come."""

    def __init__(
        self, elements: int, size: int, count: int, damping: float, device: torch.device | str = "cpu"
    ) -> None:
        blocks = -(-elements // size)
        self.elements, self.size, self.count = elements, size, count
        self.inverse = torch.eye(size, device=device).div_(damping).repeat(blocks, 1, 1)

    def _cut(self, flat: torch.Tensor) -> torch.Tensor:
        """``flat`` [d] in blocks [blocks, size], the last one filled up with zeros."""
        missing = self.inverse.shape[0] * self.size - self.elements
        return torch.nn.functional.pad(flat.flatten(), (0, missing)).view(-1, self.size)

    def add(self, gradient: torch.Tensor) -> None:
        g = self._cut(gradient)
        v = (self.inverse @ g.unsqueeze(-1)).squeeze(-1)  # [blocks, size]
        scale = (self.count + (g * v).sum(-1)).rsqrt()  # [blocks]
        v.mul_(scale[:, None])
        self.inverse.baddbmm_(v.unsqueeze(-1), v.unsqueeze(1), alpha=-1)

    def inverse_diagonal(self) -> torch.Tensor:
        return self.inverse.diagonal(dim1=-2, dim2=-1).flatten()[: self.elements]

    def updated(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """dw = -inv(F)[:, P] inv(inv(F)[P, P]) w_P, block by block."""
        w, gone = self._cut(weight), self._cut((~mask).float())
        system = self.inverse * gone[:, :, None] * gone[:, None, :]
        system.diagonal(dim1=-2, dim2=-1).add_(1 - gone)
        solved = torch.linalg.solve(system, w * gone)  # zero where kept
        change = (self.inverse @ solved.unsqueeze(-1)).squeeze(-1)
        return (w - change).masked_fill_(gone.bool(), 0).flatten()[: self.elements]


class Free:
    """The whole of F, through its ``count`` gradients G [m, d]."""

    def __init__(self, elements: int, count: int, damping: float, device: torch.device | str = "cpu") -> None:
        self.gradients = torch.zeros(count, elements, device=device)
        self.seen, self.damping = 0, damping

    def add(self, gradient: torch.Tensor) -> None:
        self.gradients[self.seen] = gradient.flatten()
        self.seen += 1

    def _small(self, gradients: torch.Tensor) -> torch.Tensor:
        """The lower Cholesky factor of m lam I + G G', in float64."""
        small = (gradients @ gradients.T).double()
        small.diagonal().add_(len(gradients) * self.damping)
        return torch.linalg.cholesky(small)

    def inverse_diagonal(self) -> torch.Tensor:
        """(1 - g_i' inv(m lam I + G G') g_i) / lam for every column g_i of G."""
        half = torch.linalg.solve_triangular(self._small(self.gradients).float(), self.gradients, upper=False)
        return (1 - half.square_().sum(0)).clamp_(min=torch.finfo(torch.float32).eps) / self.damping

    def updated(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """dw_K = G_K' inv(m lam I + G_K G_K') G_P w_P."""
        kept, gone = self.gradients * mask, weight.masked_fill(mask, 0)
        small = torch.cholesky_solve((self.gradients @ gone).double()[:, None], self._small(kept))
        return (weight + kept.T @ small[:, 0].float()).masked_fill_(~mask, 0)
