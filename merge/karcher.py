"""Karcher mean: the point on the sphere whose squared arcs to the models are least in sum, with their mean length.

A tensor of each model is one vector, or with a base its task vector. The iteration (log map, mean, exponential map) runs on
the coefficients of the models alone, so that it costs two passes however many steps it takes. Models whose directions
cancel have no such point: their mean stands for it.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._directions import OPPOSED, along, combined, cosines, survey
from merge._options import SumOptions, shares_of
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import Slab, Survey

PAPER = "Karcher 1977, doi:10.1002/cpa.3160300502; as a merge: mergekit 0.1.5"
VERSION = 1
MERGEKIT = {
    "karcher": Mergekit({"max_iter": "max_iter", "tol": "tol"}, options={"max_iter": 10, "tol": 1e-5}, base="model")
}


class Options(SumOptions):
    """Options of the Karcher mean."""

    max_iter: int = Field(100, ge=1, description="most steps of the iteration; they cost next to nothing")
    tol: float = Field(1e-9, gt=0, description="length of a step, in radians, at which it ends")


class Method:
    """mu times the mean of ||x_i||, mu the Riemannian mean of x_i / ||x_i||."""

    BASE, LEAST, MOST = "optional", 2, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """Lengths and angles."""
        return [survey(self._coefficients)]

    def _coefficients(self, products: torch.Tensor) -> torch.Tensor:
        weights = products.new_tensor(shares_of(self.options, len(products)))
        lengths, angles = cosines(products)
        mean = mean_direction(angles, weights * (lengths > 0), self.options.max_iter, self.options.tol)
        return along(mean, weights, products)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        return combined(slab, found)


def mean_direction(angles: torch.Tensor, weights: torch.Tensor, steps: int, tol: float) -> torch.Tensor:
    """The mean as coefficients [N] of unit vectors whose cosines are ``angles`` [N, N]; zero where they cancel.

    ``weights`` [N] are float64, of no particular sum. A vector exactly opposite to the mean has no direction towards it, and
    is left out of the step.
    """

    def length(coefficients: torch.Tensor) -> torch.Tensor:
        return (coefficients @ angles @ coefficients).clamp(min=0).sqrt()

    total = weights.sum()
    if float(total) == 0 or float(length(weights / total)) < OPPOSED:
        return torch.zeros_like(weights)
    weights = weights / total
    mean = weights / length(weights)
    for _ in range(steps):
        cosine = (angles @ mean).clamp(-1, 1)  # of each unit vector with the mean
        angle = torch.acos(cosine)
        sine = torch.sin(angle)
        stretch = torch.where(sine > OPPOSED, angle / sine.clamp(min=OPPOSED), (cosine > 0).to(angle))
        step = weights * stretch - (weights * stretch * cosine).sum() * mean  # the log maps, averaged
        size = length(step)
        if float(size) < tol:
            break
        mean = torch.cos(size) * mean + torch.sin(size) / size * step
        mean = mean / length(mean)
    return mean
