"""Merges whose result is a linear combination of the inputs, with coefficients that follow from their inner products.

Lengths and angles of a tensor's inputs are all in their Gram matrix [N, N], which one pass adds up; whatever is done on the
sphere (interpolation, means) is then arithmetic on N numbers, and a second pass adds the inputs up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from weightworks.stage.merging import Slab, Survey

PIECE = 1 << 16  # elements that are converted to float64 at a time
NEARLY = 0.9995  # cosine from which the line stands for the arc: its sine has too few digits left (mergekit's figure)


def gram(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of ``vectors`` (one shape), float64 [N, N]."""
    flat = [vector.flatten() for vector in vectors]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for start in range(0, flat[0].numel(), PIECE):
        piece = torch.stack([vector[start : start + PIECE].double() for vector in flat])
        total += piece @ piece.T
    return total


def survey(choose: Callable[[torch.Tensor], Sequence[float]]) -> Survey:
    """A survey of the Gram matrix of :func:`inputs`; concludes the coefficients that ``choose`` makes of it."""

    def look(slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        return {"gram": gram(inputs(slab))}

    return Survey(look, lambda sums, found: list(choose(sums["gram"])))


def inputs(slab: Slab) -> list[torch.Tensor]:
    """The task vectors, in the memory of the models; without a base the models themselves."""
    if slab.base is None:
        return list(slab.models)
    return [model.sub_(slab.base) for model in slab.models]


def combined(slab: Slab, coefficients: Sequence[float]) -> torch.Tensor:
    """The sum of :func:`inputs`, each times its coefficient, on top of the base if there is one."""
    total = torch.zeros_like(slab.models[0]) if slab.base is None else slab.base.clone()
    for vector, coefficient in zip(inputs(slab), coefficients, strict=True):
        total.add_(vector, alpha=coefficient)
    return total


def arc(dot: float, first: float, second: float, t: float) -> tuple[float, float]:
    """Coefficients of two vectors at ``t`` of the way from the first to the second along the arc between their directions.

    ``dot`` is their inner product, ``first`` and ``second`` their squared lengths. sin((1-t) w) / sin(w) and sin(t w) / sin(w)
    with w the angle (Shoemake 1985); the line where they are nearly parallel, opposite, or one is zero.
    """
    lengths = math.sqrt(first * second)
    cosine = dot / lengths if lengths > 0 else 1.0
    if abs(cosine) > NEARLY:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def cosines(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths [N] and cosines [N, N] from a Gram matrix; zero for vectors of no length."""
    lengths = products.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    return lengths, products * inverse[:, None] * inverse[None, :]
