"""Model soup: the average of the models' weights, uniform or weighted."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from weightworks.stage.merging import Slab, WeightedOptions

PAPER = "Wortsman et al. 2022, arXiv:2203.05482"
VERSION = 1


class Options(WeightedOptions):
    """Options of soups."""

    normalize: bool = Field(True, description="divide the weighted sum by the sum of the weights")


class Method:
    """theta = sum_i w_i theta_i / sum_i w_i (section 2 of the paper: the uniform soup has equal weights)."""

    BASE, LEAST, MOST = "optional", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        weights = self.options.each("weights", len(slab.models)) or [1.0] * len(slab.models)
        total = sum(weights) if self.options.normalize else 1.0
        result = slab.models[0] * (weights[0] / total)
        for weight, model in zip(weights[1:], slab.models[1:], strict=True):
            result.add_(model, alpha=weight / total)
        return result
