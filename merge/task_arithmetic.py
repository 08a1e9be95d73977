"""Task arithmetic: add the weighted sum of the task vectors to the base."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._consensus import taken
from merge._options import SumOptions, shares_of
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import Slab

PAPER = "Ilharco et al. 2022, arXiv:2212.04089"
VERSION = 1
MERGEKIT = {
    "task_arithmetic": Mergekit(
        {"normalize": "normalize", "lambda": "scaling", "int8_mask": None, "rescale": None},
        {"weight": "weights", "density": None},
        needed=("weight",),
        options={"scaling": 1.0},
    )
}


class Options(SumOptions):
    """Options of task arithmetic."""

    scaling: float = Field(0.4, description="lambda: what the sum of the task vectors is multiplied by")
    normalize: bool = Field(False, description="divide the sum by the sum of the weights")


class Method:
    """theta = theta_0 + lambda sum_i w_i tau_i, with w_i = 1 unless weights are given (section 2 of the paper)."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        result = slab.base.clone()
        for share, delta in zip(shares_of(self.options, len(slab.models)), taken(slab), strict=True):
            result.add_(delta, alpha=self.options.scaling * share)
        return result
