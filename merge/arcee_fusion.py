"""Arcee Fusion: take over from a second model only the changes that stand out.

Importance of an element is its change times the divergence of its row, KL of the rows' softmax. What is as important as the
median plus 1.5 times the distance between the quartiles is taken whole. Quartiles are exact, where mergekit draws a
million elements at random, so that two of its runs differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from merge._quantiles import surveys
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Arcee AI 2025; from the documentation of mergekit 0.1.5, arcee_fusion"
VERSION = 1


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
        return surveys(self._importance, _quartiles, scope="tensor")

    def _importance(self, slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield "importance", importance(slab)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        first, median, third = found["importance"]["values"]
        taken = importance(slab) >= median + self.options.spread * (third - first)
        return torch.where(taken, slab.models[0], slab.base)


def importance(slab: Slab) -> torch.Tensor:
    """|b - a| KL(softmax(b) || softmax(a)) by row; a vector is one row. Float32 of the slab's shape."""
    assert slab.base is not None
    a, b = slab.base, slab.models[0]
    rows = (1, -1) if a.dim() == 1 else (a.shape[0], -1)
    p, q = b.reshape(rows).log_softmax(1), a.reshape(rows).log_softmax(1)
    divergence = (p.exp() * (p - q)).sum(1, keepdim=True).clamp(min=0)  # [rows, 1]
    return ((b - a).abs().reshape(rows) * divergence).reshape(a.shape)


def _quartiles(name: str, total: int) -> list[int]:
    """Ranks of the quartiles."""
    return [min(total * quarter // 4, total - 1) for quarter in (1, 2, 3)]
