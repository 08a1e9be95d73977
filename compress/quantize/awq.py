"""AWQ: input channels scaled, before rounding, by a power of how large they are, and clipping ranges searched.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv:2306.00978). W [out, in] is a
weight, X [tokens, in] its inputs, a_j the mean of |X_j|. Columns are multiplied by s = a^r, normalised by the root of its largest
times its smallest entry, and what makes X is divided: norms, and linears whose rows are inputs one to one. r is the one of 20
under which the rounded weights that read X put out most nearly what they did, which the paper asks of the layer around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from compress import norms
from compress.grids import Grid, grouped
from compress.hessian import Hessian
from compress.schemes import IntegerOptions, StepOptions
from compress.sweep import COLD
from weightworks.stage.protocols import Solution, Target
from weightworks.stage.smoothing import Smoother
from weightworks.stage.tweaking import Tweak
from weightworks.store.packing import IntScheme

PAPER = "Lin et al. 2023, arXiv:2306.00978"
VERSION = 1
POWERS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4  # of a^r, as in the released code
SHRINKS = tuple(1 - step / 20 for step in range(10))  # of the range that clips nothing


class Options(StepOptions, IntegerOptions):
    """Options of AWQ."""

    clip: Literal["auto", "on", "off"] = Field(
        "auto", description="search the clipping range of each group by the layer's output; auto: on"
    )

    @property
    def clips(self) -> bool:
        """Whether ranges are searched: by the output, not by weights alone, that helped at every width (docs/quantization.md)."""
        return self.clip != "off"


class Sizes(Hessian):
    """H of the inputs, and the sum of the magnitudes of each channel [in]."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self.sizes = torch.zeros(columns, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs [tokens, in]; one that is not finite is left out."""
        before = self.tokens
        super().add(inputs)
        if self.tokens > before:
            self.sizes += inputs.abs().float().sum(0)


def search(weights: Sequence[torch.Tensor], hessian: torch.Tensor, sizes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scale [in] for ``weights`` [out, in], whose inputs have moments H [in, in] and mean magnitudes ``sizes`` [in]."""
    stacked = torch.cat(list(weights))
    best, least = torch.ones_like(sizes), torch.inf
    for power in POWERS:
        scale = sizes.pow(power).clamp(min=SMALLEST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = rounded(stacked * scale, grid).div_(scale).sub_(stacked)
        loss = float(((error @ hessian) * error).sum())
        if loss < least:  # the first power, 0, leaves everything as it is
            best, least = scale, loss
    return best


def rounded(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """``weight`` [out, in] rounded to nearest."""
    groups = grouped(weight, grid.scheme.group_size)
    scale, zero = (part[..., None] for part in grid.fit(groups))
    return grid.snap(groups, scale, zero)[1].view_as(weight)


def clipped(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [out, groups] of the range of each group that costs the output least; other groups count as exact."""
    groups = grouped(weight, grid.scheme.group_size)  # [out, groups, group]
    count, size = groups.shape[1:]
    corners = torch.stack([hessian[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    least = torch.full(low.shape, torch.inf, device=weight.device)
    scale, zero = grid.from_range(low, high)
    for tried in (one for shrink in SHRINKS for one in grid.of_range(low * shrink, high * shrink)):
        error = grid.snap(groups, tried[0][..., None], tried[1][..., None])[1].sub_(groups).transpose(0, 1)
        loss = ((error @ corners) * error).sum(-1).T  # [out, groups]
        better = loss < least
        least = torch.where(better, loss, least)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


class Method:
    """AWQ as a blockwise method."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> IntScheme:
        return self.options.int_scheme()

    def tweak(self) -> Tweak | None:
        return norms.tweak(self.options)

    def smoother(self) -> Smoother:
        return Smoother(Sizes, self.scale, rows=True, wide=True)

    def scale(self, weights: Sequence[torch.Tensor], statistics: Sizes, targets: Sequence[Target]) -> torch.Tensor:
        """What the columns of ``weights`` are multiplied by; 1 where too little was seen."""
        sizes = statistics.sizes / max(statistics.tokens, 1)
        if statistics.tokens < COLD or not float(sizes.max()):
            return torch.ones_like(sizes)
        hessian = statistics.finish()
        weights = [weight.to(hessian.device) for weight in weights]
        return search(weights, hessian, sizes.clamp(min=float(sizes.max()) * SMALLEST), self._grid(targets[0]))

    def watch(self, columns: int, device: torch.device) -> Hessian:
        return Hessian(columns, device)

    def solve(self, weights: list[torch.Tensor], statistics: Hessian, targets: Sequence[Target]) -> list[Solution]:
        tokens, dropped = statistics.tokens, statistics.dropped
        fallbacks = [f"{dropped} inputs were not finite and left out"] if dropped else []
        clips = self.options.clips
        if tokens < COLD:
            fallbacks.append(f"saw {tokens} tokens (fewer than {COLD}), neither scaled nor clipped")
            clips = False
        hessian = statistics.finish()
        return [
            self._solution(weight, hessian, target, list(fallbacks), tokens, clips=clips)
            for weight, target in zip(weights, targets, strict=True)
        ]

    def _solution(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        target: Target,
        fallbacks: list[str],
        tokens: int,
        *,
        clips: bool,
    ) -> Solution:
        grid, groups = self._grid(target), grouped(weight, self.options.group_size)
        scale, zero = clipped(weight, hessian, grid) if clips else grid.fit(groups)
        quantized = grid.encoded(grid.codes(groups, scale, zero), scale, zero)
        error = quantized.dequantize() - weight
        energy = float(((weight @ hessian) * weight).sum())
        lost = float(((error @ hessian) * error).sum()) / energy if energy else 0.0
        return Solution(quantized, {"tokens": tokens, "relative_error": lost}, fallbacks)

    def _grid(self, target: Target) -> Grid:
        return Grid(self.scheme(), target.scale_dtype, target.min_zero, signed=True)
