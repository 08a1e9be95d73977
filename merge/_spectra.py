"""Singular values and vectors of task vectors."""

from __future__ import annotations

import torch

NOISE = 1e-6  # singular values below this share of the largest are float32's rounding: their vectors mean nothing


def significant(sigma: torch.Tensor) -> int:
    """How many of the singular values ``sigma`` [k], falling, are more than rounding."""
    return int((sigma > NOISE * sigma[0]).sum())


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """U V' of ``matrix`` = U diag(sigma) V': the nearest matrix whose rows or columns, whichever are fewer, are orthonormal.

    Directions of no length stay so: where columns depend on each other, which others would be right is arbitrary.
    """
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = significant(sigma)
    return u[:, :rank] @ vt[:rank]
