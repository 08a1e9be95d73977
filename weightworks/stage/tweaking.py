"""The shape of a step that follows the rounding of a block: its norms are tuned to what the dense block puts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Solve = Callable[[torch.Tensor, Sequence[tuple[torch.Tensor, torch.Tensor]]], torch.Tensor]


@dataclass(frozen=True)
class Tweak:
    """How the gains and biases of a block's norms are tuned once its weights are rounded.

    ``view(output)`` is what counts of a block's output [batch, seq, hidden]; ``loss(made, aim)`` compares that of the rounded
    block with that of the dense one on the same input, and decides on windows that were held out.

    ``rate(block, blocks)`` is Adam's in one pass over the calibration windows. With ``solve`` there is no Adam: it gives the
    factors [in] of a norm's outputs from their second moments [in, in] and the weights [out, in] that read them, each dense
    and rounded.
    """

    view: Callable[[torch.Tensor], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rate: Callable[[int, int], float]
    solve: Solve | None = None


class Tweaking(Protocol):
    """What a method has whose norms can be tuned. Its shape is that of any quantizer, tensorwise ones too."""

    def tweak(self) -> Tweak | None:
        """How they are; None if they stay as they are."""


def tweak_of(method: Any) -> Tweak | None:
    """How norms are tuned after a method; None if they are not."""
    found: Tweak | None = method.tweak() if hasattr(method, "tweak") else None
    return found
