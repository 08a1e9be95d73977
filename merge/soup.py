"""Model soup: the average of the models' weights, uniform, weighted, or of members chosen or weighted by held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from merge._greedy import choose
from merge._learned import fit
from merge._options import SumOptions, shares_of
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import Bench, Fit, HeldOut, Slab

PAPER = "Wortsman et al. 2022, arXiv:2203.05482"
VERSION = 1
MERGEKIT = {"linear": Mergekit({"normalize": "normalize"}, {"weight": "weights"}, needed=("weight",), base="model")}


class Options(SumOptions):
    """Options of soups."""

    greedy: bool = Field(False, description="choose the members: best first, each kept if --score gets better with it")
    learned: Literal["tensor", "block", "model"] | None = Field(
        None, description="fit a weight for each model, and for each of these, to --score; all models in memory"
    )
    score: str | None = Field(None, description="held-out text to choose by; not one that results are reported on")
    report: str | None = Field(
        None, description="another text, on which the soup and its candidates are scored at the end"
    )
    score_tokens: int | None = Field(None, ge=2, description="read only so many tokens of each text")
    min_gain: float = Field(
        0.0, ge=0, lt=1, description="greedy: part of the perplexity that a member must take away to be kept"
    )
    or_equal: bool = Field(False, description="greedy: keep a member that brings exactly --min-gain, be it nothing")
    epochs: int = Field(5, ge=1, description="learned: times that the text is gone through")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        """How the weights come about is said once."""
        chooses = self.greedy or self.learned is not None
        if self.greedy and self.learned is not None:
            raise ValueError("greedy and learned are two ways to choose; take one")
        if chooses and self.weights:
            raise ValueError("greedy and learned find the weights themselves; leave weights out")
        if chooses and self.score is None:
            raise ValueError("greedy and learned choose by held-out text: give score, a text file")
        if not chooses and (self.score is not None or self.report is not None):
            raise ValueError("score and report are texts to choose by and to report on: with greedy or learned only")
        if not self.greedy and (self.min_gain or self.or_equal):
            raise ValueError("min_gain and or_equal belong to greedy")
        return self


class Method:
    """theta = sum_i w_i theta_i / sum_i w_i (section 2 of the paper: the uniform soup has equal weights).

    The weights may be found on held-out text: ``greedy`` is the paper's algorithm 1, ``learned`` its appendix I.
    """

    BASE, LEAST, MOST = "optional", 1, None

    def __init__(self, options: Options) -> None:
        self.options = options

    def files(self) -> list[Path]:
        """Local files whose content the result depends on."""
        texts = (self.options.score, self.options.report)
        return [path for text in texts if text and (path := Path(text).expanduser()).is_file()]

    def held_out(self, count: int) -> HeldOut | None:
        """The texts, and how often they are read: by N candidates and N - 1 averages, or by two soups and the fitting of one."""
        options = self.options
        if options.score is None:
            return None
        scores = 2 * count - 1 if options.greedy else count + 2 + 3 * options.epochs  # a step is about three passes
        whole = options.learned is not None
        return HeldOut(options.score, options.report, options.score_tokens, scores, whole)

    def fit(self, bench: Bench) -> Fit:
        """The members, or the weights, that the text prefers."""
        options = self.options
        if options.greedy:
            return choose(bench, min_gain=options.min_gain, or_equal=options.or_equal)
        return fit(bench, per=options.learned or "tensor", epochs=options.epochs)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        shares = shares_of(self.options, len(slab.models))
        if found is not None and slab.name in found:
            shares = found[slab.name]
        if min(shares) < 0 or not math.isclose(math.fsum(shares), 1):
            return total(slab.models, shares)
        return mean(slab.models, shares)


def total(models: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_i w_i theta_i."""
    result = models[0].mul_(weights[0])
    for weight, model in zip(weights[1:], models[1:], strict=True):
        result.add_(model, alpha=weight)
    return result


def mean(models: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """The same for ``shares`` that sum to 1, step by step from one model towards the next: of copies, exactly the copy."""
    result, so_far = models[0], shares[0]
    for share, model in zip(shares[1:], models[1:], strict=True):
        so_far += share
        if share > 0:
            result.lerp_(model, share / so_far)
    return result
