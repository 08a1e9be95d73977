"""NuSLERP: interpolate two models along the arc, placed by their weights, as whole tensors or row by row.

With a base the arc is between their task vectors. Unlike SLERP it may look at each row as a vector of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._directions import NEARLY, arc, combined, inputs, survey
from merge._options import SumOptions, weights_of
from weightworks.stage.merging import Slab, Survey

PAPER = "Shoemake 1985, doi:10.1145/325165.325242; as a merge: mergekit 0.1.5"
VERSION = 1


class Options(SumOptions):
    """Options of NuSLERP. Only the ratio of the two weights counts."""

    row_wise: bool = Field(False, description="each row of a matrix is a vector of its own; default: the whole tensor")


class Method:
    """SLERP at t = w_2 / (w_1 + w_2)."""

    BASE, LEAST, MOST = "optional", 2, 2

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def place(self) -> float:
        """t."""
        first, second = weights_of(self.options, 2)
        return second / (first + second)

    def surveys(self) -> list[Survey]:
        """Lengths and angle; of rows they are taken when they are merged."""
        return (
            []
            if self.options.row_wise
            else [survey(lambda g: arc(float(g[0, 1]), float(g[0, 0]), float(g[1, 1]), self.place))]
        )

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        if not self.options.row_wise:
            return combined(slab, found)
        first, second = (one.reshape(one.shape[0] if slab.matrix else 1, -1) for one in inputs(slab))  # [rows, columns]
        merged = rows_on_arc(first, second, self.place).reshape(slab.models[0].shape)
        return merged if slab.base is None else merged + slab.base


def rows_on_arc(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """SLERP of each row of two matrices [rows, columns]."""
    a, b = first.double(), second.double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosine = torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp(min=1e-300), torch.ones_like(lengths))
    line = cosine.abs() > NEARLY
    angle = torch.acos(cosine.masked_fill(line, 0.0))
    left = torch.where(line, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    right = torch.where(line, t, torch.sin(t * angle) / torch.sin(angle))
    return (left[:, None] * a + right[:, None] * b).float()
