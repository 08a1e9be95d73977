"""WiSE-FT: interpolate between a model and its base."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from weightworks.stage.merging import MergeOptions, Slab

PAPER = "Wortsman et al. 2021, arXiv:2109.01903"
VERSION = 1


class Options(MergeOptions):
    """Options of WiSE-FT. One half is the paper's choice when nothing can be tuned."""

    alpha: float = Field(0.5, ge=0, le=1, description="share of the model; 0 is the base, 1 the model, bit for bit")


class Method:
    """theta = (1 - alpha) theta_0 + alpha theta_1."""

    BASE, LEAST, MOST = "required", 1, 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        return torch.lerp(slab.base, slab.models[0], self.options.alpha)
