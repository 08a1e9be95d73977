"""Expert pruning and merging: every mixture of a sparse model keeps fewer experts, dropped by worth or added together.

Dropping by REAP's saliency (Lasby et al., arXiv:2510.13999) or by how often an expert is chosen; merging after M-SMoE
(Li et al., arXiv:2310.01334): an expert joins the one that stays whose router logits are most like its own.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from weightworks.errors import MethodError
from weightworks.options import Options as BaseOptions
from weightworks.stage.reducing import Experts, Mixture

PAPER = "Lasby et al. 2025, arXiv:2510.13999; Li et al. 2023, arXiv:2310.01334"
VERSION = 1


class Options(BaseOptions):
    """Options of expert pruning."""

    sparsity: float = Field(0.25, gt=0, lt=1, description="share of the experts of each mixture removed, rounded")
    importance: Literal["saliency", "frequency"] = Field(
        "saliency",
        description="an expert's worth: saliency, the mean of its router weight times the norm of what it gives; or "
        "frequency, how many tokens it was given",
    )
    removal: Literal["drop", "merge"] = Field(
        "drop", description="drop: experts vanish; merge: each is averaged into the most similar one that stays"
    )

    @property
    def amount(self) -> str:
        """What a folder is called after: ``s25``, or ``s25-merged``."""
        return f"s{100 * self.sparsity:g}" + ("-merged" if self.removal == "merge" else "")


class Method:
    """Expert pruning, mixture by mixture."""

    reduces = "experts"

    def __init__(self, options: Options) -> None:
        self.options = options

    def leaves(self, experts: int) -> int:
        kept = experts - round(experts * self.options.sparsity)
        if not 0 < kept < experts:
            raise MethodError(
                f"prune.experts: {kept} of {experts} experts would stay; 1 to {experts - 1} can",
                hint="choose another --sparsity",
            )
        return kept

    def watch(self, experts: int, device: torch.device) -> Routed:
        return Routed(experts, device)

    def choose(self, statistics: Routed, experts: int) -> Experts:
        kept = self.leaves(experts)
        worth = statistics.saliency() if self.options.importance == "saliency" else statistics.tokens
        stays = worth.argsort(stable=True)[experts - kept :].sort().values.tolist()
        facts: dict[str, Any] = {"tokens": int(statistics.tokens.sum()), "least_tokens": int(statistics.tokens.min())}
        lost = statistics.given.sum() - statistics.given[stays].sum()
        facts["lost_output"] = float(lost / statistics.given.sum()) if float(statistics.given.sum()) else 0.0
        never = int((statistics.tokens == 0).sum())
        fallbacks = [f"{never} of {experts} experts saw no tokens and count as worth nothing"] if never else []
        if self.options.removal == "drop":
            return Experts([[(expert, 1.0)] for expert in stays], facts, fallbacks)
        return Experts(merged(statistics, stays), facts, fallbacks)


class Routed:
    """What a router did, and what came of it, expert by expert; sums in float64.

    ``tokens`` [experts] are counts; ``given`` the sums of g_j(x) ||f_j(x)|| over the tokens of expert j; ``products``
    [experts, experts] those of router logits over all tokens.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self.tokens = torch.zeros(experts, dtype=torch.float64)
        self.given = torch.zeros(experts, dtype=torch.float64)
        self.products = torch.zeros(experts, experts, dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, norms: torch.Tensor) -> None:
        places = index.flatten().cpu()
        self.tokens.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))
        self.given.index_add_(0, places, (weights.double() * norms.double()).flatten().cpu())
        self.products += logits.double().T @ logits.double()

    def saliency(self) -> torch.Tensor:
        """S_j, the mean over the tokens of expert j of g_j(x) ||f_j(x)||, [experts]."""
        return self.given / self.tokens.clamp(min=1)

    def likeness(self) -> torch.Tensor:
        """Cosines of the router logits of two experts over all tokens, [experts, experts]."""
        scale = self.products.diagonal().clamp(min=1e-300).sqrt()
        return (self.products / scale / scale[:, None]).cpu()


def merged(statistics: Routed, stays: list[int]) -> list[Mixture]:
    """Each expert with those that join it, weighed by how many tokens they were given."""
    likeness = statistics.likeness()
    groups: dict[int, list[int]] = {expert: [expert] for expert in stays}
    for expert in range(len(statistics.tokens)):
        if expert not in groups:
            groups[stays[int(likeness[expert, stays].argmax())]].append(expert)
    mixtures: list[Mixture] = []
    for group in groups.values():
        counts = statistics.tokens[group]
        shares = counts / counts.sum() if float(counts.sum()) else torch.full_like(counts, 1 / len(group))
        mixtures.append(list(zip(group, shares.tolist(), strict=True)))
    return mixtures
