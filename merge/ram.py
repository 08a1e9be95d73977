"""RAM: changes that one model made alone are added, those that several made are averaged.

A model touched a weight where its change exceeds ``epsilon``. With ``--plus`` what is a model's own is made larger, the more so
the more of its changes it shares with others, which the average makes smaller (RAM+).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "mergekit 0.1.5, ram and ramplus_tl; from its documentation"
VERSION = 1


class Options(MergeOptions):
    """Options of RAM."""

    epsilon: float = Field(1e-5, ge=0, description="change of a weight up to which it counts as untouched")
    plus: bool = Field(False, description="make up for what averaging takes from models that share changes (RAM+)")
    rate: float = Field(0.1, ge=0, description="r of RAM+: growth of a model's own changes by its share of common ones")
    limit: float = Field(0.2, ge=0, description="alpha of RAM+: largest ratio of common to own changes that counts")


class Method:
    """theta_0 + sum of s_i tau_i where i alone touched, + mean of tau_i of those that touched elsewhere."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """For RAM+, how many changes are each model's own, and how many common."""
        return [Survey(self._count, self._scales)] if self.options.plus else []

    def _touched(self, slab: Slab) -> tuple[list[torch.Tensor], torch.Tensor]:
        touched = [delta.abs() > self.options.epsilon for delta in slab.deltas]
        return touched, torch.stack(touched).sum(0)  # [rows, ...], how many models touched

    def _count(self, slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        touched, count = self._touched(slab)
        own = torch.stack([(one & (count == 1)).sum() for one in touched])
        return {"own": own, "common": torch.stack([(one & (count > 1)).sum() for one in touched])}

    def _scales(self, sums: Mapping[str, torch.Tensor], found: Any) -> list[float]:
        ratio = sums["common"] / sums["own"].clamp(min=1)
        return (1 + self.options.rate * ratio.clamp(max=self.options.limit)).tolist()

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        touched, count = self._touched(slab)
        total = torch.zeros_like(slab.base)
        for number, (delta, one) in enumerate(zip(slab.deltas, touched, strict=True)):
            scale = 1.0 if found is None else found[number]
            total += torch.where(count == 1, delta * scale, delta) * one
        return slab.base + total / count.clamp(min=1)
