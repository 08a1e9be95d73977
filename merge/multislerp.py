"""MultiSLERP: the weighted mean direction of several models, with the weighted mean of their lengths.

A tensor of each model (with a base: of each task vector) is one vector. mergekit projects the unit vectors onto the tangent
space at their normalized mean and comes back by the exponential map; as the weighted sum of the projections is zero
there, what remains is the mean direction itself. Models whose directions cancel have none: their mean stands for it.
"""

from __future__ import annotations

from typing import Any

import torch

from merge._directions import along, combined, survey
from merge._options import SumOptions, shares_of
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import Slab, Survey

PAPER = "mergekit 0.1.5, multislerp; from its documentation"
VERSION = 1
MERGEKIT = {
    "multislerp": Mergekit(
        {"normalize_weights": "normalize", "eps": None}, {"weight": "weights"}, needed=("weight",), base="optional"
    )
}


class Options(SumOptions):
    """Options of MultiSLERP."""


class Method:
    """m sum_i w_i ||x_i||, m the normalized sum_i w_i x_i / ||x_i||."""

    BASE, LEAST, MOST = "optional", 2, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """Lengths and angles."""
        return [survey(self._coefficients)]

    def _coefficients(self, products: torch.Tensor) -> torch.Tensor:
        weights = products.new_tensor(shares_of(self.options, len(products)))
        return along(weights, weights, products)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        return combined(slab, found)
