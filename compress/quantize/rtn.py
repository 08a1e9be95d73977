"""Round to nearest: each weight to the nearest point of its group's grid, with no calibration.

Only formats that round inputs under a scale of the layer (NVFP4) take a text, to find how large these are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress import norms, ranges
from compress.grids import grouped
from compress.schemes import GridOptions
from weightworks.stage.budget import Budget
from weightworks.stage.protocols import Solution, Survey, Target
from weightworks.stage.tweaking import Tweak
from weightworks.store.packing import IntScheme, Scheme

PAPER = "the baseline of every paper; clipping search as in the GPTQ repository (IST-DASLab/gptq)"
VERSION = 1


class Options(GridOptions):
    """Options of rounding to nearest."""


class Method:
    """Rounding as a tensorwise method."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> Scheme:
        return self.options.any_scheme()

    def surveys(self) -> Sequence[Survey]:
        """The ranges of tensors, where a format has a scale for each."""
        return [ranges.survey(self.scheme())] if ranges.needed(self.scheme()) else []

    def budget(self) -> Budget | None:
        return self.options.allowance()

    def tweak(self) -> Tweak | None:
        return norms.tweak(self.options)

    def apply(self, weight: torch.Tensor, target: Target) -> Solution:
        top, inputs, fallbacks = weight.abs().max(), torch.zeros(()), []
        if target.found is not None:
            top, inputs = (torch.tensor(target.found[key]) for key in ("weight", "inputs"))
        scheme = target.scheme if isinstance(target.scheme, IntScheme) else self.options.any_scheme()
        grid = self.options.grid(scheme, target, top, inputs)
        groups = grouped(weight, scheme.group_size)  # [out, groups, group]
        scale, zero = grid.fit(groups)
        quantized = grid.encoded(grid.codes(groups, scale, zero), scale, zero)
        error = (quantized.dequantize() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        if ranges.needed(grid.scheme) and grid.scheme.inputs is not None and not float(inputs):
            fallbacks.append(ranges.UNSEEN)
        return Solution(quantized, {"relative_weight_error": float(error)}, fallbacks)
