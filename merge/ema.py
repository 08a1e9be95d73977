"""EMA: the exponential moving average of checkpoints in the order given, the latest last.

theta <- mu theta + (1 - mu) theta_t for each checkpoint after the first: the offline form of momentum interpolation.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from weightworks.stage.merging import MergeOptions, Slab

PAPER = "Stojanovski et al. 2022, arXiv:2211.03186"
VERSION = 1


class Options(MergeOptions):
    """Options of the moving average."""

    mu: float = Field(0.5, ge=0, lt=1, description="what is kept of the average when the next checkpoint comes in")


class Method:
    """sum_t c_t theta_t, c_1 = mu^(T-1), c_t = (1 - mu) mu^(T-t)."""

    BASE, LEAST, MOST = "refused", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        average = slab.models[0].clone()
        for model in slab.models[1:]:
            average.lerp_(model, 1 - self.options.mu)
        return average
