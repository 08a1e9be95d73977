"""TSV-Merge: of each task vector the leading singular directions, made orthogonal to those of the others.

Each task keeps the same share of the rank; the kept directions of all tasks, put side by side, are replaced by the nearest
orthonormal ones (their polar factors), so that tasks interfere less. Vectors are averaged.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._options import MatrixOptions
from merge._spectra import polar
from weightworks.stage.merging import Slab

PAPER = "Gargiulo et al. 2024, arXiv:2412.00081"
VERSION = 1


class Options(MatrixOptions):
    """Options of TSV-Merge."""

    scaling: float = Field(1.0, description="alpha: what the merged task vector is multiplied by")


class Method:
    """theta_0 + alpha U_p S V_p', U_p and V_p the polar factors of all tasks' kept directions."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def whole(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.options.decomposed(name, shape)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        if not self.options.decomposed(slab.name, slab.shape):
            return slab.base + torch.stack(slab.deltas).mean(0)
        rank = max(min(slab.shape) // len(slab.models), 1)
        kept = [torch.linalg.svd(delta, full_matrices=False) for delta in slab.deltas]
        u = torch.cat([one.U[:, :rank] for one in kept], dim=1)  # [m, T rank]
        sigma = torch.cat([one.S[:rank] for one in kept])  # [T rank]
        v = torch.cat([one.Vh[:rank] for one in kept])  # [T rank, n]
        return slab.base + self.options.scaling * ((polar(u) * sigma) @ polar(v))
