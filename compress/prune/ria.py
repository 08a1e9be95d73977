"""RIA: a weight is worth its share of its row and of its column, times a power of its input's norm.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (ICLR 2024). Relative
importance keeps whole rows and columns from being pruned away.
"""

from __future__ import annotations

import torch
from pydantic import Field

from compress.columns import Columns
from compress.prune._pruner import Scored
from compress.sparsity import SparsityOptions

PAPER = "Zhang et al. 2024, Plug-and-Play (ICLR 2024)"
VERSION = 1


class Options(SparsityOptions):
    """Options of RIA."""

    exponent: float = Field(0.5, ge=0, le=2, description="power of the input's norm in the score")


class Method(Scored):
    """RIA as a blockwise method."""

    def score(self, weight: torch.Tensor, columns: Columns) -> torch.Tensor:
        magnitude = weight.abs()
        tiny = torch.finfo(torch.float32).tiny  # a row or column of zeros has no shares
        by_row = magnitude / magnitude.sum(1, keepdim=True).clamp(min=tiny)
        by_column = magnitude / magnitude.sum(0, keepdim=True).clamp(min=tiny)
        return (by_row + by_column) * columns.norms() ** self.options.exponent
