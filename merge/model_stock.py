"""Model Stock: from the mean of the models as far back to the base as the angles between them tell.

Fine-tuned models lie about a centre on a shell; the smaller the cosine between their task vectors, the more of them is
noise. The cosine is the mean over pairs, of a tensor or of each row (``--filter-wise``). Where task vectors
all but cancel, the formula has a pole: there the base stays.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._directions import combined, cosines, gram, inputs, survey
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Jang et al. 2024, arXiv:2403.19522"
VERSION = 1
POLE = 0.1  # 1 + (N - 1) c below which nothing is left that the models have in common


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
        if not self.options.filter_wise:
            return combined(slab, found)
        assert slab.base is not None
        if not slab.matrix:
            return combined(slab, coefficients(gram(slab.deltas)))
        deltas = torch.stack(inputs(slab))  # [N, rows, columns]
        products = torch.einsum("irc,jrc->rij", deltas.double(), deltas.double())
        share = torch.tensor([coefficients(one)[0] for one in products])  # [rows]
        return slab.base.add_(deltas.sum(0).mul_(share[:, None].to(deltas.device)))


def coefficients(products: torch.Tensor) -> list[float]:
    """What every task vector is multiplied by, t / N, from their Gram matrix [N, N]."""
    count = len(products)
    _, angles = cosines(products)
    cosine = float(angles.sum() - angles.diagonal().sum()) / (count * (count - 1))
    divisor = 1 + (count - 1) * cosine
    return [cosine / divisor if divisor > POLE else 0.0] * count
