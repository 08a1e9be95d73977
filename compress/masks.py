"""Masks from scores: which weights stay, in exact numbers, ties by index (of equal weights the first is pruned first)."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Scope = Literal["layer", "row"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """N:M sparsity: of every ``of`` consecutive inputs of a row, ``kept`` stay."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """``2:4`` as a pattern, None for ``unstructured``. Raises :class:`ValueError` for anything else."""
        if text == "unstructured":
            return None
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found.group(1)) < int(found.group(2)):
            raise ValueError(
                "must be unstructured, or N:M such as 2:4, which keeps N of every M consecutive inputs, 0 < N < M"
            )
        return cls(int(found.group(1)), int(found.group(2)))

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.of


def pattern_mask(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """bool [..., in], True for the ``pattern.kept`` highest of every ``pattern.of`` consecutive ``scores`` [..., in]."""
    groups = scores.unflatten(-1, (-1, pattern.of))  # [..., groups, of]
    rank = torch.zeros(groups.shape, dtype=torch.int16, device=scores.device)  # how many go before it
    for place in range(pattern.of):
        one = groups[..., place : place + 1]
        rank[..., :place] += one < groups[..., :place]
        rank[..., place + 1 :] += one <= groups[..., place + 1 :]
    return (rank >= pattern.of - pattern.kept).flatten(-2)


def top_mask(scores: torch.Tensor, keep: int, scope: Scope = "layer") -> torch.Tensor:
    """bool like ``scores`` [out, in], True for exactly ``keep`` of the highest: of all, or as many in every row.

    Where ``keep`` cannot be shared out evenly over the rows, they differ by one, spread evenly.
    """
    rows, columns = scores.shape
    if scope == "layer":
        return ~_lowest(scores.reshape(1, -1), scores.numel() - keep).view(rows, columns)
    pruned = scores.numel() - keep
    counts = shares(pruned, rows)
    low, high = min(counts), max(counts)
    mask = ~_lowest(scores, low)
    if high > low:
        more = torch.tensor(counts, device=scores.device) > low
        mask[more] = ~_lowest(scores[more], high)
    return mask


def shares(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers that differ by at most one, spread evenly."""
    ends = [total * part // parts for part in range(parts + 1)]
    return [stop - start for start, stop in itertools.pairwise(ends)]


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool [rows, n], True for exactly ``count`` of the lowest ``scores`` of every row; of equals the first."""
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    threshold = _kth(scores, count)
    lowest, equal = scores < threshold, scores == threshold
    missing = count - lowest.sum(1, keepdim=True)
    if int(missing.sum()) < int(equal.sum()):
        equal &= equal.cumsum(1, dtype=torch.int32) <= missing
    return lowest | equal


def _kth(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count``-th lowest of every row, [rows, 1]."""
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=1, keepdim=True).values
    # On the CPU kthvalue keeps an int64 index of every score beside its copy.
    parted = np.partition(scores.detach().numpy(), count - 1, axis=1)
    return torch.from_numpy(parted[:, count - 1 : count].copy())
