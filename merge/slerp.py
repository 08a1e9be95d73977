"""SLERP: interpolate two models along the arc between them, tensor by tensor.

A tensor of each model is one vector; its length is not normalized. Nearly parallel vectors are interpolated on the line.
``--t 0`` is the first model, ``--t 1`` the second.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._directions import NEARLY, arc, combined, survey
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Shoemake 1985, doi:10.1145/325165.325242"
VERSION = 1
MERGEKIT = {"slerp": Mergekit({"t": "t"}, needed=("t",), base="first")}


class Options(MergeOptions):
    """Options of SLERP."""

    t: float = Field(0.5, ge=0, le=1, description="place on the way from the first model to the second")


class Method:
    """sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b, w the angle between a and b."""

    BASE, LEAST, MOST = "refused", 2, 2

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """Lengths and angle of the two tensors."""
        t = self.options.t
        return [survey(lambda products: arc(products, t, nearly=NEARLY))]

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        return combined(slab, found)
