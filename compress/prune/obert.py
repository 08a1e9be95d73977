"""oBERT: prune by what removal adds to the loss, the curvature being the empirical Fisher matrix of its gradients.

Kurtic et al., "The Optimal BERT Surgeon" (arXiv:2203.07259); matrix-free, Frantar et al., "M-FAC" (arXiv:2107.03356).
One gradient a calibration window, of the unchanged model. All removed weights of a block are made up for jointly; the
released codes add up single-weight solutions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from compress.fisher import Blocks, Fisher, Free
from compress.prune._pruner import Pruner, masked, select
from compress.sparsity import SparsityOptions
from weightworks.stage.protocols import Solution, Target

PAPER = "Kurtic et al. 2022, arXiv:2203.07259; Frantar et al. 2021, arXiv:2107.03356"
VERSION = 1


class Options(SparsityOptions):
    """Options of oBERT."""

    repair: Literal["none"] = Field("none", description="masks are not repaired here: gradients say nothing of inputs")
    fisher: Literal["blocks", "matrix-free"] = Field(
        "blocks", description="blocks: inverse of blocks of consecutive weights; matrix-free: M-FAC, all gradients kept"
    )
    fisher_block: int = Field(16, ge=1, le=512, description="weights a block; memory is this many times the weight's")
    damp: float = Field(1e-7, gt=0, description="added to the diagonal of the Fisher matrix")


class Method(Pruner):
    """oBERT as a method of gradients."""

    def traced(self, elements: int, count: int) -> int:
        options = self.options
        return (
            Blocks.nbytes(elements, options.fisher_block, count) if options.fisher == "blocks" else 4 * elements * count
        )

    def trace(self, elements: int, count: int, device: torch.device) -> Fisher:
        options = self.options
        if options.fisher == "blocks":
            return Blocks(elements, options.fisher_block, count, options.damp, device)
        return Free(elements, count, options.damp, device)

    def answer(self, weight: torch.Tensor, traced: Fisher, target: Target) -> Solution:
        diagonal = traced.inverse_diagonal().view_as(weight)
        scores = weight.square() / diagonal.mul(2)  # what removal adds to the loss
        mask = select(scores, target, self.options, "layer")
        facts: dict[str, Any] = {"added_loss": float(scores.masked_fill(mask, 0).sum())}
        solution = masked(weight, mask, facts)
        solution.weight = traced.updated(weight.flatten(), mask.flatten()).view_as(weight)
        return solution
