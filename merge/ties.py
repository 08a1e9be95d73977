"""TIES: keep the largest of each task vector, elect a sign for every weight, average those that agree with it.

As in the paper and its authors' code, one threshold holds for the whole model: the largest ``density`` of each task vector
are kept, found exactly in two passes; signs are those of the sum of what is kept, and where that cancels to zero the
sign that most other weights have, which takes a third pass. The form of mergekit has a threshold for each tensor, and
elects the sign of the weighted sum, positive where it is zero. Numbers equal to the threshold are all kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from merge._consensus import elected, fuse, taken, trim
from merge._options import SparseOptions, called, number_of, sparse, weights_of
from merge._quantiles import surveys
from weightworks.stage.merging import Slab, Survey

PAPER = "Yadav et al. 2023, arXiv:2306.01708"
VERSION = 1
MERGEKIT = {"ties": sparse(form="mergekit")}


class Options(SparseOptions):
    """Options of TIES. Density and lambda are those the paper recommends when nothing can be tuned (section 4)."""

    FORMS: ClassVar = {"mergekit": {"density": 1.0, "scope": "tensor", "election": "weighted", "vectors": "sparse"}}

    density: float = Field(
        0.2, gt=0, le=1, description="share of each task vector that is kept, the largest; mergekit: 1"
    )
    scope: Literal["model", "tensor"] = Field(
        "model", description="the largest of the whole model, or of each tensor; mergekit: tensor"
    )


class Method:
    """theta = theta_0 + lambda tau_m, where tau_m is the mean of the trimmed tau_i that agree with gamma (Algorithm 1)."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """The thresholds, then the sign of the majority of the model, which decides where the sum is zero."""
        found: list[Survey] = []
        if not self.options.dense:
            found += surveys(self._compared, self._ranks, scope=self.options.scope)
        if self.options.election == "plain":
            found.append(Survey(self._signs, _majority, scope=self.options.scope))
        return found

    def _compared(self, slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.options.spares(slab.shape):
            for number, delta in enumerate(taken(slab)):
                yield called(number), delta

    def _ranks(self, name: str, total: int) -> list[int]:
        """The authors' code keeps all from rank d - int(d K) of 1 to d on, one more than the share; mergekit does not."""
        kept = int(total * self.options.density_of(number_of(name)))
        kept = kept + 1 if self.options.scope == "model" else max(kept, 1)
        return [max(total - kept, 0)]

    def _trimmed(self, slab: Slab, found: Any) -> list[torch.Tensor]:
        deltas = taken(slab)
        if not self.options.dense and not self.options.spares(slab.shape):
            for number, delta in enumerate(deltas):
                trim(delta, found[called(number)]["values"][0])
        return deltas

    def _signs(self, slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        signs = elected(self._trimmed(slab, found), 0.0)
        return {"majority": signs.sum(dtype=torch.float64).long()}

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        options = self.options
        assert slab.base is not None
        merged = fuse(
            self._trimmed(slab, found),
            weights_of(options, len(slab.models)),
            election=options.election,
            normalize=options.normalize,
            tied=found["majority"] if options.election == "plain" else 0.0,
        )
        return slab.base.add_(merged, alpha=options.scaling)


def _majority(sums: Mapping[str, torch.Tensor], found: Any) -> Any:
    return {**(found or {}), "majority": int(sums["majority"].sign())}
