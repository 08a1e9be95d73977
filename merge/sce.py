"""SCE: select weights on which models differ most, calculate a coefficient for each model, erase minority signs.

Of the weights of a tensor on which models differ at all, the share ``select`` with the largest variance among the task
vectors is kept; a model's coefficient is the mean square of what it keeps; then, as in TIES, only changes of the sign
that the sum has are averaged. A tensor that no model changed stays the base's (mergekit falls back to equal coefficients
for all small changes, and says nothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field

from merge._consensus import fuse, taken
from merge._quantiles import surveys
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Wan et al. 2024 (FuseChat), arXiv:2408.07990"
VERSION = 1
MERGEKIT = {
    "sce": Mergekit(
        {"select_topk": "select", "int8_mask": None},
        differs="coefficients are those of the formula however small the changes are; mergekit makes them equal where the mean "
        "squares of all task vectors sum to less than 1e-6, as those of many fine-tunes do",
    )
}


class Options(MergeOptions):
    """Options of SCE."""

    select: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share that is kept of the weights on which models differ, by their variance; below 1, what all "
        "models changed alike is not kept",
    )


class Method:
    """theta_0 + sum_i c_i tau_i / sum_i c_i over the models that agree with the sign of sum_i tau_i."""

    BASE, LEAST, MOST = "required", 2, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """The least variance that is kept, and the sums of squares of what is kept."""
        found = list(surveys(self._variance, self._rank, scope="tensor")) if self.options.select < 1 else []
        return [*found, Survey(self._squares, _coefficients)]

    def _variance(self, slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
        variance = torch.stack(slab.deltas).var(0, correction=0)
        yield "variance", variance[variance > 0]

    def _rank(self, name: str, total: int) -> list[int]:
        return [total - max(int(total * self.options.select), 1)] if total else []

    def _selected(self, slab: Slab, found: Any) -> list[torch.Tensor]:
        if self.options.select == 1:
            return taken(slab)
        threshold = found["variance"]["values"] or [math.inf]  # without any, models agree on every weight
        kept = torch.stack(slab.deltas).var(0, correction=0) >= threshold[0]
        return [delta.mul_(kept) for delta in taken(slab)]

    def _squares(self, slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        squares = [torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2 for delta in self._selected(slab, found)]
        return {"squares": torch.stack(squares)}

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        if sum(found["coefficients"]) == 0:
            return slab.base
        merged = fuse(self._selected(slab, found), found["coefficients"], election="plain", normalize=True)
        return slab.base.add_(merged)


def _coefficients(sums: Mapping[str, torch.Tensor], found: Any) -> Any:
    total = float(sums["squares"].sum())
    return {
        **(found or {}),
        "coefficients": (sums["squares"] / total).tolist() if total > 0 else [0.0] * len(sums["squares"]),
    }
