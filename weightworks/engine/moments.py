"""What layers put out, channel by channel: means and standard deviations, and the factors that bring one to another's.

Jordan et al. 2022, REPAIR, arXiv:2211.08403, section 3. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LEAST, MOST = 0.5, 2.0  # of a factor: beyond it the layer is broken otherwise
SILENT = 1e-6  # a standard deviation below which a unit says nothing, and is left alone


@dataclass
class Moments:
    """Sums of a layer's outputs over tokens: float64 [out], and of their squares; ``count`` tokens."""

    total: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    @classmethod
    def none(cls, rows: int) -> Moments:
        return cls(torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64))

    def add(self, outputs: torch.Tensor) -> None:
        """Take in ``outputs`` [tokens, out]."""
        double = outputs.double()
        self.total += double.sum(0).cpu()
        self.squares += double.square().sum(0).cpu()
        self.count += outputs.shape[0]

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> torch.Tensor:
        return (self.squares / max(self.count, 1) - self.mean.square()).clamp(min=0)


@dataclass(frozen=True)
class Target:
    """What a layer's outputs should have: mean and standard deviation, float64 [out]."""

    mean: torch.Tensor
    deviation: torch.Tensor


def target_of(moments: Sequence[Moments], weights: Sequence[float], tie: int) -> Target:
    """The weighted mean of the models' means and standard deviations; units of ``tie`` rows have one deviation."""
    shares = [weight / sum(weights) for weight in weights]
    mean = sum(share * one.mean for share, one in zip(shares, moments, strict=True))
    deviation = sum(share * tied(one.variance, tie).sqrt() for share, one in zip(shares, moments, strict=True))
    return Target(torch.as_tensor(mean), torch.as_tensor(deviation))


def tied(variance: torch.Tensor, tie: int) -> torch.Tensor:
    """``variance`` [out], the mean of each unit of ``tie`` rows in all of its rows."""
    return variance if tie == 1 else variance.view(-1, tie).mean(1).repeat_interleave(tie)


def factor_of(target: Target, moments: Moments, tie: int) -> torch.Tensor:
    """sigma* / sigma, float64 [out]; 1 where a unit is silent, in the merge or in the models."""
    deviation = tied(moments.variance, tie).sqrt()
    speaks = (deviation > SILENT) & (target.deviation > SILENT)
    ratio = (target.deviation / deviation.clamp(min=SILENT)).clamp(LEAST, MOST)
    return torch.where(speaks, ratio, torch.ones_like(ratio))


def off(target: Target, mean: torch.Tensor) -> float:
    """The root mean square of what ``mean`` float64 [out] is off, in units of the target's standard deviations."""
    return float(((target.mean - mean) / target.deviation.clamp(min=SILENT)).square().mean().sqrt())
