"""GPTQ: round column by column, pushing each column's error onto the columns not yet rounded.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv:2210.17323).
W [out, in] is a weight, X [tokens, in] its inputs, H = (2/n) X'X, L the lower Cholesky factor of inv(H + damping).
With asymmetric calibration it is GPTAQ (Li et al., arXiv:2504.02692): outputs are to be those of the unchanged model, whose
inputs are not X, rather than those that the unchanged weight makes of X.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from compress import norms, ranges
from compress.codebooks import LEVELS
from compress.grids import AnyGrid, grouped
from compress.hessian import Drifted, Factor, Hessian, drift, factor
from compress.schemes import HARDWARE, AnyScheme, GridOptions
from compress.sweep import COLD, Rounding, block_size, output_energy, relative_loss, sweep
from weightworks.stage.budget import Budget
from weightworks.stage.protocols import Solution, Target
from weightworks.stage.tweaking import Tweak
from weightworks.store.floats import FloatScheme
from weightworks.store.packing import Encoded, IntScheme

PAPER = "Frantar et al. 2022, arXiv:2210.17323"
VERSION = 1
SWEPT = 1 << 23  # weights swept at a time: rows are independent, and a block of this many rows stays in the cache


class Options(GridOptions):
    """GPTQ's options."""

    act_order: Literal["static", "none", "dynamic"] = Field(
        "static",
        description="order of columns: static sorts by diag(H) and keeps groups of neighbours, none keeps the order, "
        "dynamic also groups in that order (needs --format gptq)",
    )
    damp_percent: float = Field(0.01, gt=0, le=1, description="share of the mean of diag(H) added to the diagonal")

    asymmetric_calibration: float | None = Field(
        None,
        gt=0,
        le=1,
        description="GPTAQ: make up for what earlier layers' rounding did to the inputs too; the share of it, 1 in the paper",
    )

    @model_validator(mode="after")
    def _orderly(self) -> Self:
        if self.act_order == "dynamic" and (self.scheme in HARDWARE or self.scheme in LEVELS):
            raise ValueError(f"scheme {self.scheme} keeps groups of neighbours: act_order must be static or none")
        if self.act_order == "dynamic" and self.budgeted:
            raise ValueError("a budget needs groups of neighbours: act_order must be static or none")
        return self


class Seen:
    """Statistics of the inputs, and how large these are."""

    def __init__(self, statistics: Hessian) -> None:
        self.statistics = statistics
        self.largest = ranges.Largest(len(statistics.matrix), statistics.matrix.device)

    def add(self, inputs: torch.Tensor, *unrounded: torch.Tensor | None) -> None:
        self.statistics.add(inputs, *unrounded)
        self.largest.add(inputs)


def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: AnyGrid,
    *,
    reorder: bool,
    static_groups: bool,
    damp_percent: float,
    pairs: tuple[torch.Tensor, float] | None = None,
) -> tuple[Encoded, torch.Tensor, Factor]:
    """Quantize float32 ``weight`` [out, in] against ``hessian`` [in, in]; both are used up.

    ``pairs`` are D [in, in], used up too, and the share of the drift that is made up for; see :func:`compress.hessian.drift`.
    ``reorder`` sweeps columns by falling diag(H). With ``static_groups`` a group is ``group_size`` neighbours and its
    grid is fitted to the original weight; without, groups follow the sweep and fit their grids when it reaches them.
    Returns the codes with their grid, the proxy loss tr(E H E') by output row [out] (damping included), and what the
    factorisation took. If nothing could be factored, the weight is rounded without compensation.
    """
    columns, scheme = hessian.shape[0], grid.scheme
    importance = hessian.diagonal().clone()  # [in]
    dead = importance == 0  # no calibration token ever reached these inputs
    if not torch.isfinite(importance.sum()):
        importance = torch.ones_like(importance)  # nothing can be factored below, and nothing is known of inputs
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    size = columns if scheme.group_size == -1 else scheme.group_size
    order = (
        importance.argsort(descending=True, stable=True) if reorder else torch.arange(columns, device=hessian.device)
    )
    place = torch.arange(columns, device=hessian.device) // size  # the group of the column at each place of the sweep
    fits = not static_groups and size < columns
    index = order // size if static_groups else place
    scale, zero = grid.fit(grouped(weight, size), grouped(importance[None], size))  # [out, groups]

    found = factor(hessian, order, damp_percent=damp_percent)
    if found.lower is None:
        codes = grid.codes(grouped(weight, size), scale, zero)
        return grid.encoded(codes, scale, zero), torch.zeros(weight.shape[0]), found
    taken = None if pairs is None else drift(pairs[0], found.lower, order, pairs[1])
    codes, loss = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(weight.shape[0])
    rows_together = scheme.rows if isinstance(scheme, FloatScheme) else 1
    height, groups = max(1, SWEPT // columns // rows_together) * rows_together, index.tolist()
    for start in range(0, weight.shape[0], height):
        rows = slice(start, start + height)
        grids = scale[rows].T.contiguous(), zero[rows].T.contiguous()  # [groups, rows]
        rule = Rounding(grid, groups, *grids, importance[order] if fits else None)
        loss[rows] = sweep(weight[rows].T[order], found.lower, rule, block=block_size(rule.group), drift=taken)
        codes[rows, order], scale[rows], zero[rows] = rule.codes.T, rule.scale.T, rule.zero.T
    moved = torch.empty_like(place).scatter_(0, order, place).int() if reorder and fits else None
    return grid.encoded(codes, scale, zero, moved), loss, found


class Method:
    """GPTQ as a blockwise method."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> AnyScheme:
        return self.options.any_scheme(reordered=self.options.act_order == "dynamic")

    def budget(self) -> Budget | None:
        return self.options.allowance()

    def tweak(self) -> Tweak | None:
        return norms.tweak(self.options)

    @property
    def paired(self) -> bool:
        return self.options.asymmetric_calibration is not None

    def working(self, columns: int) -> int:
        """Bytes of the drift that is made up for."""
        return 12 * columns**2 if self.paired else 0

    def watch(self, columns: int, device: torch.device) -> Hessian | Seen:
        statistics = (Drifted if self.paired else Hessian)(columns, device)
        return Seen(statistics) if ranges.needed(self.scheme()) else statistics

    def solve(self, weights: list[torch.Tensor], seen: Hessian | Seen, targets: Sequence[Target]) -> list[Solution]:
        options, scheme = self.options, self.scheme()
        statistics = seen.statistics if isinstance(seen, Seen) else seen
        if isinstance(own := targets[0].scheme, IntScheme):
            scheme = own
        inputs = seen.largest.value if isinstance(seen, Seen) else torch.zeros(())
        heights = [weight.shape[0] for weight in weights]
        if isinstance(scheme, FloatScheme) and scheme.rows > 1:  # no band of rows reaches into the next weight
            weights[:] = [torch.nn.functional.pad(one, (0, 0, 0, -len(one) % scheme.rows)) for one in weights]
        padded = [weight.shape[0] for weight in weights]
        tokens, dropped, columns, device = statistics.tokens, statistics.dropped, weights[0].shape[1], weights[0].device
        fallbacks = [f"{dropped} inputs were not finite and left out"] if dropped else []
        if tokens < COLD:
            fallbacks.append(f"saw {tokens} tokens (fewer than {COLD}), rounded without error compensation")
            statistics = Hessian(columns, device)
            statistics.matrix.diagonal().fill_(1)
        pairs = None
        if isinstance(statistics, Drifted) and options.asymmetric_calibration is not None:
            pairs = statistics.finish_drift(), options.asymmetric_calibration
            if statistics.unpaired:
                fallbacks.append("calibrated on the rounded model's inputs alone: not every token reaches it")
        hessian = statistics.finish()
        dead = int((hessian.diagonal() == 0).sum())
        if ranges.needed(scheme) and scheme.inputs is not None and not float(inputs):
            fallbacks.append(ranges.UNSEEN)
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]  # rows are independent: one factor, one sweep
        weights.clear()
        grid = options.grid(scheme, targets[0], stacked.abs().max(), inputs)
        energy = output_energy(stacked, hessian)
        quantized, loss, found = quantize(
            stacked,
            hessian,
            grid,
            reorder=options.act_order != "none",
            static_groups=options.act_order == "static",
            damp_percent=options.damp_percent,
            pairs=pairs,
        )
        if found.lower is None:
            fallbacks.append(f"{found.steps[-1]}, rounded without error compensation")
        elif found.steps and tokens >= COLD:
            fallbacks += found.steps
        facts = {"tokens": tokens, "damping": found.damping, "dead_inputs": dead}
        return [
            Solution(part, {**facts, "relative_error": relative_loss(error, total)}, list(fallbacks))
            for part, error, total in zip(
                quantized.split(heights), loss.split(padded), energy.split(padded), strict=True
            )
        ]
