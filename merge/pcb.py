"""PCB-Merging: keep of each task vector what is large in it and agreed on by the others, and weigh it by that.

Every element gets a score of competition within its task and between tasks; the largest scores of a task are kept, and task
vectors are averaged with the scores, stretched to [0, 1], as weights. Order statistics are those of the whole model,
found exactly. The released code has three forms of the score between tasks: ``--inter pairwise`` (the default; of
the evolution script, and the only one that does not depend on the scale of the task vectors), ``raw`` (root and NLP scripts) and
``summed`` (vision script). A task vector that is zero or of one magnitude has no largest elements: nothing of it is
kept, where the released code divides zero by zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from merge._consensus import taken
from merge._quantiles import surveys
from weightworks.stage.merging import MergeOptions, Slab, Survey

PAPER = "Du et al. 2024, arXiv:2410.02396"
VERSION = 1


class Options(MergeOptions):
    """Options of PCB-Merging; the defaults are those of the authors' scripts that use no validation."""

    PER_MODEL: ClassVar[tuple[str, ...]] = ("scaling",)

    ratio: float = Field(0.1, gt=0, le=1, description="share of each task vector that is kept, the highest scores")
    scaling: list[float] = Field(default=[1.0], min_length=1, description="lambda: one for all models, or one for each")
    inter: Literal["pairwise", "raw", "summed"] = Field(
        "pairwise",
        description="score between tasks: tanh of products of normalized pairs, of raw sums, of a normalized sum",
    )
    clamp: float = Field(
        0.01, ge=0, lt=0.5, description="share of each task vector at either end that is clamped: outliers"
    )
    scope: Literal["model", "tensor"] = Field(
        "model", description="order statistics of the whole model, or (not the paper's) of each tensor"
    )
    vectors: Literal["whole", "sparse"] = Field(
        "whole", description="norms and biases: averaged whole, or scored as matrices are, as the released scripts do"
    )

    def spares(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of ``shape`` is averaged."""
        return self.vectors == "whole" and len(shape) == 1


class Method:
    """theta = theta_0 + sum_i b_i lambda_i tau_i / sum_i b_i, b_i the stretched scores."""

    BASE, LEAST, MOST = "required", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def surveys(self) -> list[Survey]:
        """The bounds of magnitudes of each task vector, then the least score that is kept and the greatest."""
        scope = self.options.scope
        bounds = surveys(self._magnitudes, self._bounds, scope=scope)
        return [*bounds, *surveys(self._scores, self._thresholds, signed=True, scope=scope)]

    def _magnitudes(self, slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.options.spares(slab.shape):
            for number, delta in enumerate(taken(slab)):
                yield f"model {number}", delta

    def _bounds(self, name: str, total: int) -> list[int]:
        clamp = self.options.clamp
        return [min(int(total * clamp), total - 1), max(int(total * (1 - clamp) - 1), 0), total - 1]

    def _scores(self, slab: Slab, found: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self.options.spares(slab.shape):
            return
        deltas = taken(slab)
        for number, score in enumerate(scores(deltas, bounds_of(found, len(deltas)), inter=self.options.inter)):
            yield f"score {number}", score

    def _thresholds(self, name: str, total: int) -> list[int]:
        return [min(int(total * (1 - self.options.ratio)), total - 1), total - 1]

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        assert slab.base is not None
        deltas = taken(slab)
        scaling = self.options.each("scaling", len(deltas))
        if self.options.spares(slab.shape):
            for delta, factor in zip(deltas, scaling, strict=True):
                slab.base.add_(delta, alpha=factor / len(deltas))
            return slab.base
        bounds = bounds_of(found, len(deltas))
        total, divisor = torch.zeros_like(slab.base), torch.zeros_like(slab.base)
        for number, score in enumerate(scores(deltas, bounds, inter=self.options.inter)):
            least, greatest = found[f"score {number}"]["values"]
            if not greatest > least:
                continue
            weight = score.sub_(least).clamp_(min=0).div_(greatest - least)  # what is dropped weighs exactly 0
            low, high = bounds[number]
            clamped = deltas[number].abs().clamp_(low, high).mul_(deltas[number].sign())
            total.addcmul_(weight, clamped, value=scaling[number])
            divisor.add_(weight)
        return slab.base.add_(total.div_(divisor.clamp_(min=1e-12)))


def bounds_of(found: Any, count: int) -> list[tuple[float, float]]:
    """The magnitudes that each task vector is clamped to; one so sparse that it would be emptied is not clamped."""
    values = [found[f"model {number}"]["values"] for number in range(count)]
    return [(low, high or greatest) for low, high, greatest in values]


def scores(deltas: list[torch.Tensor], bounds: list[tuple[float, float]], *, inter: str) -> Iterator[torch.Tensor]:
    """beta_i = exp(N (n_i^2 - 1)) g_i of each task vector [rows, ...], one after the other; ``deltas`` are left as they are.

    The factor exp(-N) goes when scores are stretched, and keeps those of many models from overflowing.
    n_i in [0, 1] are magnitudes, clamped and stretched, s_i the same with their signs; g_i = sum_j tanh(s_i s_j) for
    ``pairwise``, tanh(tau_i sum_j tau_j) for ``raw``, tanh(tau_i sum_j s_j) for ``summed``.
    """
    count = len(deltas)
    signed = [normalized(delta, low, high) for delta, (low, high) in zip(deltas, bounds, strict=True)]
    common = None if inter == "pairwise" else added(deltas if inter == "raw" else signed)
    for delta, own in zip(deltas, signed, strict=True):
        pairs = [own * other for other in signed] if common is None else [delta * common]
        between = added([pair.tanh_() for pair in pairs])
        yield own.square().sub_(1).mul_(count).exp_().mul_(between)


def normalized(delta: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """sgn(tau) (|tau| - low) / (high - low), magnitudes clamped to [low, high]; zero where all are one."""
    if not high > low:
        return torch.zeros_like(delta)
    return delta.abs().clamp_(low, high).sub_(low).div_(high - low).mul_(delta.sign())


def added(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Their sum, in order."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total
