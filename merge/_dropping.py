"""Task vectors made sparse at random, and made up for what that took away.

tau_i [rows, ...] is the task vector of model i; an element survives with a probability that the method gives. Draws are
a function of seed, tensor, model and place, so that a survey and the merge after it see the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from merge._consensus import taken
from merge._options import SparseOptions
from weightworks.stage.merging import Slab, Survey

Dropped = Callable[[Slab], Sequence["torch.Tensor"]]


class DropOptions(SparseOptions):
    """Options of merges that drop elements of task vectors at random."""

    rescale: Literal["inverse", "l1", "none"] = Field(
        "inverse",
        description="survivors are divided by their probability, or (l1, mergekit) multiplied so that the sum of "
        "magnitudes of the tensor stays what it was",
    )


def sums_of_magnitudes(dropped: Dropped) -> Survey:
    """A survey of the sums of magnitudes by model, float64 [N], ``before`` and ``after`` dropping."""

    def look(slab: Slab, found: Any) -> Mapping[str, torch.Tensor]:
        assert slab.base is not None
        before = [model.sub(slab.base).abs_().sum().double() for model in slab.models]
        after = [delta.abs_().sum().double() for delta in dropped(slab)]
        return {"before": torch.stack(before), "after": torch.stack(after)}

    return Survey(look)


def restored(deltas: Sequence[torch.Tensor], found: Mapping[str, list[float]]) -> Sequence[torch.Tensor]:
    """``deltas`` times the ratio of sums that the survey found, in place; where nothing survived there is none."""
    for delta, before, after in zip(deltas, found["before"], found["after"], strict=True):
        if after > 0:
            delta.mul_(before / after)
    return deltas


def dropped_alike(slab: Slab, options: DropOptions) -> list[torch.Tensor]:
    """Task vectors of which each element survives with the probability of its model; uses up the models."""
    deltas = taken(slab)
    for number, delta in enumerate(deltas):
        delta.mul_(slab.uniform(number).lt_(options.density_of(number)))
    return deltas
