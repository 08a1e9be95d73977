"""First and second moments of each input of a linear layer: what scores of single weights need, far less than H."""

from __future__ import annotations

import torch


class Columns:
    """Sums over inputs: in float32 within a batch, in float64 over batches, so that the number of tokens does not show.

    ``tokens`` counts the rows seen, ``dropped`` those of batches left out because they held NaN or infinity.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.tokens = 0
        self.dropped = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in ``inputs`` [tokens, in]."""
        x = inputs.to(self.total.device, torch.float32)
        total, squares = x.sum(0), x.square().sum(0)
        if not torch.isfinite(squares).all():
            self.dropped += x.shape[0]
            return
        self.tokens += x.shape[0]
        self.total += total
        self.squares += squares

    def norms(self) -> torch.Tensor:
        """The root mean square of each input, float32 [in]; ones if nothing was seen, so that weights alone decide."""
        if self.tokens == 0:
            return torch.ones_like(self.total, dtype=torch.float32)
        return (self.squares / self.tokens).sqrt().float()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each input, float32 [in]."""
        mean = self.total / max(self.tokens, 1)
        variance = self.squares / max(self.tokens, 1) - mean.square()
        return mean.float(), variance.clamp(min=0).float()
