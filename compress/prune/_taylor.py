"""Taylor importance: what the loss is expected to change when a weight becomes zero, by its gradients over the windows.

Ma et al., "LLM-Pruner" (arXiv:2305.11627), section 3.2, with the empirical Fisher matrix's diagonal as second derivative.
"""

from __future__ import annotations

from typing import Literal

import torch

Order = Literal["taylor", "taylor-second", "taylor-mix"]


class Gradients:
    """The mean g and the mean of squares F of the gradients of a weight, float32 [out, in] each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = self.squares = torch.zeros(())
        self.count = 0

    @staticmethod
    def nbytes(elements: int) -> int:
        """Bytes for a weight of so many elements."""
        return 8 * elements

    def add(self, gradient: torch.Tensor) -> None:
        """Take in the gradient [out, in] of the loss of one window."""
        if self.count == 0:
            self.total, self.squares = gradient.clone(), gradient.square()
        else:
            self.total += gradient
            self.squares.addcmul_(gradient, gradient)
        self.count += 1

    def worth(self, weight: torch.Tensor, order: Order) -> torch.Tensor:
        """Of each element of ``weight`` [out, in]: |w g|, |w^2 F|, or |w g - w^2 F / 2|; zero if no window had a gradient."""
        if self.count == 0:
            return torch.zeros_like(weight)
        first, second = weight * self.total / self.count, weight.square() * self.squares / self.count
        return {"taylor": first, "taylor-second": second, "taylor-mix": first - second / 2}[order].abs()
