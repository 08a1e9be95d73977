"""Model Stock: from the mean of the models as far back to the base as the angles between them tell.

Fine-tuned models lie about a centre on a shell; the smaller the cosine between their task vectors, the more of them is
noise. The cosine is the mean over pairs, of a tensor or of each row (``--filter-wise``). Where task vectors
all but cancel, the formula has a pole: there the base stays.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._directions import combined, combined_by_row, cosines, survey
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Jang et al. 2024, arXiv:2403.19522"
VERSION = 1
MERGEKIT = {
    "model_stock": Mergekit(
        {"filter_wise": "filter_wise"},
        differs="lengths of task vectors have no lower limit: mergekit clamps products of them at 1e-6, so that small tensors "
        "get another share; where task vectors all but cancel the base stays",
    )
}
POLE = 0.5  # 1 + (N - 1) c below which two models cancel by half, and the result would be farther out than they are


class Options(MergeOptions):
    """Options of Model Stock; the paper has no number to tune."""

    filter_wise: bool = Field(False, description="an angle for each row of a matrix; default: for each tensor")


class Method:
    """theta = t mean_i theta_i + (1 - t) theta_0, t = N c / (1 + (N - 1) c)."""

    BASE, LEAST, MOST = "required", 2, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """Lengths and angles; of rows they are taken when they are merged."""
        return [] if self.options.filter_wise else [survey(coefficients)]

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        return combined_by_row(slab, coefficients) if self.options.filter_wise else combined(slab, found)


def coefficients(products: torch.Tensor) -> torch.Tensor:
    """What every task vector is multiplied by, t / N as [..., N], from their Gram matrices [..., N, N]."""
    count = products.shape[-1]
    _, angles = cosines(products)
    pairs = angles.sum((-2, -1)) - angles.diagonal(dim1=-2, dim2=-1).sum(-1)
    cosine = pairs / (count * (count - 1))
    divisor = 1 + (count - 1) * cosine
    share = torch.where(divisor > POLE, cosine / divisor.clamp(min=POLE), 0.0)
    return share[..., None].expand(angles.shape[:-1])
