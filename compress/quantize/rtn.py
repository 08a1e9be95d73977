"""Round to nearest: each weight to the nearest point of its group's grid, with no calibration."""

from __future__ import annotations

import torch

from compress.grids import Grid, grouped
from compress.schemes import IntegerOptions
from weightworks.stage.protocols import Solution, Target
from weightworks.store.packing import IntScheme

PAPER = "the baseline of every paper; clipping search as in the GPTQ repository (IST-DASLab/gptq)"
VERSION = 1


class Options(IntegerOptions):
    """Options of rounding to nearest."""


class Method:
    """Rounding as a tensorwise method."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> IntScheme:
        return self.options.int_scheme()

    def apply(self, weight: torch.Tensor, target: Target) -> Solution:
        grid = Grid(self.scheme(), target.scale_dtype, target.min_zero, signed=True, clip=self.options.clips)
        groups = grouped(weight, self.options.group_size)  # [out, groups, group]
        scale, zero = grid.fit(groups)
        quantized = grid.encoded(grid.codes(groups, scale, zero), scale, zero)
        error = (quantized.dequantize() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        return Solution(quantized, {"relative_weight_error": float(error)})
