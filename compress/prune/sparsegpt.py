"""SparseGPT: prune column by column, pushing each column's error onto those after it; with bits, round as well.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv:2301.00774).
W [out, in] is a weight, X [tokens, in] its inputs, H = (2/n) X'X, L the lower Cholesky factor of inv(H + damping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from compress.columns import Columns
from compress.grids import Grid, grouped
from compress.hessian import Factor, Hessian, factor
from compress.masks import Pattern, pattern_mask, top_mask
from compress.prune._dsnot import repaired
from compress.prune._pruner import Pruner
from compress.prune._refine import refine
from compress.sparsity import SparsityOptions
from compress.sweep import COLD, Rounding, block_size, output_energy, relative_loss, sweep
from weightworks.stage.protocols import Solution, Target
from weightworks.store.packing import IntScheme, Quantized

PAPER = "Frantar & Alistarh 2023, arXiv:2301.00774"
VERSION = 2
STEPS = 4  # come within 1 % of the best loss; each costs a good part of gathering H


class Options(SparsityOptions):
    """SparseGPT's options."""

    act_order: Literal["static", "none"] = Field(
        "static", description="order of columns: static sorts by diag(H), whole groups of an N:M pattern by theirs"
    )
    refine: int | None = Field(
        None, ge=0, description="steps of least squares on what is kept, after the sweep; default: 4, with --bits 0"
    )
    damp_percent: float = Field(0.01, gt=0, le=1, description="share of the mean of diag(H) added to the diagonal")
    bits: Literal[2, 3, 4, 8] | None = Field(None, description="also round what is kept to so many bits, in one sweep")
    group_size: int = Field(128, ge=-1, description="with --bits: input columns that share a scale; -1: the whole row")
    sym: bool = Field(True, description="with --bits: grid symmetric about zero; asymmetric stores zero points")
    format: Literal["compressed-tensors", "gptq", "gptq_v2", "dense"] = Field(
        "compressed-tensors", description="with --bits: container of the result; dense writes dequantized weights"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.refine and self.bits is not None:
            raise ValueError("refine would move weights off their grid: it cannot be used with bits")
        return self

    @property
    def steps(self) -> int:
        """Steps of least squares."""
        return (STEPS if self.bits is None else 0) if self.refine is None else self.refine

    @property
    def grid(self) -> IntScheme | None:
        return None if self.bits is None else IntScheme(self.bits, self.group_size, self.sym)


class Seen:
    """H of the inputs and, where masks are to be repaired, their moments."""

    def __init__(self, columns: int, device: torch.device, *, moments: bool) -> None:
        self.hessian = Hessian(columns, device)
        self.columns = Columns(columns, device) if moments else None

    def add(self, inputs: torch.Tensor) -> None:
        self.hessian.add(inputs)
        if self.columns is not None:
            self.columns.add(inputs)


class Removing:
    """Zeros, as a rule of the sweep; ``mask`` bool [in, out] is True where a weight stays.

    A given ``mask`` is kept to. Else, of the columns of a block the ``pruned`` (a number a block) weights that cost
    least, or of every ``pattern.of`` columns the cheapest of each row, when the sweep reaches them. ``rounding`` rounds
    what stays.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        mask: torch.Tensor | None = None,
        pruned: Sequence[int] = (),
        pattern: Pattern | None = None,
        rounding: Rounding | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.fixed = mask is not None
        self.mask = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
        self.counts, self.pattern, self.rounding = list(pruned), pattern, rounding
        self.start, self.scale = 0, torch.empty(0)

    def enter(self, start: int, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.start, self.scale = start, scale
        if self.fixed or self.pattern is not None:
            return
        cost = (weight / scale[:, None]).square_()
        self.mask[start : start + len(weight)] = top_mask(cost, cost.numel() - self.counts.pop(0))

    def column(self, j: int, rest: torch.Tensor) -> torch.Tensor:
        pattern = self.pattern
        if pattern is not None and not self.fixed and j % pattern.of == 0:
            scale = self.scale[j - self.start :][: pattern.of]
            cost = (rest[: pattern.of] / scale[:, None]).square_()  # [of, out]
            self.mask[j : j + pattern.of] = pattern_mask(cost.T, pattern).T
        gone = ~self.mask[j]
        if self.rounding is None:
            return rest[0].masked_fill(gone, 0)
        value = self.rounding.column(j, rest).masked_fill_(gone, 0)
        codes, zero = self.rounding.codes[j], self.rounding.zero[self.rounding.index[j]]
        codes.copy_(torch.where(gone, zero.byte(), codes))
        return value


@dataclass
class Swept:
    """One weight solved: its mask [out, in], its loss by row [out], and the rounded weight if it was to be rounded."""

    mask: torch.Tensor
    loss: torch.Tensor
    quantized: Quantized | None


def remove(
    weight: torch.Tensor,
    lower: torch.Tensor,
    order: torch.Tensor,
    *,
    pruned: int = 0,
    pattern: Pattern | None = None,
    mask: torch.Tensor | None = None,
    grid: Grid | None = None,
    importance: torch.Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> Swept:
    """Prune float32 ``weight`` [out, in] in place, columns in ``order`` [in], ``lower`` being L [in, in] in that order.

    Pruned are ``pruned`` weights, shared out evenly over the blocks of the sweep (or as ``counts`` says); or all but
    those of a ``pattern``; or those outside ``mask`` [out, in]. With a ``grid`` the others are rounded, on grids fitted to
    the weight as it was, weighed by ``importance`` [in]: the answer is then ``quantized``. Paper, algorithm 1.
    """
    (rows, columns), device = weight.shape, weight.device
    block = block_size(pattern.of if pattern else 1)
    if counts is None:
        counts = evenly(pruned, columns, block, rows)
    rounding = None
    if grid is not None:
        size = columns if grid.scheme.group_size == -1 else grid.scheme.group_size
        weighed = None if importance is None else grouped(importance[None], size)
        scale, zero = grid.fit(grouped(weight, size), weighed)  # [out, groups]
        rounding = Rounding(grid, (order // size).tolist(), scale.T.contiguous(), zero.T.contiguous())
    fixed = None if mask is None else mask.T[order]
    rule = Removing((columns, rows), mask=fixed, pruned=counts, pattern=pattern, rounding=rounding, device=device)
    swept = weight.T.contiguous()[order]  # [in, out]
    loss = sweep(swept, lower, rule, block=block)
    found = _back(rule.mask, order).T.contiguous()
    quantized = None
    if rounding is not None and grid is not None:
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
        codes[:, order] = rounding.codes.T
        quantized = Quantized(grid.scheme, codes, rounding.scale.T.to(grid.scale_dtype), rounding.zero.T.byte())
    weight.copy_(_back(swept.mul_(rule.mask).add_(0), order).T)  # zeros lose their signs
    return Swept(found, loss, quantized)


def _back(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``columns`` [in, out], which are in ``order``, as they were before."""
    return columns[order.argsort()]


def evenly(pruned: int, columns: int, block: int, rows: int) -> list[int]:
    """``pruned`` weights shared out over the blocks of the sweep by their size, exactly."""
    ends = [min(start + block, columns) for start in range(0, columns, block)]
    totals = [0, *(pruned * end // columns for end in ends)]
    return [stop - start for start, stop in pairwise(totals)]


class Method(Pruner):
    """SparseGPT as a blockwise method."""

    def scheme(self) -> IntScheme | None:
        scheme: IntScheme | None = self.options.grid
        return scheme

    def working(self, columns: int) -> int:
        return 4 * columns**2 if self.options.steps else 0  # H, of which the factor takes the place

    def watch(self, columns: int, device: torch.device) -> Seen:
        return Seen(columns, device, moments=self.options.repair != "none")

    def solve(self, weights: list[torch.Tensor], statistics: Seen, targets: Sequence[Target]) -> list[Solution]:
        options, hessian = self.options, statistics.hessian
        device, width = weights[0].device, weights[0].shape[1]
        fallbacks = [f"{hessian.dropped} inputs were not finite and left out"] if hessian.dropped else []
        tokens = hessian.tokens
        if tokens < COLD:
            fallbacks.append(f"saw {tokens} tokens (fewer than {COLD}), pruned by magnitude without error compensation")
            hessian = Hessian(width, device)
            hessian.matrix.diagonal().fill_(1)
        matrix = hessian.finish()
        energies = [output_energy(weight, matrix) for weight in weights]
        kept = matrix.clone() if options.steps else None
        importance, order, found = prepare(matrix, options)
        dead = int((importance == 0).sum())
        lower = found.lower
        if lower is None:
            fallbacks.append(f"{found.steps[-1]}, pruned by magnitude without error compensation")
            lower = torch.eye(width, device=device)
        else:
            fallbacks += found.steps if tokens >= COLD else []
            if kept is not None:
                kept.diagonal().add_(found.damping * importance.mean()).masked_fill_(importance == 0, 1)
        facts = {"tokens": tokens, "damping": found.damping, "dead_inputs": dead}
        solutions = []
        for weight, target, energy in zip(weights, targets, energies, strict=True):
            weight[:, importance == 0] = 0
            before = weight.clone() if kept is not None else weight
            swept, more = self._one(weight, target, lower, order, importance, statistics.columns)
            if kept is not None and found.lower is not None:
                refine(weight, before, kept, swept.mask, options.steps)
                swept.loss = output_energy(weight - before, kept)
            more["relative_error"] = relative_loss(swept.loss, energy)
            answer = weight if swept.quantized is None else swept.quantized
            solutions.append(Solution(answer, {**facts, **more}, list(fallbacks), swept.mask))
        return solutions

    def _one(
        self,
        weight: torch.Tensor,
        target: Target,
        lower: torch.Tensor,
        order: torch.Tensor,
        importance: torch.Tensor,
        columns: Columns | None,
    ) -> tuple[Swept, dict[str, Any]]:
        """One weight pruned in place; with a repair it is swept for the mask, and again from the start with it mended."""
        options, scheme = self.options, self.options.grid
        grid = None if scheme is None else Grid(scheme, target.scale_dtype, target.min_zero, signed=True)
        pruned = weight.numel() - options.keep(target, weight.numel())
        asked: dict[str, Any] = {"pruned": pruned, "pattern": options.n_of_m}
        facts: dict[str, Any] = {}
        if columns is not None:
            mask = remove(weight.clone(), lower, order, **asked).mask
            mask, facts["swaps"] = repaired(mask, weight, columns, options.n_of_m)
            asked = {"mask": mask}
        return remove(weight, lower, order, **asked, grid=grid, importance=importance), facts


def prepare(hessian: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor, Factor]:
    """diag(H) [in], the order of columns [in], and the factor; ``hessian`` is used up."""
    importance = hessian.diagonal().clone()
    hessian.diagonal()[importance == 0] = 1
    unit = options.n_of_m.of if options.n_of_m else 1
    order = torch.arange(len(importance), device=hessian.device)
    if options.act_order == "static" and bool(torch.isfinite(importance).all()):
        groups = importance.view(-1, unit).sum(1).argsort(descending=True, stable=True)
        order = order.view(-1, unit)[groups].flatten()
    return importance, order, factor(hessian, order, damp_percent=options.damp_percent)
