"""Pruning while training: weights below a rising threshold count as zero, and learn on straight through it.

Vanderschueren & De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all you need for Sparse Training?"
(ST-3, arXiv:2212.01076). A layer multiplies with s (W - sign(W) t) where |W| > t and with zero elsewhere; the gradient of that
goes to W as it is, so a weight that is pruned, or was before, can come back until the masks are frozen. t is a quantile of
|W| in the layer, or in each group of an N:M pattern. s = 1.01 / (r + 0.01) makes up, output by output, for what went:
r = mean |W M| / mean |W|. Layers, biases and norms are trained, embeddings and head are not.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field, model_validator

from compress.masks import pattern_mask, top_mask
from compress.prune._trained import TrainedPruner
from compress.sparsity import AmountOptions
from compress.training import TrainingOptions

if TYPE_CHECKING:
    from weightworks.stream.whole import Outline, Subset, Whole

PAPER = "Vanderschueren & De Vleeschouwer 2022, arXiv:2212.01076"
VERSION = 1


class Options(TrainingOptions, AmountOptions):
    """Options of ST-3."""

    rise: float = Field(
        0.5, gt=0, le=1, description="share of the steps in which sparsity rises; then masks are frozen"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.patience is not None:
            raise ValueError("patience would keep values of a lower sparsity than was asked for")
        return self

    def sparsity_at(self, share: float) -> float:
        """S (1 - (1 - x / rise)^3), x being the ``share`` of the steps that is done; S from ``rise`` on."""
        left = max(0.0, 1 - share / self.rise)
        return self.sparsity * (1 - left**3)

    def mask(self, weight: torch.Tensor, sparsity: float) -> torch.Tensor:
        """bool like ``weight`` [out, in]: the largest stay, in the layer or in each group."""
        pattern, scores = self.n_of_m, weight.abs()
        if pattern is None:
            return top_mask(scores, scores.numel() - round(scores.numel() * sparsity), "layer")
        stay = pattern.of - int((pattern.of - pattern.kept) * sparsity / pattern.sparsity + 1e-9)
        whole = torch.ones_like(scores, dtype=torch.bool)
        return whole if stay == pattern.of else pattern_mask(scores, type(pattern)(stay, pattern.of))


class Method(TrainedPruner):
    """ST-3 as a modelwise method."""

    def __init__(self, options: Options) -> None:
        self.options: Options = options

    def subset(self, outline: Outline) -> Subset:
        from compress.prune._straight import StraightThrough
        from weightworks.stream.whole import Subset

        pattern = self.options.n_of_m
        make = partial(StraightThrough, group=0 if pattern is None else pattern.of)
        names = {*outline.biases, *outline.norms}
        ordered = tuple(name for name in outline.skeleton.learnable if name in names)
        count = sum(rows * columns for rows, columns in (one.shape for one in outline.linears.values()))
        return Subset(ordered, dict.fromkeys(outline.linears, make), count)

    def approach(self, share: float, model: Whole) -> None:
        """Choose thresholds and masks for the next step, ``share`` of all being done. Frozen ones are kept in ``model.extra``."""
        from compress.prune._straight import StraightThrough

        options = self.options
        for name, adapter in model.adapters.items():
            assert isinstance(adapter, StraightThrough)
            known = f"threshold {name}"
            if known not in model.extra:
                raw = adapter.raw.detach()
                mask = options.mask(raw, options.sparsity_at(share))
                threshold = adapter.limit(raw, mask)
                if share >= options.rise:
                    model.extra[known], model.extra[f"mask {name}"] = threshold, mask
            else:
                threshold, mask = model.extra[known], model.extra[f"mask {name}"]
            adapter.threshold, adapter.mask = threshold, mask
            model.mask(name).copy_(mask)

    def end(self, number: int, model: Whole) -> dict[str, Any]:
        kept = sum(int(model.mask(name).sum()) for name in model.linears)
        return {"sparsity": 1 - kept / sum(model.mask(name).numel() for name in model.linears)}
