"""The weighted sum of adapters in the best approximation of a given rank."""

from __future__ import annotations

from pydantic import Field

from merge.adapters._factors import decomposed, rank_for, split
from weightworks.stage.adapting import CombineOptions, Factors, Made, Updates

PAPER = "Eckart and Young 1936; as add_weighted_adapter of PEFT, combination 'svd'"
VERSION = 1


class Options(CombineOptions):
    """Options of the truncated sum."""

    rank: int | None = Field(None, ge=1, description="rank of the result; default: the largest of the adapters'")
    energy: float | None = Field(
        None, gt=0, le=1, description="share of the sum's squared norm to keep in every module, instead of a rank"
    )


class Method:
    """The leading singular triplets of sum_i w_i B_i A_i."""

    BASE, LINEAR = "optional", True

    def __init__(self, options: Options) -> None:
        self.options = options

    def combine(self, updates: Updates) -> Made:
        u, sigma, v = decomposed(Factors.stacked(updates.parts))
        if (energy := self.options.energy) is not None:
            rank = min(rank_for(sigma, float(sigma.square().sum()), energy), self.options.rank or len(sigma))
        else:
            rank = self.options.rank or max(part.rank for part in updates.parts)
        return Made(split(u[:, :rank], sigma[:rank], v[:rank]))
