"""RAM: changes that one model made alone are added, those that several made are averaged.

A model touched a weight where its change exceeds ``epsilon``. With ``--plus`` what is a model's own is made larger, the more so
the more of its changes it shares with others, which the average makes smaller (RAM+): by counts over the whole model, or
tensor by tensor as mergekit's ramplus_tl does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from merge._consensus import taken
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Yuan et al. 2026, arXiv:2601.13572"
VERSION = 1
MERGEKIT = {
    "ram": Mergekit({"epsilon": "epsilon"}),
    "ramplus_tl": Mergekit(
        {"epsilon": "epsilon", "r": "rate", "alpha": "limit"}, options={"plus": True, "scope": "tensor"}
    ),
}


class Options(MergeOptions):
    """Options of RAM."""

    epsilon: float = Field(1e-5, ge=0, description="change of a weight up to which it counts as untouched")
    plus: bool = Field(False, description="make up for what averaging takes from models that share changes (RAM+)")
    rate: float = Field(0.1, ge=0, description="r of RAM+: growth of a model's own changes by its share of common ones")
    limit: float = Field(0.2, ge=0, description="alpha of RAM+: largest ratio of common to own changes that counts")
    scope: Literal["model", "tensor"] = Field(
        "model", description="RAM+: changes are counted over the whole model, or (mergekit) over each tensor"
    )


class Method:
    """theta_0 + sum of s_i tau_i where i alone touched, + mean of tau_i of those that touched elsewhere."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """For RAM+, how many changes are each model's own, and how many common."""
        return [Survey(self._count, self._scales, scope=self.options.scope)] if self.options.plus else []

    def _touched(self, slab: Slab) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The task vectors without what is below epsilon, and at how many of them each weight was touched, [rows, ...]."""
        deltas = [torch.hardshrink(delta, self.options.epsilon) for delta in taken(slab)]
        count = torch.zeros_like(deltas[0])
        for delta in deltas:
            count += delta != 0
        return deltas, count

    def _count(self, slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        deltas, count = self._touched(slab)
        own = torch.stack([torch.count_nonzero((delta != 0) & (count == 1)) for delta in deltas])
        return {"own": own, "common": torch.stack([torch.count_nonzero(delta) for delta in deltas]) - own}

    def _scales(self, sums: Mapping[str, torch.Tensor], found: Any) -> list[float]:
        ratio = sums["common"] / sums["own"].clamp(min=1)
        return (1 + self.options.rate * ratio.clamp(max=self.options.limit)).tolist()

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        deltas, count = self._touched(slab)
        total = torch.zeros_like(slab.base)
        for number, delta in enumerate(deltas):
            total += delta if found is None else torch.where(count == 1, delta * found[number], delta)
        return slab.base.add_(total.div_(count.clamp_(min=1)))
