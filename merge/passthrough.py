"""Passthrough: one model as it is, or scaled; layers are stacked by a configuration (merge config)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import MergeOptions, Slab

PAPER = "mergekit (Goddard et al. 2024, arXiv:2403.13257), passthrough"
VERSION = 1
MERGEKIT = {"passthrough": Mergekit(each={"scale": "scale"}, base="model")}


class Options(MergeOptions):
    """Options of passthrough."""

    scale: float = Field(1.0, description="what every tensor is multiplied by")


class Method:
    """s theta."""

    BASE, LEAST, MOST = "refused", 1, 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        scale = self.options.scale
        return slab.models[0] if scale == 1 else slab.models[0] * scale
