"""DELLA: drop elements of the task vectors at random, small ones more often, then elect signs and fuse what agrees.

The probability to survive rises evenly with the rank of the magnitude within the row, from density - epsilon to density +
epsilon; elements of equal magnitude rank by their place. As in the paper, each survivor is divided by its own probability.
The form of mergekit keeps the sum of magnitudes of each tensor instead; ``--election none`` with it is what it calls
della_linear (which does not normalize).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from merge._consensus import fuse, taken
from merge._dropping import DropOptions, restored, sums_of_magnitudes
from merge._options import sparse, weights_of
from weightworks.stage.merging import Slab, Survey

PAPER = "Deep et al. 2024, arXiv:2406.11617"
VERSION = 1
MERGEKIT = {
    "della": sparse("l1", {"epsilon": "epsilon"}, form="mergekit"),
    "della_linear": sparse("l1", {"epsilon": "epsilon"}, form="mergekit", election="none", normalize=False),
}


class Options(DropOptions):
    """Options of DELLA. Density, epsilon and lambda are those of the authors' page: drop rate 0.3, window 0.14, 1.1."""

    FORMS: ClassVar = {
        "mergekit": {
            "density": 1.0, "epsilon": 0.15, "rescale": "l1", "election": "weighted", "scaling": 1.0, "vectors": "sparse",
        }
    }  # fmt: skip

    scaling: float = Field(1.1, description="lambda: what the merged task vector is multiplied by; mergekit: 1")
    density: float = Field(
        0.7, gt=0, le=1, description="share of each task vector that survives on average; mergekit: 1"
    )
    epsilon: float = Field(
        0.07,
        ge=0,
        lt=1,
        description="how far the probability to survive is from the density for the smallest and the largest of a row: "
        "half the window of the paper; mergekit: 0.15",
    )

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        for density in self.densities or [self.density]:
            least, most = density - self.epsilon, density + self.epsilon
            if density < 1 and (least <= 0 or most > 1):
                raise ValueError(f"density +- epsilon is {least:g} to {most:g}, which must be probabilities above 0")
        return self


class Method:
    """theta = theta_0 + lambda sum_i w_i m_i tau_i / p_i over what agrees with the elected sign (section 3)."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """The sums of magnitudes, if they are to be kept."""
        return [sums_of_magnitudes(self._dropped)] if self.options.rescale == "l1" and not self.options.dense else []

    def _dropped(self, slab: Slab) -> Sequence[torch.Tensor]:
        options, deltas = self.options, taken(slab)
        if options.spares(slab.shape):
            return deltas
        for number, delta in enumerate(deltas):
            if (density := options.density_of(number)) == 1:
                continue
            chance = probabilities(delta, density, options.epsilon)
            kept = slab.uniform(number).lt(chance)
            delta.mul_(kept)
            if options.rescale == "inverse":
                delta.div_(chance)
        return deltas

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        options = self.options
        assert slab.base is not None
        deltas = taken(slab) if options.dense else self._dropped(slab)
        if found is not None:
            restored(deltas, found)
        weights = weights_of(options, len(slab.models))
        merged = fuse(deltas, weights, election=options.election, normalize=options.normalize)
        return slab.base.add_(merged, alpha=options.scaling)


def probabilities(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """The probability of every element of ``delta`` [rows, ...] to survive, by its rank in its row; a vector is one row."""
    rows = delta.abs().view(1, -1) if delta.dim() == 1 else delta.abs().flatten(1)  # [rows, columns]
    columns = rows.shape[1]
    order = rows.argsort(dim=1, stable=True)
    if columns == 1:
        return torch.full_like(delta, density)
    rising = torch.linspace(density - epsilon, density + epsilon, columns, device=delta.device)
    return rows.scatter_(1, order, rising.expand_as(rows)).view_as(delta)
