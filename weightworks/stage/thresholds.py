"""What can be asked of thresholds of activations: by which method, how many zeros."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from weightworks.options import Options


class ThresholdOptions(Options):
    """Options of ``compress sparsify``."""

    method: Literal["teal", "chess"] = Field(
        "teal",
        description="teal: a threshold for the inputs of each linear layer; chess: one for each channel of the gate of "
        "feed-forward parts, one for the inputs of the queries and of the attention's output",
    )
    sparsity: float = Field(0.5, ge=0, lt=1, description="share of inputs that become zero")
    allocation: Literal["greedy", "uniform"] = Field(
        "greedy",
        description="teal: greedy shares the zeros of a block out over its layers, where they change its output least; uniform: "
        "every layer alike",
    )
