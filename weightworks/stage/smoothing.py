"""The shape of a step before rounding: input channels are scaled, and what makes them scaled against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from weightworks.stage.protocols import Target

if TYPE_CHECKING:  # recipes are checked without torch
    import torch


@dataclass(frozen=True)
class Smoother:
    """``watch(columns, device)`` makes statistics of an input of the unchanged model, and ``scale`` of them, and of the weights
    float32 [out, in] that read it, what the columns of these are multiplied by, float32 [in], positive.

    With ``rows`` not only norms but also linears whose rows are such inputs, one each, take the other side of it. Statistics as
    large as a matrix [in, in] (``wide``) are kept of one input at a time.
    """

    watch: Callable[[int, torch.device], Any]
    scale: Callable[[Sequence[torch.Tensor], Any, Sequence[Target]], torch.Tensor]
    rows: bool = False
    wide: bool = False


class Smoothing(Protocol):
    """What a method has that scales input channels first."""

    def smoother(self) -> Smoother:
        """How it does."""
