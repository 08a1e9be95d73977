"""Merges whose result is a linear combination of the inputs, with coefficients that follow from their inner products.

Lengths and angles of a tensor's inputs are all in their Gram matrix [N, N], which one pass adds up; whatever is done on the
sphere (interpolation, means) is then arithmetic on N numbers, and a second pass adds the inputs up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from weightworks.stage.merging import Slab, Survey

PIECE = 1 << 16  # elements that are converted to float64 at a time
NEARLY = 0.9995  # SLERP: cosine, either way, from which the line stands for the arc (mergekit's figure)
STRAIGHT = 1e-7  # sine of an angle whose arc and line cannot be told apart in float32
OPPOSED = 1e-6  # length of a weighted sum of unit vectors below which they have no mean direction

Choice = Callable[["torch.Tensor"], "torch.Tensor"]  # coefficients [..., N] from Gram matrices [..., N, N], float64


def survey(choose: Choice) -> Survey:
    """A survey of the Gram matrix of :func:`inputs`; concludes the coefficients that ``choose`` makes of it."""

    def look(slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        rows = [vector.reshape(1, -1) for vector in inputs(slab)]
        return {"gram": grams(rows)[0]}

    return Survey(look, lambda sums, found: choose(sums["gram"]).tolist())


def inputs(slab: Slab) -> list[torch.Tensor]:
    """The task vectors, in the memory of the models; without a base the models themselves."""
    if slab.base is None:
        return list(slab.models)
    return [model.sub_(slab.base) for model in slab.models]


def combined(slab: Slab, coefficients: Sequence[float]) -> torch.Tensor:
    """The sum of :func:`inputs`, each times its coefficient, on top of the base if there is one."""
    total = torch.zeros_like(slab.models[0]) if slab.base is None else slab.base
    for vector, coefficient in zip(inputs(slab), coefficients, strict=True):
        total.add_(vector, alpha=coefficient)
    return total


def combined_by_row(slab: Slab, choose: Choice) -> torch.Tensor:
    """The same with coefficients of each row, by its own Gram matrix; a vector is one row."""
    rows = (1, -1) if len(slab.shape) == 1 else (slab.models[0].shape[0], -1)
    vectors = [vector.reshape(rows) for vector in inputs(slab)]  # [rows, columns]
    coefficients = choose(grams(vectors)).to(vectors[0])  # [rows, N]
    total = torch.zeros_like(vectors[0]) if slab.base is None else slab.base.reshape(rows)
    for vector, coefficient in zip(vectors, coefficients.T, strict=True):
        total.addcmul_(vector, coefficient[:, None])
    return total.reshape(slab.models[0].shape)


def grams(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of the rows of ``vectors`` [rows, columns], row by row: float64 [rows, N, N].

    Float32 is converted to float64 piece by piece, so that no copy of a slab is made.
    """
    rows, columns = vectors[0].shape
    height, width = max(1, PIECE // max(columns, 1)), max(1, min(PIECE, columns))
    total = torch.zeros(rows, len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = slice(top, top + height), slice(left, left + width)
            piece = torch.stack([vector[part].double() for vector in vectors], dim=1)  # [height, N, width]
            total[part[0]] += piece @ piece.mT
    return total


def arc(products: torch.Tensor, t: float, *, nearly: float = 1.0) -> torch.Tensor:
    """Coefficients [..., 2] of two vectors at ``t`` of the way from the first to the second, along the arc between them.

    From their Gram matrices ``products`` [..., 2, 2]: sin((1-t) w) / sin(w) and sin(t w) / sin(w), w the angle (Shoemake
    1985). On the line, 1 - t and t, where the cosine exceeds ``nearly`` either way, where w or pi - w is nothing
    but rounding, and where a vector is zero.
    """
    cosine = cosines(products)[1][..., 0, 1].clamp(-1, 1)
    angle = torch.acos(cosine)
    zero = (products.diagonal(dim1=-2, dim2=-1) == 0).any(-1)
    line = (cosine.abs() > nearly) | (torch.sin(angle) < STRAIGHT) | zero
    angle = angle.masked_fill(line, 1.0)
    first = torch.sin((1 - t) * angle) / torch.sin(angle)
    second = torch.sin(t * angle) / torch.sin(angle)
    return torch.stack((first.masked_fill(line, 1 - t), second.masked_fill(line, t)), dim=-1)


def cosines(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths [..., N] and cosines [..., N, N] from Gram matrices [..., N, N]; zero for vectors of no length."""
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    return lengths, products * inverse[..., :, None] * inverse[..., None, :]


def along(direction: torch.Tensor, weights: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Coefficients [N] of vectors whose sum points in ``direction`` and has the mean of their lengths by ``weights`` [N].

    ``direction`` [N] are coefficients of unit vectors. A vector of no length has no direction, but counts in the mean of
    lengths. Where the unit vectors cancel there is no direction: as in :func:`arc`, the mean of the vectors stands for it.
    """
    lengths, angles = cosines(products)
    size = float((direction @ angles @ direction).clamp(min=0).sqrt())
    if size < OPPOSED:
        return weights
    scale = float(weights @ lengths) / size
    return torch.where(lengths > 0, direction * scale / lengths.clamp(min=1e-300), 0.0)
