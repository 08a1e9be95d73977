"""A budget of rows shared out over clusters by how much each has suffered."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction


def quotas(budget: int, weights: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """``budget`` in proportion to ``weights``; to ``sizes`` where all weights are 0."""
    parts = [float(weight) for weight in (weights if any(weight > 0 for weight in weights) else sizes)]
    total = math.fsum(parts)
    return [budget * part / total for part in parts]


def share_out(budget: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """How many of ``sizes[k]`` rows each cluster gives, min(budget, all rows) in total.

    Each quota is rounded down and capped by the size. What is left goes one by one to the cluster that is furthest below
    its quota and has rows left; of equal ones to the first.
    """
    wanted = quotas(budget, weights, sizes)
    counts = [min(math.floor(quota), size) for quota, size in zip(wanted, sizes, strict=True)]
    return top_up(counts, wanted, sizes, min(budget, sum(sizes)) - sum(counts))


def top_up(counts: Sequence[int], wanted: Sequence[float], sizes: Sequence[int], left: int) -> list[int]:
    """``counts`` with ``left`` more given out by the rule above, as far as ``sizes`` go."""
    counts = list(counts)
    gaps = [Fraction(quota) - count for quota, count in zip(wanted, counts, strict=True)]  # exact: ties are ties
    heap = [(-gap, k) for k, gap in enumerate(gaps) if counts[k] < sizes[k]]
    heapq.heapify(heap)
    while left > 0 and heap:
        lack, k = heapq.heappop(heap)
        counts[k] += 1
        left -= 1
        if counts[k] < sizes[k]:
            heapq.heappush(heap, (lack + 1, k))
    return counts
