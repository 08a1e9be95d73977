"""Fisher merging: average every weight by how much each model's predictions depend on it.

The importance of a weight is its diagonal Fisher information, gathered beforehand (``compress stats --kind fisher``). The
mode of the product of the models' posteriors, each a normal distribution with that precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from merge._options import weights_of
from weightworks.stage.merging import Slab, StatisticsOptions, Survey

PAPER = "Matena and Raffel 2022, arXiv:2111.09832"
VERSION = 1


class Options(StatisticsOptions):
    """Options of Fisher merging."""

    floor: float = Field(
        1e-2,
        gt=0,
        description="epsilon: added to every F, a share of its mean over all weights and models; where no model cares, the mean",
    )
    normalize: bool = Field(
        True,
        description="divide each model's F by its norm over the model first, so that confident models count as others do",
    )


class Method:
    """theta = sum_i w_i (F_i + epsilon) theta_i / sum_i w_i (F_i + epsilon) (equation 5 of the paper)."""

    BASE, LEAST, MOST, SIDE = "optional", 1, None, "fisher"

    def __init__(self, options: Options) -> None:
        self.options = options

    def files(self) -> list[Any]:
        return list(self.options.files())

    def surveys(self) -> list[Survey]:
        """Sum and norm of each model's F, which the scale and the floor follow from."""
        return [Survey(self._sums, self._scales, scope="model")]

    def _sums(self, slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        if not any(slab.side):
            return {}
        fishers = [side["fisher"].double() for side in slab.side]
        return {
            "sums": torch.stack([fisher.sum() for fisher in fishers]),
            "squares": torch.stack([fisher.square().sum() for fisher in fishers]),
            "count": torch.tensor(fishers[0].numel()),
        }

    def _scales(self, sums: Mapping[str, torch.Tensor], found: Any) -> Any:
        if "count" not in sums:
            return {"scales": [], "floor": 0.0}
        norms = sums["squares"].sqrt() if self.options.normalize else torch.ones_like(sums["sums"])
        scales = torch.where(norms > 0, 1 / norms.clamp(min=1e-300), 0.0)
        means = scales * sums["sums"] / int(sums["count"])
        return {"scales": scales.tolist(), "floor": self.options.floor * float(means.mean())}

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        weights = weights_of(self.options, len(slab.models))
        first = slab.models[0]
        if not any(slab.side) or not found["floor"] > 0:
            shares = [torch.full_like(first, weight) for weight in weights]
        else:
            shares = [
                side["fisher"].mul_(scale).add_(found["floor"]).mul_(weight)
                for side, scale, weight in zip(slab.side, found["scales"], weights, strict=True)
            ]
        divisor = torch.zeros_like(first)
        moved = torch.zeros_like(first)  # from the first model: equal models stay as they are, bit for bit
        for share, model in zip(shares, slab.models, strict=True):
            divisor.add_(share)
            moved.addcmul_(share, model - first)
        return moved.div_(divisor).add_(first)
