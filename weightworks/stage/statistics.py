"""What can be asked of statistics that are kept in a file: of which kind, and of which labels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from weightworks.options import Options


class StatisticsOptions(Options):
    """Options of ``compress stats``."""

    kind: Literal["gram", "fisher"] = Field(
        "gram",
        description="gram: X'X / n of every linear layer's inputs, streamed block by block; fisher: mean squared gradients of "
        "every weight, with the whole model in memory",
    )
    labels: Literal["model", "text"] = Field(
        "model",
        description="fisher: gradients for tokens drawn from the model itself (the Fisher information), or for those of "
        "the text (the empirical one)",
    )
