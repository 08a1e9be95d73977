"""DARE: drop elements of the task vectors at random and scale up the others, before the models are put together.

As in the paper, survivors are divided by the density, and the sparse models averaged. The form of mergekit keeps the sum of
magnitudes of each tensor instead, which is nearly the same for large tensors and biased for small ones, and adds the
weighted task vectors up: ``--election none`` is what it calls dare_linear, ``--election weighted`` its dare_ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from merge._consensus import fuse, taken
from merge._dropping import DropOptions, dropped_alike, restored, sums_of_magnitudes
from merge._options import sparse, weights_of
from weightworks.stage.merging import Slab, Survey

PAPER = "Yu et al. 2023, arXiv:2311.03099"
VERSION = 1
MERGEKIT = {
    "dare_linear": sparse("l1", form="mergekit", election="none"),
    "dare_ties": sparse("l1", form="mergekit", election="weighted"),
}


class Options(DropOptions):
    """Options of DARE. The density is that of the authors' command for merging language models; the paper varies it."""

    FORMS: ClassVar = {"mergekit": {"density": 1.0, "rescale": "l1", "normalize": False, "vectors": "sparse"}}

    density: float = Field(0.8, gt=0, le=1, description="share of each task vector that survives; mergekit: 1")
    election: Literal["none", "plain", "weighted"] = Field(
        "none",
        description="keep of each weight only what agrees with the elected sign: plain elects the sign of the sum, "
        "weighted (mergekit) of the weighted sum, none keeps all",
    )


class Method:
    """theta = theta_0 + lambda sum_i w_i m_i tau_i / p, m_i ~ Bernoulli(p) (section 3.2), or with TIES's election."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """The sums of magnitudes, if they are to be kept."""
        return [sums_of_magnitudes(self._dropped)] if self.options.rescale == "l1" and not self.options.dense else []

    def _dropped(self, slab: Slab) -> Sequence[torch.Tensor]:
        return taken(slab) if self.options.spares(slab.shape) else dropped_alike(slab, self.options)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        options = self.options
        assert slab.base is not None
        deltas = taken(slab) if options.dense else self._dropped(slab)
        weights = weights_of(options, len(slab.models))
        scaling = options.scaling
        if found is not None:
            restored(deltas, found)
        elif options.rescale == "inverse" and not options.spares(slab.shape):
            if options.densities:
                for number, delta in enumerate(deltas):
                    delta.div_(options.density_of(number))
            else:
                scaling /= options.density
        merged = fuse(deltas, weights, election=options.election, normalize=options.normalize)
        return slab.base.add_(merged, alpha=scaling)
