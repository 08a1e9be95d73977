"""Arcee Fusion: take over from a second model only the changes that stand out.

Importance of an element is its change times the divergence of its row, KL of the rows' softmax. What is as important as the
median plus 1.5 times the distance between the quartiles is taken whole. Quartiles are exact (between two elements, their
mean by distance), where mergekit draws a million elements at random, so that two of its runs differ; and the divergence
of rows that differ by 1e-3 is 1e-7, which only float64 resolves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field

from merge._quantiles import surveys
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Arcee AI 2025; from the documentation of mergekit 0.1.5, arcee_fusion"
VERSION = 1
MERGEKIT = {
    "arcee_fusion": Mergekit(
        differs="quartiles are of all elements; mergekit draws a million at random, so that two of its runs differ"
    )
}
PIECE = 1 << 16  # elements that are converted to float64 at a time


class Options(MergeOptions):
    """Options of Arcee Fusion."""

    spread: float = Field(
        1.5, ge=0, description="how many distances between the quartiles above the median importance begins"
    )


class Method:
    """a + m (b - a), m = [importance >= median + spread (q_3 - q_1)]; a is the base, b the model."""

    BASE, LEAST, MOST = "required", 1, 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> tuple[Survey, ...]:
        """The quartiles of the importance in each tensor."""
        return surveys(self._importance, _ranks, scope="tensor")

    def _importance(self, slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield "importance", importance(slab)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        first, median, third = quartiles(found["importance"]["values"], math.prod(slab.shape))
        taken = importance(slab) >= median + self.options.spread * (third - first)
        return torch.where(taken, slab.models[0], slab.base)


def importance(slab: Slab) -> torch.Tensor:
    """|b - a| KL(softmax(b) || softmax(a)) by row; a vector is one row. Float32 of the slab's shape."""
    assert slab.base is not None
    a, b = slab.base, slab.models[0]
    rows = (1, -1) if a.dim() == 1 else (a.shape[0], -1)
    result = (b - a).abs_().reshape(rows)  # [rows, columns]
    height = max(1, PIECE // max(result.shape[1], 1))
    pieces = zip(*(one.reshape(rows).split(height) for one in (a, b)), result.split(height), strict=True)
    for before, after, change in pieces:
        p, q = after.double().log_softmax(1), before.double().log_softmax(1)
        change.mul_((p.exp() * (p - q)).sum(1, keepdim=True).clamp(min=0))
    return result.reshape(a.shape)


def _ranks(name: str, total: int) -> list[int]:
    """The ranks on either side of each quartile; quarter k of n numbers lies at rank k (n - 1) / 4."""
    places = [quarter * (total - 1) / 4 for quarter in (1, 2, 3)]
    return [rank for place in places for rank in (math.floor(place), math.ceil(place))]


def quartiles(values: Sequence[float], total: int) -> list[float]:
    """The quartiles of ``total`` numbers from those at :func:`_ranks`."""
    shares = [quarter * (total - 1) / 4 % 1 for quarter in (1, 2, 3)]
    return [low + share * (high - low) for share, low, high in zip(shares, values[::2], values[1::2], strict=True)]
