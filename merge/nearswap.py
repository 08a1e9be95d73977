"""NearSwap: take from a second model what is close to the first, and the less the farther apart they are.

Weights nearer to each other than ``t`` become the second model's; of others the second model has the share t / |a - b|.
``t`` is absolute, so it does not go with the size of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import MergeOptions, Slab

PAPER = "alchemonaut 2024 (QuartetAnemoi model card); as a merge: mergekit"
VERSION = 1
MERGEKIT = {"nearswap": Mergekit({"t": "t"}, needed=("t",))}


class Options(MergeOptions):
    """Options of NearSwap."""

    t: float = Field(1e-4, ge=0, description="distance up to which the second model's weight is taken whole")


class Method:
    """w b + (1 - w) a with w = min(t / |a - b|, 1); a is the base, b the model."""

    BASE, LEAST, MOST = "required", 1, 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        delta = slab.models[0] - slab.base
        return slab.base + delta.clamp(-self.options.t, self.options.t)  # w (b - a), as |w (b - a)| = min(t, |b - a|)
