"""Model Breadcrumbs: drop the smallest elements of each task vector, and the very largest, which are outliers.

Of each tensor the share ``gamma`` of largest magnitude is dropped, then the share ``density`` that comes next is kept. Where
numbers equal a limit all of them are kept. ``--form mergekit --election weighted`` is what mergekit calls breadcrumbs_ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from merge._consensus import fuse, taken, trim
from merge._options import SparseOptions, called, number_of, sparse, weights_of
from merge._quantiles import surveys
from weightworks.stage.merging import Slab, Survey

PAPER = "Davari and Belilovsky 2023, arXiv:2312.06795"
VERSION = 1
MERGEKIT = {
    "breadcrumbs": sparse(None, {"gamma": "gamma"}, form="mergekit", election="none"),
    "breadcrumbs_ties": sparse(None, {"gamma": "gamma"}, form="mergekit", election="weighted"),
}


class Options(SparseOptions):
    """Options of breadcrumbs. Density, gamma and lambda are where the authors' search begins; the paper tunes them."""

    FORMS: ClassVar = {"mergekit": {"density": 1.0, "gamma": 0.01, "scaling": 1.0, "vectors": "sparse"}}

    normalize: bool = Field(False, description="divide the weighted sum by the sum of the weights")
    scaling: float = Field(0.2, description="lambda: what the sum of the task vectors is multiplied by; mergekit: 1")
    election: Literal["none", "plain", "weighted"] = Field(
        "none",
        description="keep of each weight only what agrees with the elected sign: plain elects the sign of the sum, "
        "weighted (mergekit) of the weighted sum, none keeps all",
    )
    density: float = Field(0.15, gt=0, le=1, description="share of each tensor's task vector that is kept; mergekit: 1")
    gamma: float = Field(
        0.006,
        ge=0,
        lt=1,
        description="share that is dropped at the top, or less if the density leaves less; mergekit: 0.01",
    )


class Method:
    """theta = theta_0 + lambda sum_i w_i m_i tau_i, m_i the mask of the middle of the magnitudes (section 3)."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> tuple[Survey, ...]:
        """The least and the greatest magnitude that is kept."""
        return surveys(self._compared, self._ranks, scope="tensor")

    def _compared(self, slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.options.spares(slab.shape):
            for number, delta in enumerate(taken(slab)):
                yield called(number), delta

    def _ranks(self, name: str, total: int) -> list[int]:
        kept = max(int(total * self.options.density_of(number_of(name))), 1)
        top = min(int(total * self.options.gamma), total - kept)
        return [total - kept - top, total - top - 1]

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        options, deltas = self.options, taken(slab)
        assert slab.base is not None
        if not options.spares(slab.shape):
            for number, delta in enumerate(deltas):
                least, greatest = found[called(number)]["values"]
                trim(delta, least).sub_(torch.hardshrink(delta, greatest))
        weights = weights_of(options, len(slab.models))
        merged = fuse(deltas, weights, election=options.election, normalize=options.normalize)
        return slab.base.add_(merged, alpha=options.scaling)
