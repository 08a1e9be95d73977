"""Magnitude pruning: the smallest weights go, of a layer, of each row, or of the whole model.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (arXiv:1506.02626). No text is read,
unless a budget or a repair asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from compress.columns import Columns
from compress.masks import Scope
from compress.prune._global import one_threshold
from compress.prune._pruner import Pruner, Scored, masked, select
from compress.sparsity import SparsityOptions
from weightworks.stage.protocols import Solution, Survey, Target

PAPER = "Han et al. 2015, arXiv:1506.02626"
VERSION = 1


class Options(SparsityOptions):
    """Options of magnitude pruning."""

    scope: Literal["layer", "row", "global"] = Field(
        "layer", description="weights compared with each other: of a layer, a row, or all layers (unstructured only)"
    )
    min_density: float = Field(0.01, ge=0, le=1, description="share that each layer keeps at least in scope global")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scope != "global":
            return self
        if self.n_of_m is not None or self.budget != "uniform":
            raise ValueError("scope global shares out by one threshold: no N:M pattern, and budget uniform")
        if self.min_density > 1 - self.sparsity:
            raise ValueError(f"min_density = {self.min_density:g} is more than the {1 - self.sparsity:g} that stay")
        return self

    @property
    def compared(self) -> Scope:
        """Weights compared once each layer has its number."""
        return "row" if self.scope == "row" else "layer"


def Method(options: Options) -> Plain | Watching:  # noqa: N802 (a method's class, chosen by what is asked for)
    """Magnitude pruning as a tensorwise method; as a blockwise one if the masks are to be repaired."""
    return Plain(options) if options.repair == "none" else Watching(options)


class Sharing(Pruner):
    """Magnitude pruning, as far as the model is shared out."""

    def surveys(self) -> Sequence[Survey]:
        if self.options.scope == "global":
            return one_threshold(self.options.sparsity, self.options.min_density)
        return super().surveys()


class Plain(Sharing):
    """Magnitude pruning of one tensor after the other."""

    def apply(self, weight: torch.Tensor, target: Target) -> Solution:
        facts: dict[str, Any] = {}
        return masked(weight, select(weight.abs(), target, self.options, self.options.compared), facts)


class Watching(Sharing, Scored):
    """Magnitude pruning that sees inputs, for the repair of its masks."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.scope = options.compared

    def score(self, weight: torch.Tensor, columns: Columns) -> torch.Tensor:
        return weight.abs()
