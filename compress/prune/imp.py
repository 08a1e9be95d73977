"""Iterative magnitude pruning: the smallest weights go little by little, and the model is trained after each round.

Han et al., "Learning both Weights and Connections" (arXiv:1506.02626). By default weights are kept from round to round and
the whole schedule of learning rates is run again in each, as Renda et al. (arXiv:2003.02389) and Gadhikar & Burkholz,
"Masks, Signs, and Learning Rate Rewinding" (arXiv:2402.19262) do; ``rewind`` brings back earlier weights under the new mask,
as Frankle et al. (arXiv:1912.05671) do. The whole model is in memory; all of its parameters are trained.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from compress.masks import Pattern, Scope, pattern_mask, top_mask
from compress.prune._activate import refuse_others, without_still
from compress.prune._global import one_threshold
from compress.prune._trained import TrainedPruner
from compress.rates import adapted_top
from compress.schemes import Patterns
from compress.sparsity import AmountOptions
from compress.training import TrainingOptions
from weightworks.stage.protocols import Target
from weightworks.stage.training import Regime

if TYPE_CHECKING:
    from weightworks.stream.whole import Outline, Subset, Whole

PAPER = (
    "Han et al. 2015, arXiv:1506.02626; Renda et al. 2020, arXiv:2003.02389; Gadhikar & Burkholz 2024, arXiv:2402.19262"
)
VERSION = 1
USUAL = 0.2  # share of what is left that a round takes, unless the number of rounds is given


class Options(TrainingOptions, AmountOptions):
    """Options of iterative magnitude pruning."""

    rounds: int | None = Field(
        None,
        ge=1,
        description="times to prune and train; default: as many as take 20 % of what is left each; 1 is one-shot",
    )
    path: Literal["geometric", "cubic"] = Field(
        "geometric",
        description="sparsity over the rounds: geometric takes the same share of what is left, cubic most at first",
    )
    rewind: Literal["none", "init", "step"] = Field(
        "none",
        description="weights that a round after the first starts from: none: as they are (learning-rate rewinding); init: the "
        "checkpoint's; step: those after rewind_step steps of the first round",
    )
    rewind_step: int | None = Field(None, ge=1, description="rewind step: the step to go back to")
    scope: Literal["layer", "row", "global"] = Field(
        "layer", description="weights compared with each other: of a layer, a row, or all layers (unstructured only)"
    )
    activate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="models with ReLU: share of what a round after the first prunes that are negative weights which training "
        "has moved least (AP; its authors take 0.1)",
    )
    min_density: float = Field(0.01, ge=0, le=1, description="share that each layer keeps at least in scope global")
    ignore: Patterns = Field(
        default=[],
        description="further layers not pruned, but trained: globs, or regular expressions after re: (lm_head and routers "
        "never are pruned)",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scope == "global" and self.n_of_m is not None:
            raise ValueError("scope global shares out by one threshold: no N:M pattern")
        if self.activate and (self.n_of_m is not None or self.scope == "row"):
            raise ValueError("activate chooses single weights of a layer: no N:M pattern, no scope row")
        if self.scope == "global" and self.min_density > 1 - self.sparsity:
            raise ValueError(f"min_density = {self.min_density:g} is more than the {1 - self.sparsity:g} that stay")
        if (self.rewind == "step") != (self.rewind_step is not None):
            raise ValueError("rewind = step and rewind_step belong together")
        if self.rewind_step is not None and self.rewind_step > self.steps:
            raise ValueError(f"rewind_step = {self.rewind_step} is more than the {self.steps} steps of a round")
        return self

    @property
    def densities(self) -> list[float]:
        """The share of weights that stays after the pruning of each round.

        Geometric: (1 - S)^(j / J) after round j of J, so that each takes the same share p = 1 - (1 - S)^(1 / J) of what is
        left. Cubic (Zhu & Gupta, arXiv:1710.01878): 1 - S + S (1 - j / J)^3.
        """
        left = 1 - self.sparsity
        count = self.rounds or math.ceil(round(math.log(left) / math.log(1 - USUAL), 9))
        shares = [number / count for number in range(1, count)]
        if self.path == "cubic":
            return [*(left + self.sparsity * (1 - share) ** 3 for share in shares), left]
        return [*(left**share for share in shares), left]


class Method(TrainedPruner):
    """Iterative magnitude pruning as a modelwise method."""

    def __init__(self, options: Options) -> None:
        self.options: Options = options

    def regime(self) -> Regime:
        options = self.options
        own = 5 if options.activate else 1  # bytes a weight: its sign, and its value
        return options.regime(rounds=len(options.densities), remember=options.rewind_step, own=own)

    def subset(self, outline: Outline) -> Subset:
        from weightworks.stream.whole import Subset

        if self.options.activate:
            refuse_others(outline.skeleton.model.config.get_text_config(), "prune.imp")
        return Subset(tuple(outline.skeleton.learnable))

    def begin(self, number: int, model: Whole) -> dict[str, Any]:
        if number == 0:
            note_signs(model)
        facts = prune(model, self.options, self.options.densities[number])
        if number > 0 and self.options.rewind != "none":
            model.rewind(start=self.options.rewind == "init")
        if self.options.activate:
            for name in model.linears:
                model.extra[f"start {name}"] = model.weight(name).float().clone()
        return facts

    def rates(self, number: int, begun: Mapping[str, Any]) -> Sequence[float]:
        options = self.options
        if options.schedule != "allr":
            return options.rates()
        lost, share = begun["norm_lost"], begun["share_pruned"]
        return options.rates(
            lambda known: adapted_top(lost, share, top=options.lr, steps=options.steps, original=known)
        )

    def end(self, number: int, model: Whole) -> dict[str, Any]:
        flips = {name: flipped(model, name) for name in model.linears}
        kept = sum(int(model.mask(name).sum()) for name in model.linears)
        note_signs(model)
        return {"sign_flips": sum(flips.values()) / max(kept, 1), "sign_flips_by_tensor": flips}

    def told(self, weight: torch.Tensor, original: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        changed = (weight < 0) != (original < 0)
        return {"sign_flips": float(changed[mask].float().mean()) if bool(mask.any()) else 0.0}


def prune(model: Whole, options: Options, density: float) -> dict[str, Any]:
    """Narrow the masks of ``model`` to ``density`` by the magnitudes it has now; returns figures of this round's masks.

    ``norm_lost`` is ||W - W'|| / ||W|| over all weights that may be pruned, ``share_pruned`` the share of those left that went.
    """
    keeps = keep_counts(model, options, density)
    before = after = 0
    whole = gone = 0.0
    kept, digest = {}, hashlib.sha256()
    for name in model.linears:
        weight, mask = model.weight(name), model.mask(name)
        scores = weight.abs().masked_fill_(~mask, -1)  # what is pruned goes first, whatever zeros there are beside it
        whole += float(scores[mask].square().sum(dtype=torch.float64))
        still = round(options.activate * (int(mask.sum()) - keeps[name])) if f"start {name}" in model.extra else 0
        narrowed = chosen(scores, options, keeps[name] + still, density) & mask
        if still > 0:
            narrowed = without_still(narrowed, weight, model.extra[f"start {name}"], still)
        gone += float(scores[mask & ~narrowed].square().sum(dtype=torch.float64))
        before, after = before + int(mask.sum()), after + int(narrowed.sum())
        mask.copy_(narrowed)
        kept[name] = int(narrowed.sum())
        digest.update(narrowed.cpu().numpy().tobytes())
    model.hold()
    total = sum(model.mask(name).numel() for name in model.linears)
    return {
        "sparsity": 1 - after / total,
        "kept": after,
        "share_pruned": 1 - after / before,
        "norm_lost": math.sqrt(gone / whole) if whole else 0.0,
        "masks": digest.hexdigest(),
        "kept_by_tensor": kept,
    }


def chosen(scores: torch.Tensor, options: Options, keep: int, density: float) -> torch.Tensor:
    """bool like ``scores`` [out, in], True for what stays of one weight; under N:M at least N of every M in each round."""
    pattern = options.n_of_m
    if pattern is None:
        scope: Scope = "row" if options.scope == "row" else "layer"
        return top_mask(scores, keep, scope)
    stay = max(pattern.kept, round(pattern.of * density))
    return (
        pattern_mask(scores, Pattern(stay, pattern.of))
        if stay < pattern.of
        else torch.ones_like(scores, dtype=torch.bool)
    )


def keep_counts(model: Whole, options: Options, density: float) -> dict[str, int]:
    """How many weights of each tensor stay: the same share of each, or by one threshold of magnitude for all."""
    if options.scope != "global":
        sizes = {name: model.weight(name).numel() for name in model.linears}
        return {name: size - round(size * (1 - density)) for name, size in sizes.items()}
    found: Any = None
    for survey in one_threshold(1 - density, options.min_density):
        figures = [
            survey.look([model.weight(name).contiguous()], (), [Target(name, torch.float32)], found)
            for name in model.linears
        ]
        found = survey.conclude(figures, found)
    counts: dict[str, int] = found
    return counts


def note_signs(model: Whole) -> None:
    """Remember which weights are negative."""
    for name in model.linears:
        model.extra[name] = model.weight(name) < 0


def flipped(model: Whole, name: str) -> int:
    """How many kept weights of a tensor have another sign than when it was noted."""
    return int((((model.weight(name) < 0) != model.extra[name]) & model.mask(name)).sum())
