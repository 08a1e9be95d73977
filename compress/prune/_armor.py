"""ARMOR's arithmetic: a weight as A S B, A and B block-diagonal, and S with 2 of every 4 consecutive inputs of a row.

Liu et al., "ARMOR" (arXiv:2510.05528). W [out, in] is a normalised weight, h [in] the second moments of its inputs, b the side
of the blocks: A [J, b, b], B [K, b, b], J = out / b, K = in / b. As A mixes the rows and B the columns of a block alone, block
(j, k) of the product is A_j S_kj B_k; so W and S are kept as [K, J, b, b]. Fitted is L = sum_ij (W - A S B)_ij^2 h_j.

The paper takes a step of Adam on all three, then chooses one group of four anew in every block, many thousand times. Here
every step is the exact minimum for what it moves: A, B, and S group by group, each group as in the paper. L never rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch

from compress.masks import Pattern, pattern_mask

GROUP = 4
PAIRS = tuple(combinations(range(GROUP), 2))  # what two of a group can stay
TINY = 1e-5  # added to norms (the released code's)
PAIR_DAMPING, ROW_DAMPING = 1e-9, 1e-8  # of a pair's 2 x 2 system, and of |a|^2 (the released code's)
STIFFNESS = 1e-6  # share of the mean diagonal that holds A and B where they are when their equations are singular
ENOUGH = 1e-5  # relative gain of a round below which nothing more is to be had


class Parts(NamedTuple):
    """A [J, b, b], S [K, J, b, b], B [K, b, b]."""

    left: torch.Tensor
    core: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Fitted:
    """The best factors found, and L over its value for S = 0: at first, and after every round."""

    parts: Parts
    losses: list[float]


def normalised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``weight`` [out, in] over the norms of its columns and then of its rows; these norms r [out] and c [in]."""
    columns = weight.norm(dim=0) + TINY
    scaled = weight / columns
    rows = scaled.norm(dim=1) + TINY
    return scaled / rows[:, None], rows, columns


def cut(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """[out, in] as [K, J, size, size]."""
    rows, columns = matrix.shape
    return matrix.view(rows // size, size, columns // size, size).permute(2, 0, 1, 3).contiguous()


def whole(blocks: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`cut`."""
    count, rows, size, _ = blocks.shape
    return blocks.permute(1, 2, 0, 3).reshape(rows * size, count * size)


def product(parts: Parts) -> torch.Tensor:
    """A S B as [K, J, b, b]."""
    return parts.left @ parts.core @ parts.right[:, None]


def loss(weight: torch.Tensor, energy: torch.Tensor, parts: Parts) -> float:
    """L of ``parts`` for blocks ``weight`` [K, J, b, b], ``energy`` being h [K, b]."""
    error = (product(parts) - weight).square_().sum((1, 2))  # [K, b]
    return float((error.double() * energy.double()).sum())


def start(weight: torch.Tensor, energy: torch.Tensor) -> Parts:
    """A = B = I and, of every four, the two with the largest W^2 h: NoWag-P."""
    count, rows, size, _ = weight.shape
    mask = pattern_mask(weight.square() * energy[:, None, None], Pattern(2, GROUP))
    eye = torch.eye(size, device=weight.device)
    return Parts(eye.repeat(rows, 1, 1), weight.masked_fill(~mask, 0), eye.repeat(count, 1, 1))


def fit(weight: torch.Tensor, energy: torch.Tensor, size: int, rounds: int) -> Fitted:
    """The factors of normalised ``weight`` [out, in] after so many rounds of all three steps; h is ``energy`` [in]."""
    blocks, h = cut(weight, size), energy.view(-1, size)
    parts = start(blocks, h)
    zero = float((blocks.square().sum((1, 2)).double() * h.double()).sum()) or 1.0
    best, losses = parts, [loss(blocks, h, parts) / zero]
    for _ in range(rounds):
        parts = parts._replace(left=left_step(blocks, h, parts))
        parts = parts._replace(right=right_step(blocks, parts))
        parts = parts._replace(core=core_step(blocks, h, parts))
        losses.append(loss(blocks, h, parts) / zero)
        if losses[-1] <= min(losses[:-1]):
            best = parts
        if losses[-1] > (1 - ENOUGH) * losses[-2]:
            break
    return Fitted(best, losses)


def left_step(weight: torch.Tensor, energy: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The best A: with Y_j the rows j of S B, A_j = W_j H Y_j' inv(Y_j H Y_j')."""
    y = parts.core @ parts.right[:, None]  # [K, J, b, b]
    weighed = y * energy[:, None, None]
    pull = ((weight - parts.left @ y) @ weighed.mT).sum(0)  # [J, b, b], of the error that is left
    return parts.left + _divided(pull.mT, (y @ weighed.mT).sum(0)).mT


def right_step(weight: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The best B: with Z_k the columns k of A S, B_k = inv(Z_k' Z_k) Z_k' W_k, whatever h is."""
    z = parts.left @ parts.core  # [K, J, b, b]
    pull = (z.mT @ (weight - z @ parts.right[:, None])).sum(1)  # [K, b, b]
    return parts.right + _divided(pull, (z.mT @ z).sum(1))


def _divided(pull: torch.Tensor, system: torch.Tensor) -> torch.Tensor:
    """inv(``system`` + a little) ``pull``, [n, b, b]: as a change it lowers the loss however little is added."""
    diagonal = system.diagonal(dim1=-2, dim2=-1)  # [n, b]
    diagonal += STIFFNESS * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return torch.cholesky_solve(pull.double(), torch.linalg.cholesky(system.double())).float()


@dataclass(frozen=True)
class Moments:
    """What the core is fitted by: P = A'A [J, b, b], Q = B H B' [K, b, b], and A' W H B' [K, J, b, b]."""

    rows: torch.Tensor
    columns: torch.Tensor
    pull: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, energy: torch.Tensor, parts: Parts) -> Moments:
        weighed = parts.right * energy[:, None]  # B H, [K, b, b]
        pull = parts.left.mT @ weight @ weighed[:, None].mT
        return cls(parts.left.mT @ parts.left, weighed @ parts.right.mT, pull)

    def gradient(self, core: torch.Tensor) -> torch.Tensor:
        """Half of dL/dS = A' (A S B - W) H B' = P S Q - A' W H B'."""
        return self.rows @ core @ self.columns[:, None] - self.pull


class Pairs:
    """The best two of four, for groups of columns whose blocks of Q are ``systems`` [..., 4, 4].

    With f the gradient of a group at zero and a its column of A, a pair costs least at x = -inv(Q_pair) f / |a|^2, where it
    gains f' inv(Q_pair) f / |a|^2.
    """

    def __init__(self, systems: torch.Tensor) -> None:
        self.inverses = torch.zeros(*systems.shape[:-2], len(PAIRS), GROUP, GROUP, device=systems.device)
        for number, (x, y) in enumerate(PAIRS):
            a, d, o = (systems[..., x, x] + PAIR_DAMPING, systems[..., y, y] + PAIR_DAMPING, systems[..., x, y])
            determinant = a * d - o * o
            places = ((x, x, d), (y, y, a), (x, y, -o), (y, x, -o))
            for row, column, value in places:
                self.inverses[..., number, row, column] = value / determinant
        self.gains = self.inverses.flatten(-2).mT  # [..., 16, pairs]
        self.values = self.inverses.movedim(-2, -3).flatten(-2)  # [..., 4, pairs 4]

    def best(self, f: torch.Tensor, energy: torch.Tensor, group: int) -> torch.Tensor:
        """The best values [K, n, 4] of group ``group`` from f [K, n, 4]; ``energy`` [n, 1] is |a|^2."""
        outer = (f.unsqueeze(-1) * f.unsqueeze(-2)).flatten(-2)  # [K, n, 16]
        chosen = torch.bmm(outer, self.gains[:, group]).argmax(-1)  # [K, n]
        values = torch.bmm(f, self.values[:, group]).unflatten(-1, (len(PAIRS), GROUP))  # [K, n, pairs, 4]
        index = chosen[..., None, None].expand(*chosen.shape, 1, GROUP)
        return values.gather(-2, index).squeeze(-2) / -(energy + ROW_DAMPING)


def core_step(weight: torch.Tensor, energy: torch.Tensor, parts: Parts) -> torch.Tensor:
    """S with every group of four chosen anew, mask and values, one after the other; each is the best given all others.

    Row i of all blocks at a time, its groups from left to right: blocks do not see each other.
    """
    moments = Moments.of(weight, energy, parts)
    core, gradient = parts.core.clone(), moments.gradient(parts.core)
    size = core.shape[-1]
    pairs = Pairs(groups_of(moments.columns))
    for i in range(size):
        a, row, pull = moments.rows[:, i, i, None], core[:, :, i], gradient[:, :, i].clone()  # [J, 1], [K, J, b] twice
        before = row.clone()
        for group, place in enumerate(range(0, size, GROUP)):
            here, later = slice(place, place + GROUP), slice(place + GROUP, size)
            f = pull[..., here] - a * torch.bmm(row[..., here], moments.columns[:, here, here])
            row[..., here] = pairs.best(f, a, group)
            moved = a * (row[..., here] - before[..., here])
            pull[..., later].baddbmm_(moved, moments.columns[:, here, later])
        change = torch.bmm(row - before, moments.columns)  # [K, J, b]
        gradient += moments.rows[:, :, i, None] * change[:, :, None]
    return core


def groups_of(columns: torch.Tensor) -> torch.Tensor:
    """The blocks [K, groups, 4, 4] on the diagonal of ``columns`` [K, b, b]."""
    cut_up = columns.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, GROUP))  # [K, groups, 4, groups, 4]
    return cut_up.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
