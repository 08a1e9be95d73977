"""Karcher mean: the point on the sphere whose squared arcs to the models are least in sum, with their mean length.

A tensor of each model is one vector. The iteration (log map, mean, exponential map) runs on the coefficients of the models
alone, so that it costs two passes however many steps it takes. Vectors of no length have no direction and are left out
of it.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._directions import combined, cosines, survey
from merge._options import SumOptions, shares_of
from weightworks.stage.merging import Slab, Survey

PAPER = "Karcher 1977, doi:10.1002/cpa.3160300502; as a merge: mergekit 0.1.5"
VERSION = 1


class Options(SumOptions):
    """Options of the Karcher mean."""

    max_iter: int = Field(100, ge=1, description="most steps of the iteration; they cost next to nothing")
    tol: float = Field(1e-9, gt=0, description="length of a step, in radians, at which it ends")


class Method:
    """mu times the mean of ||x_i||, mu the Riemannian mean of x_i / ||x_i||."""

    BASE, LEAST, MOST = "refused", 2, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """Lengths and angles."""
        return [survey(self._coefficients)]

    def _coefficients(self, products: torch.Tensor) -> list[float]:
        weights = torch.tensor(shares_of(self.options, len(products)), dtype=torch.float64)
        lengths, angles = cosines(products)
        there = lengths > 0
        if not bool(there.any()):
            return [0.0] * len(products)
        mean = mean_direction(angles, weights * there, self.options.max_iter, self.options.tol)
        return torch.where(there, mean * (weights @ lengths) / lengths.clamp(min=1e-300), 0.0).tolist()

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        return combined(slab, found)


def mean_direction(angles: torch.Tensor, weights: torch.Tensor, steps: int, tol: float) -> torch.Tensor:
    """The mean as coefficients [N] of unit vectors whose cosines are ``angles`` [N, N], float64."""
    weights = weights / weights.sum()

    def length(coefficients: torch.Tensor) -> torch.Tensor:
        return (coefficients @ angles @ coefficients).clamp(min=0).sqrt()

    mean = weights / length(weights).clamp(min=1e-12)
    for _ in range(steps):
        cosine = (angles @ mean).clamp(-1, 1)  # of each unit vector with the mean
        angle = torch.acos(cosine)
        stretch = torch.where(angle > 1e-9, angle / torch.sin(angle).clamp(min=1e-12), torch.ones_like(angle))
        step = weights * stretch - (weights * stretch * cosine).sum() * mean  # the log maps, averaged
        size = length(step)
        if float(size) < tol:
            break
        mean = torch.cos(size) * mean + torch.sin(size) / size * step
        mean = mean / length(mean).clamp(min=1e-12)
    return mean
