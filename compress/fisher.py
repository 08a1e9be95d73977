"""The empirical Fisher matrix of a weight, F = lam I + (1/m) sum g g', and what surgeons ask of it; never whole.

Two forms. Blocks: F is taken as block-diagonal, blocks of B consecutive weights (oBERT,
arXiv:2203.07259, section 3.2). Matrix-free: the gradients are kept, and the whole of F is used
through an m x m matrix (M-FAC, arXiv:2107.03356; its recursion is the same inverse, here by Woodbury's identity).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

GATHERED = 16  # gradients that are added to blocks at once
PART = 1 << 20  # elements of blocks that are inverted at a time


class Fisher(Protocol):
    """F of d weights, told one gradient after the other."""

    def add(self, gradient: torch.Tensor) -> None:
        """Take in g [out, in], one of the announced number."""

    def inverse_diagonal(self) -> torch.Tensor:
        """diag of inv(F), [d]."""

    def updated(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The weights [d] that minimise dw' F dw with those outside ``mask`` [d] zero: all removed jointly."""


class Blocks:
    """F by blocks of ``size`` weights, [d / size, size, size]; ``count`` gradients will come.

    The released code keeps inv(F), updated with every gradient (Sherman-Morrison). F itself takes several gradients in one
    product, which reads and writes the matrices that many times less, and loses nothing when ``damping`` is small.
    """

    def __init__(
        self, elements: int, size: int, count: int, damping: float, device: torch.device | str = "cpu"
    ) -> None:
        blocks = -(-elements // size)
        self.elements, self.size, self.count, self.damping = elements, size, count, damping
        self.matrix = torch.zeros(blocks, size, size, device=device)
        self.waiting = torch.zeros(min(GATHERED, count), blocks, size, device=device)
        self.seen = 0

    @staticmethod
    def nbytes(elements: int, size: int, count: int) -> int:
        """What such an object holds."""
        return 4 * -(-elements // size) * size * (size + min(GATHERED, count))

    def add(self, gradient: torch.Tensor) -> None:
        place = self.seen % len(self.waiting)
        self.waiting[place].view(-1)[: self.elements] = gradient.flatten()
        self.seen += 1
        if place + 1 == len(self.waiting):
            self._gather(place + 1)

    def _gather(self, waiting: int) -> None:
        """Add the products of the gradients that are ``waiting``."""
        g = self.waiting[:waiting]  # [waiting, blocks, size]
        self.matrix.baddbmm_(g.permute(1, 2, 0), g.transpose(0, 1), alpha=1 / self.count)

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some blocks after the other: which, and their F in float64."""
        if left := self.seen % len(self.waiting):
            self._gather(left)
            self.seen = 0
        step = max(1, PART // self.size**2)
        for start in range(0, len(self.matrix), step):
            part = slice(start, start + step)
            matrix = self.matrix[part].double()
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)  # [blocks, size]
            rounding = torch.finfo(torch.float32).eps * diagonal.sum(-1, keepdim=True)  # of the sums in float32
            diagonal += self.damping + rounding
            yield part, matrix

    def inverse_diagonal(self) -> torch.Tensor:
        found = torch.empty(self.matrix.shape[:2], device=self.matrix.device)
        for part, matrix in self._parts():
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
            found[part] = inverse.diagonal(dim1=-2, dim2=-1).float()
        return found.flatten()[: self.elements]

    def updated(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """dw_K = inv(F_KK) F_KP w_P, block by block."""
        missing = self.matrix.shape[0] * self.size - self.elements
        w, kept = (torch.nn.functional.pad(flat, (0, missing)).view(-1, self.size) for flat in (weight, mask))
        result = w.masked_fill(~kept, 0)
        for part, matrix in self._parts():
            stays, gone = kept[part], (w[part] - result[part]).double()
            pull = (matrix @ gone[..., None]).masked_fill_(~stays[..., None], 0)  # [blocks, size, 1]
            matrix.masked_fill_(~(stays[:, :, None] & stays[:, None]), 0)
            matrix.diagonal(dim1=-2, dim2=-1).masked_fill_(~stays, 1)
            result[part] += torch.cholesky_solve(pull, torch.linalg.cholesky(matrix))[..., 0].float()
        return result.flatten()[: self.elements]


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
