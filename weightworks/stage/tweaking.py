"""The shape of a step that follows the rounding of a block: its norms are tuned to what the dense block puts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # recipes are checked without torch
    import torch

    Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    Solve = Callable[[torch.Tensor, Sequence[tuple[torch.Tensor, torch.Tensor]]], torch.Tensor]


@dataclass(frozen=True)
class Tweak:
    """How the gains and biases of a block's norms are tuned once its weights are rounded.

    ``measures`` compare, by name, the output [batch, seq, hidden] of the rounded block with that of the dense one on the same
    input, windows held out. All must fall, or the norms stay as they were.

    Either a norm is solved: ``solve`` gives the factors [in] of its outputs from their second moments [in, in] and the weights
    [out, in] that read them, each dense and rounded. Or Adam goes once over the calibration windows: ``descent``.
    """

    measures: Mapping[str, Compare]
    solve: Solve | None = None
    descent: Descent | None = None


@dataclass(frozen=True)
class Descent:
    """What Adam makes smaller: ``loss(made, aim)`` of what ``view(output)`` takes of a block's outputs, rounded and dense; at
    ``rate(block, blocks)``."""

    view: Callable[[torch.Tensor], torch.Tensor]
    loss: Compare
    rate: Callable[[int, int], float]


class Tweaking(Protocol):
    """What a method has whose norms can be tuned. Its shape is that of any quantizer, tensorwise ones too."""

    def tweak(self) -> Tweak | None:
        """How they are; None if they stay as they are."""


def tweak_of(method: Any) -> Tweak | None:
    """How norms are tuned after a method; None if they are not."""
    found: Tweak | None = method.tweak() if hasattr(method, "tweak") else None
    return found
