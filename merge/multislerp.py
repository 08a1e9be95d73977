"""MultiSLERP: the weighted mean direction of several models, with the weighted mean of their lengths.

A tensor of each model (with a base: of each task vector) is one vector. mergekit projects the unit vectors onto the tangent
space at their normalized mean and comes back by the exponential map; as the weighted sum of the projections is zero
there, what remains is the mean direction itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from merge._directions import combined, cosines, survey
from merge._options import SumOptions, shares_of
from weightworks.errors import MethodError
from weightworks.stage.merging import Slab, Survey

PAPER = "mergekit 0.1.5, multislerp; from its documentation"
VERSION = 1
OPPOSED = 1e-6  # length of a weighted sum of unit vectors below which they have no mean direction


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

    def _coefficients(self, products: torch.Tensor) -> Sequence[float]:
        weights = torch.tensor(shares_of(self.options, len(products)), dtype=torch.float64)
        lengths, angles = cosines(products)
        if not bool((lengths > 0).any()):
            return [0.0] * len(products)
        size = float((weights @ angles @ weights).clamp(min=0).sqrt())
        if size < OPPOSED:
            raise MethodError(
                "multislerp: the models point in opposite directions and have no mean direction",
                hint="choose other --weights, or soup",
            )
        scale = float(weights @ lengths) / size
        return torch.where(lengths > 0, weights * scale / lengths.clamp(min=1e-300), 0.0).tolist()

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        return combined(slab, found)
