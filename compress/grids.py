"""Integer grids: scale and zero point of a group of weights, rounding, and the search for the best clipping range.

Codes are unsigned, ``0 .. 2**bits - 1``; a weight is ``scale * (code - zero)``. Scales are rounded to the dtype they
will be stored in before any code is computed, so codes are right for the scale as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weightworks.store.packing import IntScheme

TINY = 1e-7  # stands in for the scale of an all-zero group; every code of it is the zero point
CLIP_STEPS = 100  # candidates are 1, 0.99, ... of the full range, down to CLIP_FLOOR (grid of the GPTQ repository)
CLIP_FLOOR = 0.2


@dataclass(frozen=True, slots=True)
class Grid:
    """How ranges become grids: the scheme, the dtype scales are stored in, the smallest zero point allowed.

    A symmetric grid has one level more below zero than above. By convention its scale is 2 max|w| / (2^bits - 1), which
    clips the extreme weight by half a step; ``signed`` gives the scale the sign that lays the extreme weight exactly on
    the outermost level (llama.cpp's Q4_0 does the same). ``clip`` turns on the search for the clipping range. It minimises squared errors weighed by importance, or with
    ``exponent`` the plain sum of errors to that power (2.4 in the GPTQ repository).
    """

    scheme: IntScheme
    scale_dtype: torch.dtype
    min_zero: int = 0
    signed: bool = False
    clip: bool = False
    exponent: float | None = None

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point (float32, same leading shape) of groups ``weight`` [..., group].

        ``importance`` (broadcastable to ``weight``) weighs squared errors in the search, such as diag(H).
        """
        low = weight.amin(-1).clamp(max=0)
        high = weight.amax(-1).clamp(min=0)
        scale, zero = self.from_range(low, high)
        if not self.clip:
            return scale, zero
        best = self._error(weight, scale, zero, importance)
        for step in range(1, round((1 - CLIP_FLOOR) * CLIP_STEPS)):
            shrink = 1 - step / CLIP_STEPS
            scale_new, zero_new = self.from_range(low * shrink, high * shrink)
            error = self._error(weight, scale_new, zero_new, importance)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, scale_new, scale)
            zero = torch.where(better, zero_new, zero)
        return scale, zero

    def from_range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale, as stored, and zero point of the range ``low`` <= 0 <= ``high``."""
        top = (1 << self.scheme.bits) - 1
        if self.scheme.symmetric and self.signed:
            scale = torch.where(-low >= high, low, high) / -self.scheme.midpoint
        elif self.scheme.symmetric:
            scale = 2 * torch.maximum(-low, high) / top
        else:
            scale = (high - low) / top
        scale = self.stored(scale)
        if self.scheme.symmetric:
            return scale, torch.full_like(scale, self.scheme.midpoint)
        return scale, torch.round(-low / scale).clamp(self.min_zero, top)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """``scale`` rounded to its storage dtype, in float32; its magnitude never zero, never subnormal there."""
        smallest = max(TINY, torch.finfo(self.scale_dtype).tiny)
        small = scale.abs() < smallest
        return torch.where(small, smallest, scale).to(self.scale_dtype).float()

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes of ``weight``, as float32 integers."""
        return torch.round(weight / scale).add_(zero).clamp_(0, (1 << self.scheme.bits) - 1)

    def _error(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, importance: torch.Tensor | None
    ) -> torch.Tensor:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = self.round(weight, scale, zero).sub_(zero).mul_(scale).sub_(weight)
        if self.exponent is not None:
            return error.abs_().pow_(self.exponent).sum(-1)
        return error.square_().sum(-1) if importance is None else error.square_().mul_(importance).sum(-1)


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View [out, in] as [out, groups, group]."""
    return weight.view(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
