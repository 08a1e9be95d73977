"""RegMean: the weight whose outputs come closest to those of all models, each on the inputs it saw.

Every linear layer's merged weight solves a least-squares problem in closed form, given the Gram matrix of the layer's inputs
for each model (``compress stats --kind gram``). What is no linear layer is averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field

from merge._options import weights_of
from weightworks.errors import MethodError
from weightworks.stage.merging import Slab, StatisticsOptions

PAPER = "Jin et al. 2023, arXiv:2212.09849"
VERSION = 1
ROWS = "gram of rows"  # what the Gram matrix of a weight that is stored as [in, out] is called


class Options(StatisticsOptions):
    """Options of RegMean."""

    off_diagonal: float = Field(
        0.9,
        ge=0,
        le=1,
        description="a: what entries beside the diagonal of each Gram matrix are multiplied by (section 4)",
    )
    damping: float = Field(
        1e-4,
        gt=0,
        le=1,
        description="share of the mean diagonal added to the diagonal: where little was seen, the mean",
    )


class Method:
    """W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1, W_i [out, in], G_i [in, in] shrunk to its diagonal (equation 2)."""

    BASE, LEAST, MOST, WHOLE, SIDE = "optional", 1, None, True, "gram"

    def __init__(self, options: Options) -> None:
        self.options = options

    def files(self) -> list[Any]:
        return list(self.options.files())

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        weights = weights_of(self.options, len(slab.models))
        if not any(slab.side):
            return mean(slab.models, weights)
        if ROWS in slab.side[0]:  # the weight is stored as [in, out]
            turned = [model.T for model in slab.models]
            return self._solve(slab.name, turned, (side[ROWS] for side in slab.side), weights).T
        return self._solve(slab.name, slab.models, (side["gram"] for side in slab.side), weights)

    def _solve(
        self, name: str, models: Sequence[torch.Tensor], grams: Iterable[torch.Tensor], weights: Sequence[float]
    ) -> torch.Tensor:
        """The mean of ``models`` [out, in], and what their differences from it come to; in float64, one of ``grams`` [in, in]
        at a time."""
        centre = mean(models, weights).double()  # [out, in]
        moved = torch.zeros_like(centre)
        total: torch.Tensor | None = None  # [in, in]
        for weight, model, matrix in zip(weights, models, grams, strict=True):
            gram = shrunk(matrix, self.options.off_diagonal).mul_(weight)
            moved.addmm_(model.double().sub_(centre), gram)
            total = gram if total is None else total.add_(gram)
        assert total is not None
        if not total.any():  # no token reached this layer in any model
            return centre
        # The differences from the mean sum to zero, so the same damping for all is one of them towards the mean.
        total.diagonal().add_(self.options.damping * float(total.diagonal().mean()))
        lower, failed = torch.linalg.cholesky_ex(total)
        if int(failed):
            raise MethodError(
                f"merge.regmean: the Gram matrices of '{name}' do not sum to a positive definite one",
                hint="raise --damping, lower --off-diagonal, or gather statistics on more text",
            )
        return centre.add_(torch.cholesky_solve(moved.T, lower).T)


def mean(models: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean: the first model and the others' differences from it, so that equal models stay as they are."""
    total, result = sum(weights), models[0].clone()
    for weight, model in zip(weights[1:], models[1:], strict=True):
        result.add_(model - models[0], alpha=weight / total)
    return result


def shrunk(gram: torch.Tensor, off_diagonal: float) -> torch.Tensor:
    """a G + (1 - a) diag(G) in float64, for ``gram`` [in, in] and a = ``off_diagonal``."""
    result = gram.double()
    diagonal = result.diagonal().clone()
    result.mul_(off_diagonal)
    result.diagonal().copy_(diagonal)
    return result
