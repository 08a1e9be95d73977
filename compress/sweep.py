"""The sweep of GPTQ and SparseGPT: replace a weight column by column, pushing each column's error onto those after it.

What a column is replaced by is a rule's business: the nearest points of a grid, zeros, or both. The sweep is the
optimal-brain-surgeon update of all columns not yet reached, taken in blocks (GPTQ, arXiv:2210.17323, algorithm 1;
SparseGPT, arXiv:2301.00774, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from compress.grids import AnyGrid

BLOCK = 128  # columns swept before the rest is updated by one matrix product (GPTQ, section 3.3, step 2)
COLD = 64  # inputs seen, below which H says nothing worth compensating for (experts that no token reached)
SAMPLE = 128  # rows whose output error is reported


class Rule(Protocol):
    """What becomes of the columns, in sweep order."""

    def enter(self, start: int, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """The columns from ``start`` on are next.

        ``weight`` [block, out] holds the errors of all columns before; ``scale`` [block] is the diagonal of L: to
        remove a weight w costs (w / scale)^2.
        """

    def column(self, j: int, rest: torch.Tensor) -> torch.Tensor:
        """What takes the place of column ``j``: float32 [out], a tensor of its own.

        ``rest`` [n, out] is the column and all that follow; those of the running block hold every error so far.
        """


def block_size(multiple: int) -> int:
    """Columns a block, so that ``multiple`` neighbours never start inside one and end in another."""
    return BLOCK if multiple % BLOCK == 0 else multiple * max(1, BLOCK // multiple)


def sweep(
    weight: torch.Tensor, lower: torch.Tensor, rule: Rule, *, block: int, drift: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss by row [out], tr(E H E'), of replacing ``weight`` [in, out], W's columns as rows, as ``rule`` says.

    ``lower`` is L [in, in], inv(H) = L L', rows and columns in sweep order. Row j of ``drift`` [in, in], above the diagonal,
    is how much of column j the later ones take over whatever replaces it; see :func:`compress.hessian.drift`. Afterwards
    row j of ``weight`` is column j as it was when the sweep reached it.
    """
    loss = torch.zeros(weight.shape[1], device=weight.device)
    for start in range(0, weight.shape[0], block):
        stop = min(start + block, weight.shape[0])
        errors = torch.empty_like(weight[start:stop])  # [block, out]
        corner = lower[start:stop, start:stop].T.contiguous()  # row j: how column j's error reaches the later ones
        rule.enter(start, weight[start:stop], corner.diagonal())
        for j in range(start, stop):
            reach, value = corner[j - start, j - start :], rule.column(j, weight[j:])
            error = torch.div(value.sub_(weight[j]), -reach[0], out=errors[j - start])
            weight[j + 1 : stop].addr_(reach[1:], error, alpha=-1)
            if drift is not None:
                weight[j + 1 : stop].addr_(drift[j, j + 1 : stop], weight[j])
        weight[stop:].addmm_(lower[stop:, start:stop], errors, alpha=-1)
        if drift is not None:
            weight[stop:].addmm_(drift[start:stop, stop:].T, weight[start:stop])
        loss += errors.square_().sum(0)
    return loss


class Rounding:
    """The nearest points of the grid, as a rule of the sweep; the codes uint8 [in, out] and grids are its attributes.

    ``index`` [in] gives each column's group, ``scale`` and ``zero`` [groups, out] the grids of the groups. With
    ``importance`` [in] a group's grid is fitted in place when the sweep reaches it, from weights that hold every earlier
    column's error (the released code leaves out those of the running block).
    """

    def __init__(
        self,
        grid: AnyGrid,
        index: Sequence[int],
        scale: torch.Tensor,
        zero: torch.Tensor,
        importance: torch.Tensor | None = None,
    ) -> None:
        self.grid, self.index, self.scale, self.zero, self.importance = grid, index, scale, zero, importance
        self.group = index.count(index[0])
        self.codes = torch.empty(len(index), scale.shape[1], dtype=torch.uint8, device=scale.device)

    def enter(self, start: int, weight: torch.Tensor, scale: torch.Tensor) -> None:
        pass

    def column(self, j: int, rest: torch.Tensor) -> torch.Tensor:
        g = self.index[j]
        if self.importance is not None and j % self.group == 0:
            fitted = self.grid.fit(rest[: self.group].T, self.importance[j : j + self.group])
            self.scale[g], self.zero[g] = fitted
        self.codes[j], value = self.grid.snap(rest[0], self.scale[g], self.zero[g])
        return value


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(W H W') by row [out] on an even sample of rows, 0 elsewhere: what losses are relative to."""
    energy = torch.zeros(weight.shape[0], device=weight.device)
    step = max(1, weight.shape[0] // SAMPLE)
    rows = weight[::step]
    energy[::step] = ((rows @ hessian) * rows).sum(1)
    return energy


def relative_loss(loss: torch.Tensor, energy: torch.Tensor) -> float:
    """The share of the output's energy that the error makes, of the rows [out] whose ``energy`` was taken."""
    total = float(energy.sum())
    return float(loss[energy > 0].sum() / total) if total > 0 else 0.0
