"""Floating-point formats of a few bits whose exponent bias is any real number, so that it stands for a scale.

Liu et al., "LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (arXiv:2310.16836), equations 4 to 9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TINY = 1e-30  # stands in for the largest magnitude of what is all zero


@dataclass(frozen=True, slots=True)
class Minifloat:
    """A sign, ``exponent`` and ``mantissa`` bits; no infinities, no NaN, and subnormal numbers."""

    exponent: int
    mantissa: int

    def __str__(self) -> str:
        return f"E{self.exponent}M{self.mantissa}"

    @property
    def reach(self) -> int:
        """How many steps of the exponent lie between the largest binade and the subnormal numbers."""
        return 2**self.exponent - 1

    def bias(self, top: torch.Tensor) -> torch.Tensor:
        """The bias under which the largest magnitude ``top`` is the largest number: 2^E - log2(top) + log2(2 - 2^-M) - 1."""
        return self.reach - torch.log2(top.clamp(min=TINY)) + math.log2(2 - 2.0**-self.mantissa)

    def round(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The nearest numbers under ``bias`` (broadcastable), ties to even; what is too large becomes the largest."""
        largest = (2 - 2.0**-self.mantissa) * torch.exp2(self.reach - bias)
        clipped = torch.minimum(torch.maximum(x, -largest), largest)
        exponent = torch.floor(torch.log2(clipped.abs()) + bias).clamp_(min=1)  # -inf of 0 too
        step = torch.exp2(exponent - self.mantissa - bias)
        return torch.round(clipped / step).mul_(step)


def formats(bits: int) -> tuple[Minifloat, ...]:
    """Those that are searched, mantissas growing: E3M0, E2M1, E1M2 of 4 bits; E5M2 to E1M6 of 8."""
    mantissas = range(3) if bits == 4 else range(2, bits - 1)
    return tuple(Minifloat(bits - 1 - mantissa, mantissa) for mantissa in mantissas)
