"""Low-rank adapters of pruned weights: what a layer multiplies with instead of W, so that zeros of W stay zeros.

W is [out, in], M bool [out, in] its mask (True: kept), A [rank, in], B [out, rank], s = alpha / rank. Zimmer et al., "PERP"
(arXiv:2312.15230), section 3.2, and SPP (arXiv:2405.16057). All are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def mask_lora(W: torch.Tensor, pruned: torch.Tensor, BA: torch.Tensor, s: float) -> torch.Tensor:
    """W + s M * (BA)."""
    return W + (s * BA).masked_fill(pruned, 0)


def scale_lora(W: torch.Tensor, pruned: torch.Tensor, BA: torch.Tensor, s: float) -> torch.Tensor:
    """W * (BA): a factor of each weight. A and B start at 1 / sqrt(rank), so that BA is all ones; there is no s."""
    return W * BA


def spp(W: torch.Tensor, pruned: torch.Tensor, BA: torch.Tensor, s: float) -> torch.Tensor:
    """W + s W * (BA)."""
    return W + s * W * BA


def lora(W: torch.Tensor, pruned: torch.Tensor, BA: torch.Tensor, s: float) -> torch.Tensor:
    """W + s BA, as LoRA is defined: the sum has no zeros left."""
    return W + s * BA


FORMULAS: Mapping[str, Formula] = {"mask_lora": mask_lora, "scale_lora": scale_lora, "spp": spp, "lora": lora}


class LowRank(nn.Module):
    """An adapter of one weight by one of ``FORMULAS``. At its start it leaves the weight as it is."""

    def __init__(
        self,
        kind: str,
        weight: torch.Tensor,
        mask: torch.Tensor,
        generator: torch.Generator,
        *,
        rank: int,
        alpha: float,
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.formula, self.scale = FORMULAS[kind], alpha / rank
        self.register_buffer("pruned", ~mask, persistent=False)
        if kind == "scale_lora":
            self.A = nn.Parameter(torch.full((rank, columns), rank**-0.5))
            self.B = nn.Parameter(torch.full((rows, rank), rank**-0.5))
        else:
            bound = 1 / math.sqrt(columns)  # of Kaiming's uniform distribution with a = sqrt(5), as LoRA starts
            self.A = nn.Parameter((2 * torch.rand(rank, columns, generator=generator) - 1) * bound)
            self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        pruned: torch.Tensor = self.get_buffer("pruned")
        return self.formula(weight.float(), pruned, self.B @ self.A, self.scale)
