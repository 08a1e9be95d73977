"""HIGGS: blocks of a row rotated until they look normal, then rounded to the best grid there is for normal numbers. No data.

Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem" (arXiv:2411.17525).
The error depends on the grid alone, not on the weights, so it is known beforehand. Engines that multiply such codes run on GPUs
only, so the output is dense: every block is rotated back.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from compress import gaussian, norms
from compress.codebooks import BookScheme
from compress.schemes import ALWAYS_IGNORED, IGNORE, Patterns, StepOptions
from weightworks.stage.protocols import Solution, Target
from weightworks.stage.tweaking import Tweak
from weightworks.store.rotations import Rotation

PAPER = "Malinovskii et al. 2024, arXiv:2411.17525"
VERSION = 1
SIGNS = 0  # the seed of the random signs: a constant, as codes are decoded with them


class Options(StepOptions):
    """Options of HIGGS."""

    bits: Literal[2, 3, 4] = Field(4, description="bits a weight, without the scale of each block")
    vector: Literal[1, 2] = Field(
        2, description="weights that one code stands for: their grid has 2^(bits * vector) points"
    )
    group_size: int = Field(
        128, ge=2, description="input columns that are rotated together and share a scale; must divide every width"
    )
    ignore: Patterns = Field(default=[], description=IGNORE)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.group_size % self.vector:
            raise ValueError(f"group_size {self.group_size} is not a multiple of vector {self.vector}")
        return self

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]


def quantize(weight: torch.Tensor, *, bits: int, vector: int, size: int) -> torch.Tensor:
    """``weight`` [out, in] rounded in blocks of ``size`` columns; float32.

    A block w becomes w Q, Q a random Hadamard matrix, then in units of its root mean square the nearest vectors of the grid.
    """
    rotation = Rotation(size, SIGNS)
    rows = weight.reshape(-1, size)
    scale = rows.square().mean(1, keepdim=True).sqrt().half().float().clamp(min=1e-7)  # [blocks, 1]
    grid = gaussian.vectors(2 ** (bits * vector), vector).to(weight.device)
    made = torch.empty_like(rows)
    for out, block, unit in zip(*(part.split(1 << 14) for part in (made, rows, scale)), strict=True):
        turned = (rotation.right(block).float() / unit).view(-1, vector)
        nearest = grid[gaussian.closest(turned, grid)].view_as(block)
        out.copy_(rotation.back(nearest) * unit)
    return made.view_as(weight)


class Method:
    """HIGGS as a tensorwise method."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> BookScheme:
        options = self.options
        return BookScheme(f"HIGGS, {options.vector} weights a code", options.group_size, options.bits)

    def tweak(self) -> Tweak | None:
        return norms.tweak(self.options)

    def apply(self, weight: torch.Tensor, target: Target) -> Solution:
        options = self.options
        made = quantize(weight, bits=options.bits, vector=options.vector, size=options.group_size)
        error = float((made - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
        stored = options.bits + 16 / options.group_size
        return Solution(made, {"bits": options.bits, "bits_with_scales": stored, "relative_weight_error": error})
