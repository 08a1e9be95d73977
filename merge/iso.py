"""Iso-C: the sum of the task vectors with its singular values made equal.

Directions that few tasks share come to count as much as those that all do. Vectors are averaged.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._options import MatrixOptions
from merge._spectra import significant
from weightworks.stage.merging import Slab

PAPER = "Marczak et al. 2025, arXiv:2502.04959"
VERSION = 1


class Options(MatrixOptions):
    """Options of Iso-C."""

    scaling: float = Field(1.0, description="alpha: what the merged task vector is multiplied by")


class Method:
    """theta_0 + alpha mean(sigma) U V', U sigma V' the decomposition of sum_i tau_i."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.options.decomposed(name, shape)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        total = torch.stack(slab.deltas).sum(0)
        if not self.options.decomposed(slab.name, slab.shape):
            return slab.base + total / len(slab.models)
        u, sigma, vt = torch.linalg.svd(total, full_matrices=False)  # [m, k], [k], [k, n]
        rank = significant(sigma)  # directions of no length are noise
        return slab.base + self.options.scaling * sigma.mean() * (u[:, :rank] @ vt[:rank])
