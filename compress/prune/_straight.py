"""Soft thresholds whose gradient passes straight through, as ST-3 has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SPARE = 0.01  # of the factor that makes up for what is pruned: it stays finite


class Straight(torch.autograd.Function):
    """``value``, whose gradient is handed to ``raw`` as it is."""

    @staticmethod
    def forward(ctx: Any, raw: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class StraightThrough(nn.Module):
    """What a layer multiplies with in place of a weight [out, in] that is trained as ``raw``.

    ``mask`` bool [out, in] and ``threshold`` float32, one number or one a ``group`` of inputs [out, in / group, 1], are set from
    outside. Where nothing is pruned it is the weight.
    """

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, generator: torch.Generator, *, group: int = 0) -> None:
        super().__init__()
        self.raw = nn.Parameter(weight.detach().float().clone())
        self.group = group
        self.mask = torch.ones_like(mask)
        self.threshold = torch.zeros(())

    def limit(self, raw: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The largest magnitude that ``mask`` prunes: of the layer, or of each group."""
        gone = raw.abs().masked_fill(mask, 0)
        return gone.max() if self.group == 0 else gone.view(len(gone), -1, self.group).amax(-1, keepdim=True)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Straight.apply(self.raw, self.value().detach())
        return found

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        """s sign(W) max(|W| - t, 0) under the mask, float32 [out, in]."""
        size, mask = self.raw.abs(), self.mask
        left = size if self.group == 0 else size.view(len(size), -1, self.group)
        soft = (left - self.threshold).clamp(min=0).view_as(size) * self.raw.sign()
        rest = (size * mask).mean(1, keepdim=True) / size.mean(1, keepdim=True).clamp(min=1e-30)  # [out, 1]
        return (soft * (1 + SPARE) / (rest + SPARE)).masked_fill(~mask, 0)
