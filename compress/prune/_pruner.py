"""What all methods that prune single weights have in common: a method adds its scores, and perhaps an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from compress.columns import Columns
from compress.masks import Scope, pattern_mask, top_mask
from compress.prune._dsnot import repaired
from compress.prune._owl import owl
from compress.sparsity import SparsityOptions
from weightworks.stage.protocols import Solution, Survey, Target


class Pruner:
    """The parts of a pruning method that do not depend on its score."""

    masks = True

    def __init__(self, options: Any) -> None:
        self.options = options

    def scheme(self) -> Any:
        return None

    def refusal(self, shape: tuple[int, int]) -> str | None:
        refusal: str | None = self.options.refusal(shape)
        return refusal

    def surveys(self) -> Sequence[Survey]:
        return [owl(self.options)] if self.options.budget == "owl" else []


class Scored(Pruner, ABC):
    """A blockwise method that is a score of each weight and its input, and leaves the kept weights as they are."""

    scope: Scope = "row"

    @abstractmethod
    def score(self, weight: torch.Tensor, columns: Columns) -> torch.Tensor:
        """How much each of ``weight`` [out, in] is worth, [out, in], at least 0."""

    def held(self, columns: int) -> int:
        return 16 * columns

    def watch(self, columns: int, device: torch.device) -> Columns:
        return Columns(columns, device)

    def solve(self, weights: list[torch.Tensor], statistics: Columns, targets: Sequence[Target]) -> list[Solution]:
        fallbacks = told(statistics)
        solutions = []
        for weight, target in zip(weights, targets, strict=True):
            mask = select(self.score(weight, statistics), target, self.options, self.scope)
            facts: dict[str, Any] = {"tokens": statistics.tokens}
            if self.options.repair == "dsnot":
                mask, facts["swaps"] = repaired(mask, weight, statistics, self.options.n_of_m)
            solution = masked(weight, mask, facts, fallbacks)
            norms = statistics.norms().square()
            kept, whole = (float((w.square() @ norms).sum()) for w in (solution.dense(), weight))
            solution.facts["lost_energy"] = (
                1 - kept / whole if whole > 0 else 0.0
            )  # of outputs, if inputs were uncorrelated
            solutions.append(solution)
        return solutions


def told(statistics: Any) -> list[str]:
    """What was wrong with the statistics, in words."""
    said = [f"{statistics.dropped} inputs were not finite and left out"] if statistics.dropped else []
    return said if statistics.tokens else [*said, "saw no tokens, pruned by the weights alone"]


def select(scores: torch.Tensor, target: Target, options: SparsityOptions, scope: Scope) -> torch.Tensor:
    """The mask that ``options`` ask for, from ``scores`` [out, in]."""
    pattern = options.n_of_m
    if pattern is not None:
        return pattern_mask(scores, pattern)
    return top_mask(scores, options.keep(target, scores.numel()), scope)


def masked(weight: torch.Tensor, mask: torch.Tensor, facts: dict[str, Any], fallbacks: Sequence[str] = ()) -> Solution:
    """``weight`` with zeros where ``mask`` has none, as a method's answer."""
    kept = weight.masked_fill(~mask, 0)
    before, after = (float(w.norm()) for w in (weight, kept))
    facts = {**facts, "relative_weight_error": max(0.0, 1 - (after / before) ** 2) if before > 0 else 0.0}
    return Solution(kept, facts, list(fallbacks), mask)
