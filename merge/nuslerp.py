"""NuSLERP: interpolate two models along the arc, placed by their weights, as whole tensors or row by row.

With a base the arc is between their task vectors. It follows the arc down to the smallest angles, where SLERP takes the line,
and may look at each row as a vector of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from merge._directions import arc, combined, combined_by_row, survey
from merge._options import SumOptions, shares_of
from weightworks.stage.mergekit import Mergekit
from weightworks.stage.merging import Slab, Survey

PAPER = "Shoemake 1985, doi:10.1145/325165.325242; as a merge: mergekit 0.1.5"
VERSION = 1
MERGEKIT = {
    "nuslerp": Mergekit(
        {"nuslerp_flatten": "row_wise", "nuslerp_row_wise": "row_wise"},
        {"weight": "weights"},
        convert=lambda given: {"row_wise": by_row(**given)},
        needed=("weight",),
        base="optional",
    )
}


def by_row(nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False) -> bool:
    """Whether rows are vectors of their own, as mergekit's two parameters say; that columns are is not supported."""
    if not nuslerp_flatten and not nuslerp_row_wise:
        raise ValueError(
            "columns as vectors of their own are not supported; set nuslerp_row_wise: true, or leave both out"
        )
    return not nuslerp_flatten


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
        return shares_of(self.options, 2)[1]

    def surveys(self) -> list[Survey]:
        """Lengths and angle; those of rows are taken when they are merged."""
        return [] if self.options.row_wise else [survey(self._coefficients)]

    def _coefficients(self, products: torch.Tensor) -> torch.Tensor:
        return arc(products, self.place)

    def merge(self, slab: Slab, found: Any) -> torch.Tensor:
        return combined_by_row(slab, self._coefficients) if self.options.row_wise else combined(slab, found)
