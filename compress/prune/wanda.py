"""Wanda: a weight is worth its magnitude times the norm of its input, compared within each row.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695). Kept weights stay as
they are.
"""

from __future__ import annotations

import torch

from compress.columns import Columns
from compress.prune._pruner import Scored
from compress.sparsity import SparsityOptions

PAPER = "Sun et al. 2023, arXiv:2306.11695"
VERSION = 1


class Options(SparsityOptions):
    """Options of Wanda."""


class Method(Scored):
    """Wanda as a blockwise method."""

    def score(self, weight: torch.Tensor, columns: Columns) -> torch.Tensor:
        return weight.abs() * columns.norms()  # |W_ij| ||X_j||, up to a factor of the layer
