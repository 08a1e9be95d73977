"""ARMOR: a weight as the product of a 2:4 core and two block-diagonal factors, which make up for what the core lacks.

Liu et al., "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization" (arXiv:2510.05528). The folder
holds the dense product, which every loader takes; ``factors.safetensors`` beside it the factors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from compress.columns import Columns
from compress.masks import Pattern, pattern_mask
from compress.prune import _armor
from compress.prune._pruner import told
from compress.schemes import ALWAYS_IGNORED, IGNORE, Patterns
from weightworks.options import Options as BaseOptions
from weightworks.stage.protocols import Solution, Survey, Target

if TYPE_CHECKING:
    from weightworks.store.factors import Factors

PAPER = "Liu et al. 2025, arXiv:2510.05528"
VERSION = 1


class Options(BaseOptions):
    """Options of ARMOR."""

    pattern: Literal["2:4"] = Field("2:4", description="of the core: 2 of every 4 consecutive inputs are KEPT")
    block_size: int = Field(
        64,
        ge=4,
        le=1024,
        multiple_of=4,
        description="side of the blocks at most; the largest that divides a weight is used",
    )
    rounds: int = Field(10, ge=0, description="times that both factors and the core are fitted; 0 is NoWag-P")
    ignore: Patterns = Field(default=[], description=IGNORE)

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]


class Method:
    """ARMOR as a blockwise method."""

    masks = False  # the product is dense
    together = True

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> None:
        return None

    def surveys(self) -> Sequence[Survey]:
        return []

    def refusal(self, shape: tuple[int, int]) -> str | None:
        if all(side % _armor.GROUP == 0 for side in shape):
            return None
        return f"{shape[0]} x {shape[1]}: blocks need both sides to be multiples of {_armor.GROUP}"

    def factored(self, shape: tuple[int, int]) -> int:
        """The largest multiple of 4 that divides both sides, ``block_size`` at most."""
        common, group = math.gcd(*shape), _armor.GROUP
        return max(size for size in range(group, self.options.block_size + 1, group) if common % size == 0)

    def held(self, columns: int) -> int:
        return 16 * columns

    def watch(self, columns: int, device: torch.device) -> Columns:
        return Columns(columns, device)

    def solve(self, weights: list[torch.Tensor], statistics: Columns, targets: Sequence[Target]) -> list[Solution]:
        energy = statistics.norms().square()
        alive = torch.isfinite(energy) & (energy > 0)
        energy = torch.where(alive, energy, energy[alive].mean() if bool(alive.any()) else 1.0)
        return [self._one(*one, statistics, energy) for one in zip(weights, targets, strict=True)]

    def _one(self, weight: torch.Tensor, target: Target, statistics: Columns, energy: torch.Tensor) -> Solution:
        size = self.factored((weight.shape[0], weight.shape[1]))
        scaled, rows, columns = _armor.normalised(weight)
        fitted = _armor.fit(scaled, energy / energy.mean(), size, self.options.rounds)
        factors = folded(fitted.parts, rows, columns).to(target.dtype)
        product = factors.dense()  # of what is stored
        error = (product - weight).square()
        facts = {
            "tokens": statistics.tokens,
            "block_size": size,
            "rounds": len(fitted.losses) - 1,
            "proxy_loss": min(fitted.losses),
            "proxy_loss_at_first": fitted.losses[0],
            "relative_weight_error": float(error.sum() / weight.square().sum().clamp(min=1e-30)),
            "lost_energy": float((error @ energy).sum() / (weight.square() @ energy).sum().clamp(min=1e-30)),
        }
        return Solution(product, facts, told(statistics), factors=factors)


def folded(parts: _armor.Parts, rows: torch.Tensor, columns: torch.Tensor) -> Factors:
    """The factors of the weight itself: the norms r [out] go into A, c [in] into B, so that W = (A S B)_ij r_i c_j."""
    from weightworks.store.factors import Factors  # brings all of torch

    size = parts.right.shape[-1]
    core = _armor.whole(parts.core)
    mask = pattern_mask(core.abs(), Pattern(2, 4))  # two of every four also where values are zero
    return Factors(parts.left * rows.view(-1, size, 1), core, mask, parts.right * columns.view(-1, 1, size))
