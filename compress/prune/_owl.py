"""OWL, layer budgets: a block with more outliers among its scores keeps more weights.

Yin et al., "Outlier Weighed Layerwise Sparsity" (arXiv:2310.05175), section 3.2. Scores are Wanda's, of the unchanged model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from compress.columns import Columns
from compress.sparsity import SparsityOptions
from weightworks.stage.protocols import Survey, Target

LEAST, MOST = 0.01, 1.0  # density of a block


def owl(options: SparsityOptions) -> Survey:
    """The survey that shares the density out over the blocks."""
    return Survey(
        look=partial(outliers, ratio=options.owl_outlier),
        conclude=partial(budgets, density=1 - options.sparsity, reach=options.owl_range),
        watch=Columns,
    )


def outliers(
    weights: Sequence[torch.Tensor],
    statistics: Sequence[Columns],
    targets: Sequence[Target],
    found: Any,
    *,
    ratio: float,
) -> dict[str, Any]:
    """How many of a block's scores A = |W| rms(x) are above ``ratio`` times their mean."""
    sizes, total = {}, 0.0
    for place, target in enumerate(targets):
        scores = weights[place].abs() * statistics[place].norms()
        sizes[target.name] = scores.numel()
        total += float(scores.sum(dtype=torch.float64))
    mean, above = total / max(sum(sizes.values()), 1), 0
    for place in range(len(targets)):
        above += int((weights[place].abs() * statistics[place].norms() > ratio * mean).sum())
    return {"sizes": sizes, "outliers": above}


def budgets(figures: Sequence[Mapping[str, Any]], found: Any, *, density: float, reach: float) -> dict[str, int]:
    """How many weights of each tensor stay, exactly as many in all as with one ``density`` everywhere.

    D_l = outliers of block l a weight; density_l = density + r_l - mean(r), r_l = 2 reach (D_l - min D)/(max D - min D),
    held within LEAST and MOST.
    """
    figures = [one for one in figures if one["sizes"]]
    sizes = torch.tensor([sum(one["sizes"].values()) for one in figures], dtype=torch.float64)  # [blocks]
    share = torch.tensor([one["outliers"] for one in figures], dtype=torch.float64) / sizes
    spread = float(share.max() - share.min())
    wish = 2 * reach * (share - share.min()) / spread if spread else torch.zeros_like(share)
    total = int(sizes.sum()) - round(int(sizes.sum()) * (1 - density))
    low, high = -1.0, 1.0 + 2 * reach
    for _ in range(60):  # the shift for which the densities, held within bounds, add up
        middle = (low + high) / 2
        enough = float(((wish + middle).clamp(LEAST, MOST) * sizes).sum()) >= total
        low, high = (low, middle) if enough else (middle, high)
    densities = (wish + high).clamp(LEAST, MOST)
    ideal = {
        name: float(densities[place]) * count
        for place, one in enumerate(figures)
        for name, count in one["sizes"].items()
    }
    keep = {name: math.floor(value) for name, value in ideal.items()}
    by_remainder = sorted(ideal, key=lambda name: keep[name] - ideal[name])  # stable: of equals the first
    for name in by_remainder[: max(0, total - sum(keep.values()))]:
        keep[name] += 1
    return keep
