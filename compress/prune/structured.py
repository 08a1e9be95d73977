"""Structured pruning: channels of feed-forward parts and heads of attention are removed, and every matrix gets smaller.

After LLM-Pruner (Ma et al., arXiv:2305.11627), which removes coupled units whole, and FLAP's use of Wanda's scores for
them (An et al., arXiv:2312.11983). All blocks keep the same width, as a plain configuration must say it. W [out, in] is
the weight that a part writes with (down or output projection), X [tokens, in] its inputs, H = (2/n) X'X.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from compress.columns import Columns
from compress.hessian import Hessian, factor
from compress.prune._taylor import Gradients
from compress.sweep import output_energy, relative_loss
from weightworks.options import Options as BaseOptions
from weightworks.stage.reducing import Choice, Kind, Part

PAPER = "Ma et al. 2023, arXiv:2305.11627; An et al. 2023, arXiv:2312.11983"
VERSION = 1


class Options(BaseOptions):
    """Options of structured pruning."""

    sparsity: float = Field(0.25, ge=0, lt=1, description="share of the channels of each feed-forward part removed")
    head_sparsity: float = Field(0.0, ge=0, lt=1, description="share of the heads of each attention removed")
    head_unit: Literal["group", "query"] = Field(
        "group",
        description="what goes of attention: group, a key and value head with its query heads; or query, as many query "
        "heads of every group",
    )
    round_to: int = Field(64, ge=1, description="widths that stay are multiples of this, the nearest; 1: any width")
    importance: Literal["activation", "taylor", "taylor-second", "taylor-mix"] = Field(
        "activation",
        description="a unit's worth: activation, by Wanda's scores of what it feeds; or by gradients of all its weights: "
        "taylor |w g|, taylor-second |w^2 F|, taylor-mix |w g - w^2 F / 2|",
    )
    repair: Literal["none", "least-squares"] = Field(
        "none", description="what stays takes over for what goes: least-squares, on the calibration text"
    )
    damp_percent: float = Field(0.01, gt=0, le=1, description="repair: share of the mean of diag(H) added to it")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.sparsity and not self.head_sparsity:
            raise ValueError("sparsity and head_sparsity are both 0: nothing would be removed")
        return self

    @property
    def amount(self) -> str:
        """What a folder is called after: ``s25``, ``h50``, ``s25-h50``."""
        shares = {"s": self.sparsity, "h": self.head_sparsity}
        return "-".join(f"{letter}{100 * share:g}" for letter, share in shares.items() if share)


class Method:
    """Structured pruning, part by part."""

    reduces = "units"

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def kinds(self) -> list[Kind]:
        kinds: list[Kind] = ["channels"] if self.options.sparsity else []
        return [*kinds, "heads"] if self.options.head_sparsity else kinds

    def stays(self, kind: Kind, groups: int, heads: int, size: int) -> tuple[int, int] | None:
        options = self.options
        share = options.sparsity if kind == "channels" else options.head_sparsity
        if not share:
            return None
        if kind == "heads" and options.head_unit == "query":
            return groups, rounded(heads, share, groups * size, options.round_to)
        return rounded(groups, share, heads * size, options.round_to), heads

    @property
    def gradients(self) -> bool:
        return self.options.importance != "activation"

    @property
    def inputs(self) -> bool:
        return not self.gradients or self.options.repair != "none"

    def traced(self, elements: int, count: int) -> int:
        return Gradients.nbytes(elements)

    def trace(self, elements: int, count: int, device: torch.device) -> Gradients:
        return Gradients(device)

    def weigh(self, weight: torch.Tensor, traced: Gradients, axis: int) -> torch.Tensor:
        order = self.options.importance
        assert order != "activation"
        return traced.worth(weight, order).sum(1 - axis)

    def held(self, columns: int) -> int:
        return 16 * columns if self.options.repair == "none" else 4 * columns**2

    def working(self, columns: int) -> int:
        return 0 if self.options.repair == "none" else 4 * columns**2  # H, and the part of it that is factored

    def watch(self, columns: int, device: torch.device) -> Columns | Hessian:
        return Columns(columns, device) if self.options.repair == "none" else Hessian(columns, device)

    def choose(self, part: Part, weight: torch.Tensor, statistics: Any, worth: torch.Tensor | None) -> Choice:
        if statistics is None:
            assert worth is not None
            return chosen(part, worth, {}, [])
        fallbacks = [f"{statistics.dropped} inputs were not finite and left out"] if statistics.dropped else []
        facts: dict[str, Any] = {"tokens": statistics.tokens}
        if not statistics.tokens:
            fallbacks.append("saw no tokens, chosen by the weights alone")
            statistics = Columns(weight.shape[1], weight.device)
        hessian = None if isinstance(statistics, Columns) else statistics.finish()
        norms = statistics.norms() if hessian is None else (hessian.diagonal() / 2).sqrt()
        if worth is None:
            scores = importance(weight, norms).cpu().double()
            worth = scores.view(part.groups, part.heads, part.size).sum(-1)
        choice = chosen(part, worth, facts, fallbacks)
        if hessian is None:
            return choice
        columns = (choice.heads.flatten()[:, None] * part.size + torch.arange(part.size)).flatten().to(weight.device)
        repaired = least_squares(weight, hessian, columns, self.options.damp_percent)
        if repaired is None:
            fallbacks.append("inputs are not definite at any damping, not repaired")
        kept = weight[:, columns] if repaired is None else repaired
        change = weight.clone()
        change[:, columns] -= kept
        facts["relative_error"] = relative_loss(output_energy(change, hessian), output_energy(weight, hessian))
        choice.weight = repaired
        return choice


def chosen(part: Part, worth: torch.Tensor, facts: dict[str, Any], fallbacks: list[str]) -> Choice:
    """The choice by ``worth`` [groups, heads] alone."""
    heads, total = strongest(worth, part), float(worth.sum())
    facts["lost_importance"] = 1 - float(worth.flatten()[heads].sum()) / total if total > 0 else 0.0
    return Choice(heads, None, facts, fallbacks)


def rounded(count: int, share: float, width: int, multiple: int) -> int:
    """How many of ``count`` units of ``width`` inputs stay when a ``share`` goes.

    The nearest number whose width is a multiple, of two as near the wider; at least one such, at most all.
    """
    step = math.lcm(width, multiple) // width
    return min(count, max(step, step * math.floor(count * (1 - share) / step + 0.5)))


def importance(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """What each input is worth, [in]: the mean of Wanda's scores |W_ij| ||X_j|| over the outputs."""
    return weight.abs().mean(0) * norms


def strongest(worth: torch.Tensor, part: Part) -> torch.Tensor:
    """The heads of ``part`` that stay by ``worth`` [groups, heads], int64 [kept_groups, kept_heads], ascending; of equals
    the later."""
    groups = _top(worth.sum(1), part.kept_groups)
    inside = torch.stack([_top(worth[group], part.kept_heads) for group in groups.tolist()])
    return groups[:, None] * part.heads + inside


def _top(worth: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the ``count`` largest, ascending; of equals the first goes first."""
    return worth.argsort(stable=True)[len(worth) - count :].sort().values


def least_squares(
    weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor, damp_percent: float
) -> torch.Tensor | None:
    """The best [out, kept] for the outputs of ``weight`` [out, in] from the inputs ``kept`` alone, None if there is none.

    W_K + W_P H_PK inv(H_KK + damping): the minimum of the error of the outputs plus damping times the change of W_K.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    inner = hessian[kept][:, kept]
    dead = inner.diagonal() == 0
    inner.diagonal()[dead] = 1
    lower = factor(inner, torch.arange(len(kept)), damp_percent=damp_percent).lower
    if lower is None:
        return None
    cross = weight[:, gone] @ hessian[gone][:, kept]  # W_P H_PK, [out, kept]
    return weight[:, kept] + cross @ lower @ lower.T
