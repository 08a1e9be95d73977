"""MagMax: of each weight the change that is largest among the models, the later one where they are equal."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from weightworks.stage.merging import MergeOptions, Slab

PAPER = "Marczak et al. 2024, arXiv:2407.06322"
VERSION = 1


class Options(MergeOptions):
    """Options of MagMax."""

    scaling: float = Field(0.5, description="lambda: what the chosen changes are multiplied by")


class Method:
    """theta = theta_0 + lambda tau_m, tau_m the tau_i of largest magnitude, element by element."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        chosen, *others = slab.deltas
        for delta in others:
            chosen = torch.where(delta.abs() >= chosen.abs(), delta, chosen)
        return slab.base + self.options.scaling * chosen
