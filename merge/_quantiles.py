"""Exact order statistics of numbers seen a slab at a time, by two histograms instead of a sort.

The bits of a float32 that is not negative, read as an integer, grow with the number; with the sign turned into an order the
same holds for all. A first pass counts the upper 16 bits, which tells the bucket that holds a rank; a second counts the
lower 16 bits of the numbers in that bucket, which tells the number itself. Nothing is approximated, and as the counts are
integers, neither rows nor order of the slabs change anything. Two passes cost about 4 ns for each number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from weightworks.stage.merging import Slab, Survey

BINS = 1 << 16  # of either half of 32 bits
ZERO = BINS >> 1  # the bucket of +0.0 when the sign counts
PIECE = 1 << 17  # numbers looked at together: they stay in the cache

Quantities = Callable[[Slab, Any], Iterable[tuple[str, "torch.Tensor"]]]
Ranks = Callable[[str, int], Sequence[int]]


def surveys(
    quantities: Quantities, ranks: Ranks, *, signed: bool = False, scope: Literal["tensor", "model"] = "model"
) -> tuple[Survey, Survey]:
    """Two surveys that find the numbers of given ranks.

    ``quantities(slab, found)`` yields names with float32 numbers of any shape, which may be different in size from slab to
    slab; a name's numbers from all slabs (of the tensor, or of the model) count together. ``signed`` orders them by value,
    else by magnitude. ``ranks(name, total)`` says which ranks of the ``total`` numbers are wanted, from 0 for the least.

    Afterwards ``found`` is what it was, a mapping, and for each name ``{"values": [...], "above": [...]}``: the number at
    each rank, and how many numbers are as large or larger. Surveys may follow each other, if the names differ. A name
    that no slab had is not in ``found``. Where numbers are equal, ranks do not tell them apart: ``>= value`` takes all.
    """

    def count(slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        return {name: histogram(numbers, signed=signed) for name, numbers in quantities(slab, found)}

    def locate(sums: Mapping[str, torch.Tensor], found: Any) -> Any:
        return {
            **(found or {}),
            **{name: places(counts, ranks(name, int(counts.sum()))) for name, counts in sums.items()},
        }

    def refine(slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        return {
            name: detail(numbers, found[name]["buckets"], signed=signed) for name, numbers in quantities(slab, found)
        }

    def conclude(sums: Mapping[str, torch.Tensor], found: Any) -> Any:
        return {**found, **{name: values(counts, found[name], signed=signed) for name, counts in sums.items()}}

    return Survey(count, locate, scope=scope), Survey(refine, conclude, scope=scope)


def histogram(numbers: torch.Tensor, *, signed: bool = False) -> torch.Tensor:
    """How many float32 ``numbers`` have each upper half, int64 [BINS], in rising order."""
    return torch.bincount(_upper(_bits(numbers, signed), signed), minlength=BINS)


def detail(numbers: torch.Tensor, buckets: Sequence[int], *, signed: bool = False) -> torch.Tensor:
    """How many ``numbers`` of each bucket of :func:`histogram` have each lower half, int64 [buckets, BINS]."""
    inside: list[list[torch.Tensor]] = [[] for _ in buckets]
    for bits in _bits(numbers, signed).split(PIECE):
        upper = _upper(bits, signed)
        for found, bucket in zip(inside, buckets, strict=True):
            found.append(bits[upper == bucket])
    counts = torch.zeros(len(buckets), BINS, dtype=torch.int64, device=numbers.device)
    for row, found, bucket in zip(counts, inside, buckets, strict=True):
        lower = torch.cat(found).bitwise_and_(BINS - 1)
        if signed and bucket < ZERO:
            lower.bitwise_xor_(BINS - 1)  # of numbers below zero the larger magnitude is the lesser
        row.copy_(torch.bincount(lower, minlength=BINS))
    return counts


def places(counts: torch.Tensor, ranks: Sequence[int]) -> dict[str, list[int]]:
    """The bucket that each rank is in by ``counts`` [BINS], the rank within it, and how many numbers lie above it."""
    ends = counts.cumsum(0)
    total, wanted = int(ends[-1]), torch.tensor(ranks, dtype=torch.int64, device=counts.device)
    assert all(0 <= rank < total for rank in ranks), f"ranks {ranks} of {total} numbers"
    buckets = torch.searchsorted(ends, wanted, right=True)
    ranks_within = wanted - ends[buckets] + counts[buckets]
    return {"buckets": buckets.tolist(), "ranks": ranks_within.tolist(), "beyond": (total - ends[buckets]).tolist()}


def values(counts: torch.Tensor, found: Mapping[str, list[int]], *, signed: bool = False) -> dict[str, list[Any]]:
    """The numbers at the ranks that :func:`places` located, from the ``counts`` [ranks, BINS] of :func:`detail`."""
    bits, above = [], []
    for bucket, rank, beyond, row in zip(found["buckets"], found["ranks"], found["beyond"], counts, strict=True):
        ends = row.cumsum(0)
        lower = int(torch.searchsorted(ends, rank, right=True))
        key = (bucket - ZERO if signed else bucket) * BINS + lower
        bits.append(key ^ 0x7FFFFFFF if key < 0 else key)
        above.append(int(ends[-1] - ends[lower] + row[lower]) + beyond)
    return {"values": torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist(), "above": above}


def _bits(numbers: torch.Tensor, signed: bool) -> torch.Tensor:
    """The bits of each number, int32 [numbers]; of -0.0, if the sign counts, those of the 0.0 that it equals."""
    return (numbers + 0.0 if signed else numbers.contiguous()).view(torch.int32).flatten()


def _upper(bits: torch.Tensor, signed: bool) -> torch.Tensor:
    """The bucket of each number: int16 by magnitude, which is fastest; int32 if the sign counts."""
    upper = (bits >> 16).to(torch.int16)
    if not signed:
        return upper.bitwise_and_(0x7FFF)
    flipped = (upper >> 15).bitwise_and_(0x7FFF).bitwise_xor_(upper)
    return flipped.to(torch.int32).add_(ZERO)
