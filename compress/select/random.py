"""A seeded choice of rows by chance alone, to hold other ways against."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.selection import SelectionOptions
from weightworks.stage.selecting import CHOSEN, NO_ROOM, Choice, Pool

PAPER = "the baseline of arXiv:2502.12594"
VERSION = 1


class Options(SelectionOptions):
    """Options of the choice by chance."""


class Method:
    """Looks at nothing."""

    measures = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def select(self, pool: Pool, count: int, say: Callable[[str], None]) -> Choice:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(pool.seed))[:count].tolist()
        outcomes = [NO_ROOM] * len(pool)
        for row in order:
            outcomes[row] = CHOSEN
        return Choice(order, outcomes)
