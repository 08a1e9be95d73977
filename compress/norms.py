"""Norm tweaking: gains and biases of norms make up for some of what rounding did to a block.

Li et al., "Norm Tweaking: High-performance Low-bit Quantization of Large Language Models" (AAAI 2024). With f and q the
outputs of the dense and the rounded block on the same input, the loss is the mean over channels c of
|mean_c(f) - mean_c(q)| + |var_c(f) - var_c(q)|, taken over tokens; Adam goes once over the text, its rate growing with depth.
The closed form instead makes the outputs of the linears that read a norm alike, in the least squares. What the loss alone
would keep may take single outputs further from the dense ones, so their squared error must fall on held-out text too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field

from weightworks.options import Options
from weightworks.stage.tweaking import Descent, Tweak

RIDGE = 0.01  # of the mean diagonal: pulls factors towards 1 where the text says little


class NormOptions(Options):
    """Options of quantizers after which norms may be tuned."""

    norm_tweak: Literal["none", "adam", "closed"] = Field(
        "none",
        description="tune the norms of each block once its weights are rounded, and keep that where errors on held-out "
        "text fall: adam by the distribution of each channel of the block's output (norm tweaking), closed by the "
        "outputs of the linears that read a norm, solved at once",
    )
    norm_rate: float = Field(1e-3, gt=0, le=0.1, description="adam: rate of the first block")
    norm_rate_growth: float = Field(
        1.0, ge=0, le=100, description="adam: growth of the rate from the first block to the last"
    )


def tweak(options: NormOptions) -> Tweak | None:
    """How the norms are tuned as ``options`` ask; None if they are not."""
    if options.norm_tweak == "none":
        return None
    rates = partial(rate, first=options.norm_rate, growth=options.norm_rate_growth)
    if options.norm_tweak == "closed":
        return Tweak({"error": error}, solve=factors)
    return Tweak({"loss": loss, "error": error}, descent=Descent(moments, distance, rates))


def rate(block: int, blocks: int, *, first: float, growth: float) -> float:
    """Adam's rate in a block: first (1 + growth l / L), l the number of the block of L."""
    return first * (1 + growth * block / blocks)


def moments(output: torch.Tensor) -> torch.Tensor:
    """Mean and variance of each channel of ``output`` [batch, seq, hidden] over all tokens: float32 [2, hidden]."""
    channels = output.float().flatten(0, 1)  # [tokens, hidden]
    return torch.stack([channels.mean(0), channels.var(0, correction=0)])


def distance(made: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """The channel-wise distance of distributions (the paper's equation 2) from their moments [2, hidden], 0-dimensional."""
    return (made - aim).abs().sum(0).mean()


def loss(made: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """:func:`distance` of outputs [batch, seq, hidden]."""
    return distance(moments(made), moments(aim))


def error(made: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """The relative squared error of outputs, 0-dimensional."""
    return (made - aim).square().sum() / aim.square().sum().clamp(min=1e-30)


def factors(second: torch.Tensor, weights: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Factors s [in] of inputs X that make sum_l ||X W_l' - X diag(s) Q_l'||^2 smallest, pulled towards 1.

    ``second`` is X'X / n [in, in], ``weights`` the pairs W_l, Q_l [out, in]. With G = H * sum Q_l'Q_l and
    b = diag(H sum W_l'Q_l) the answer solves (G + r I) s = b + r 1.
    """
    squares, target = torch.zeros_like(second), torch.zeros_like(second[0])
    for dense, rounded in weights:
        squares += rounded.T @ rounded
        target += ((second @ dense.T) * rounded.T).sum(1)  # diag(H W'Q)
    matrix = second * squares
    ridge = RIDGE * matrix.diagonal().mean()
    matrix.diagonal().add_(ridge)
    found, info = torch.linalg.solve_ex(matrix.double(), (target + ridge).double())
    return found.float() if int(info) == 0 else torch.ones_like(target)
